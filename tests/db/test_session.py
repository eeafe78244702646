"""Connections of a PostgreSQL that go away while they wait to be used again."""

from __future__ import annotations

import psycopg
import pytest
import sqlalchemy as sa

from db import session
from db.session import connect, reading
from earmark.errors import DatabaseError
from earmark.settings import Database


def process(engine: sa.Engine) -> int:
    with reading(engine) as connection:
        return int(connection.scalar(sa.text("SELECT pg_backend_pid()")) or 0)


def end(url: str, process: int) -> None:
    with psycopg.connect(url, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [process])


def test_a_connection_that_died_while_it_was_idle_is_replaced(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "FRESH_S", 0.0)
    engine = connect(postgres_url, Database())
    first = process(engine)
    end(postgres_url, first)
    assert process(engine) != first
    engine.dispose()


def test_one_that_died_a_moment_after_its_use_is_one_sentence_and_then_replaced(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "FRESH_S", 60.0)
    engine = connect(postgres_url, Database())
    first = process(engine)
    end(postgres_url, first)
    with pytest.raises(DatabaseError):
        process(engine)
    assert process(engine) != first
    engine.dispose()
