"""Runs one SELECT of a person: read-only, enforced by the database, and bounded in time."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa

from db.rows import ROWS_AT_ONCE, Rows
from db.sqlite_file import read_only_uri
from earmark.core.errors import ServiceError, UsageError
from earmark.core.spelling import did_you_mean

#: SQLite's codes of what a query does; anything else is denied.
READING = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
#: SQLite virtual machine steps between two looks at the clock: about a millisecond.
STEPS_PER_LOOK = 10_000


#: The names that a query may use, on SQLite; PostgreSQL says itself what was meant.
SELECT_NAMES = """
SELECT name FROM sqlite_schema UNION
SELECT c.name FROM sqlite_schema t, pragma_table_info(t.name) c
"""


def query(engine: sa.Engine, statement: str, *, timeout_s: float) -> Rows:
    """Return the rows of one reading statement.

    Raises:
        UsageError: it is not valid SQL, would write, or takes longer than the timeout.
        ServiceError: there is no database.
    """
    if engine.dialect.name == "sqlite":
        return Rows(_sqlite(engine, statement, timeout_s))
    return Rows(_postgresql(engine, statement, timeout_s))


def _sqlite(engine: sa.Engine, statement: str, timeout_s: float) -> Iterator[Sequence[Any]]:
    with _sentences(timeout_s), closing(_open_read_only(str(engine.url.database))) as connection:
        deadline = time.monotonic() + timeout_s
        connection.set_progress_handler(lambda: time.monotonic() > deadline, STEPS_PER_LOOK)
        connection.execute("PRAGMA query_only = ON")
        connection.set_authorizer(_allow_reading)
        try:
            cursor = connection.execute(statement)
        except sqlite3.OperationalError as error:
            sentence = _sentence(str(error), timeout_s)
            raise UsageError(reason=f"{sentence}{_meant(connection, str(error))}") from error
        if cursor.description is None:
            raise UsageError(reason="A query must give rows: SELECT ... .")
        yield [column[0] for column in cursor.description]
        yield from cursor


def _meant(connection: sqlite3.Connection, error: str) -> str:
    unknown = re.fullmatch(r"no such (?:column|table): (?:\w+\.)?(\w+)", error)
    if unknown is None:
        return ""
    connection.set_authorizer(None)
    return did_you_mean(unknown[1], (name for (name,) in connection.execute(SELECT_NAMES)))


def _open_read_only(file: str) -> sqlite3.Connection:
    try:
        return sqlite3.connect(read_only_uri(Path(file)), uri=True)
    except sqlite3.OperationalError as error:
        raise ServiceError(
            reason=f"The database {file} cannot be opened: {error}. Has anything run yet?"
        ) from error


def _allow_reading(action: int, *_: str | None) -> int:
    return sqlite3.SQLITE_OK if action in READING else sqlite3.SQLITE_DENY


def _postgresql(engine: sa.Engine, statement: str, timeout_s: float) -> Iterator[Sequence[Any]]:
    parameters = engine.dialect.create_connect_args(engine.url)[1]
    deadline = time.monotonic() + timeout_s
    with _sentences(timeout_s), _connected(parameters) as connection:
        connection.read_only = True
        connection.execute(
            "SELECT set_config('statement_timeout', %s, true)", [str(int(timeout_s * 1000))]
        )
        # A cursor is declared FOR one SELECT: no second statement, and no COPY ... TO PROGRAM.
        with connection.cursor("query") as cursor:
            cursor.itersize = ROWS_AT_ONCE
            cursor.execute(statement.strip().rstrip(";"))
            yield [column.name for column in cursor.description or ()]
            for row in cursor:
                yield row
                if time.monotonic() > deadline:
                    raise psycopg.errors.QueryCanceled("statement timeout")


def _connected(parameters: MutableMapping[str, Any]) -> psycopg.Connection[Any]:
    try:
        return psycopg.connect(**parameters)
    except psycopg.OperationalError as error:
        raise ServiceError(
            reason=f"The database cannot be reached: {str(error).strip()}"
        ) from error


@contextmanager
def _sentences(timeout_s: float) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, sqlite3.Warning, psycopg.Error) as error:
        detail = (str(error).strip() or repr(error)).splitlines()[0]
        hint = error.diag.message_hint if isinstance(error, psycopg.Error) else None
        sentence = _sentence(detail, timeout_s)
        raise UsageError(reason=f"{sentence} {hint}" if hint else sentence) from error


def _sentence(detail: str, timeout_s: float) -> str:
    if detail == "interrupted" or "statement timeout" in detail:
        return f"The query took longer than {timeout_s:g} s (--timeout-s)."
    if "unlogged" in detail:
        return (
            "A standby has no `leases`, and so no `run_progress`: `earmark status` counts a run's"
            " clips there, and so does the table `run_counts`."
        )
    if detail == "not authorized" or "read-only" in detail:
        return "A query may only read."
    return f"The query cannot be run: {detail}."
