"""PostgreSQL connections that are lost, turn read-only or lead through a pooler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest
import sqlalchemy as sa

from db import ledger, session
from db.session import ask, connect, reading, writing
from earmark.core.errors import DatabaseError, ServiceError
from earmark.core.settings import Database, Ledger
from tests.db.builders import chunk_of, submit
from tests.servers import PgBouncer, upgraded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def engine(postgres_url: str) -> Iterator[sa.Engine]:
    opened = connect(postgres_url, Database())
    yield opened
    opened.dispose()


def process(engine: sa.Engine) -> int:
    with reading(engine) as connection:
        return int(connection.scalar(sa.text("SELECT pg_backend_pid()")) or 0)


def ended(engine: sa.Engine, url: str) -> int:
    """End the server process of the engine's connection, and return its id."""
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


def test_a_connection_that_died_just_after_its_use_is_one_error_and_then_replaced(
    engine: sa.Engine, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "FRESH_S", 60.0)
    first = ended(engine, postgres_url)
    with pytest.raises(DatabaseError):
        process(engine)
    assert process(engine) != first


def begin_work(engine: sa.Engine) -> int:
    with writing(engine) as connection:
        connection.execute(sa.text("DELETE FROM leases"))
        return int(connection.scalar(sa.text("SELECT pg_backend_pid()")) or 0)


def test_connections_that_a_failover_left_read_only_are_replaced(engine: sa.Engine) -> None:
    with reading(engine) as one, reading(engine) as two:
        for connection in (one, two):
            connection.execute(sa.text("SET default_transaction_read_only = on"))
            connection.commit()
    with pytest.raises(DatabaseError, match="failover"):
        begin_work(engine)
    begin_work(engine)
    begin_work(engine)


@pytest.mark.parametrize(
    "state", ["25006", "57P01", "57P03", "08006", "53300", "53100", "42P05", "26000", "0A000"]
)
def test_an_error_of_the_server_s_state_replaces_the_connection(
    engine: sa.Engine, state: str
) -> None:
    first = begin_work(engine)
    with pytest.raises(DatabaseError) as raised, writing(engine) as connection:
        connection.execute(
            sa.text(f"DO $$ BEGIN RAISE 'trouble' USING ERRCODE = '{state}'; END $$")
        )
    assert not raised.value.facts.get("bug")
    assert begin_work(engine) != first


@pytest.mark.parametrize("state", ["40001", "40P01", "55P03", "57014"])
def test_an_error_that_another_transaction_caused_keeps_the_connection(
    engine: sa.Engine, state: str
) -> None:
    first = begin_work(engine)
    with pytest.raises(DatabaseError) as raised, writing(engine) as connection:
        connection.execute(
            sa.text(f"DO $$ BEGIN RAISE 'trouble' USING ERRCODE = '{state}'; END $$")
        )
    assert not raised.value.facts.get("bug")
    assert begin_work(engine) == first


@pytest.mark.parametrize(
    "statement", ["SELECT nothing_of_the_sort FROM clips", "SELECT 'x'::int", "SELEC 1"]
)
def test_a_wrong_statement_is_reported_as_a_bug(engine: sa.Engine, statement: str) -> None:
    with (
        pytest.raises(DatabaseError, match="bug in Earmark") as raised,
        reading(engine) as connection,
    ):
        connection.execute(sa.text(statement))
    assert raised.value.facts["bug"]


def test_a_timeout_of_the_connection_pool_is_a_database_error(
    postgres_url: str,
) -> None:
    engine = connect(postgres_url, Database(pool_size=1))
    engine.pool._timeout = 0.01  # type: ignore[attr-defined]
    engine.pool._max_overflow = 0  # type: ignore[attr-defined]
    with reading(engine), pytest.raises(DatabaseError), reading(engine):
        pass
    engine.dispose()


def ask_often(first: sa.Engine, second: sa.Engine) -> None:
    for number in range(12):
        values = {"number": number}
        assert ask(first, "SELECT CAST(:number AS bigint) + 1", values) == [(number + 1,)]
        assert ask(second, "SELECT CAST(:number AS bigint) + 2", values) == [(number + 2,)]


def test_clients_of_a_pooler_never_run_each_other_s_prepared_statements(
    pooler: PgBouncer, postgres_url: str
) -> None:
    first, second = (connect(pooler.url_of(postgres_url), Database()) for _ in range(2))
    ask_often(first, second)
    ids = submit(first, 3)[1]
    claim = ledger.claim(second, chunk_of(first, ids), worker="w", limits=Ledger())
    assert [clip.id for clip in claim.clips] == ids
    for engine in (first, second):
        engine.dispose()


def test_a_pooler_that_shares_by_the_statement_is_refused_in_a_sentence(postgres: str) -> None:
    bouncer = PgBouncer(postgres, mode="statement")
    engine = connect(bouncer.url_of(postgres), Database())
    with pytest.raises(DatabaseError, match="set pool_mode to transaction or session"):
        begin_work(engine)
    engine.dispose()
    bouncer.remove()


def test_undetected_a_pooler_mixes_up_prepared_statements(
    pooler: PgBouncer, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "behind_pooler", lambda _: False)
    first, second = (connect(pooler.url_of(postgres_url), Database()) for _ in range(2))
    with pytest.raises((AssertionError, DatabaseError)):
        ask_often(first, second)
    for engine in (first, second):
        engine.dispose()


@pytest.mark.parametrize("state", session.PREPARED_ELSEWHERE)
def test_an_undetected_pooler_is_detected_by_its_first_error(
    engine: sa.Engine, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with pytest.raises(DatabaseError), writing(engine) as connection:
            connection.execute(
                sa.text(f"DO $$ BEGIN RAISE 'trouble' USING ERRCODE = '{state}'; END $$")
            )
    with reading(engine) as connection:
        assert not session.prepares(connection)
    assert caplog.text.count("they are switched off") == 1


def test_statements_are_prepared_without_a_pooler(engine: sa.Engine) -> None:
    with reading(engine) as connection:
        assert session.prepares(connection)


def test_prepare_threshold_in_the_url_is_refused_in_a_sentence(postgres_url: str) -> None:
    with pytest.raises(ServiceError, match="no option prepare_threshold"):
        connect(f"{postgres_url}?prepare_threshold=0", Database())


@pytest.mark.parametrize("statement", ["SELECT nothing_of_the_sort FROM clips", "SELEC 1"])
def test_a_wrong_statement_on_sqlite_is_reported_as_a_bug(tmp_path: Path, statement: str) -> None:
    engine = connect(upgraded(f"sqlite:///{tmp_path}/e.db"), Database())
    with (
        pytest.raises(DatabaseError, match="bug in Earmark") as raised,
        reading(engine) as connection,
    ):
        connection.execute(sa.text(statement))
    assert raised.value.facts["bug"]
    engine.dispose()
