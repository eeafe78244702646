"""Connections of a PostgreSQL that go away while they wait to be used again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest
import sqlalchemy as sa

from db import session
from db.session import connect, reading
from earmark.errors import DatabaseError
from earmark.settings import Database

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def engine(postgres_url: str) -> Iterator[sa.Engine]:
    opened = connect(postgres_url, Database())
    yield opened
    opened.dispose()


def process(engine: sa.Engine) -> int:
    with reading(engine) as connection:
        return int(connection.scalar(sa.text("SELECT pg_backend_pid()")) or 0)


def ended(engine: sa.Engine, url: str) -> int:
    """Have PostgreSQL end the process that serves the engine's connection, and return which it was."""
    ended = process(engine)
    with psycopg.connect(url, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [ended])
    return ended


def test_a_connection_that_died_while_it_was_idle_is_replaced(
    engine: sa.Engine, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "FRESH_S", 0.0)
    first = ended(engine, postgres_url)
    assert process(engine) != first


def test_one_that_died_a_moment_after_its_use_is_one_sentence_and_then_replaced(
    engine: sa.Engine, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "FRESH_S", 60.0)
    first = ended(engine, postgres_url)
    with pytest.raises(DatabaseError):
        process(engine)
    assert process(engine) != first
