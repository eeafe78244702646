"""A database URL in, an engine out: SQLite pragmas, PostgreSQL pool, clear sentences when it is out of reach."""

from __future__ import annotations

import json
import math
import sqlite3
import time
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from db import sqlite_file, urls
from earmark.errors import DatabaseError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.sql.compiler import SQLCompiler

    from earmark.settings import Database

NOW_POSTGRESQL = "extract(epoch from clock_timestamp())::double precision"
NOW_SQLITE = "((julianday('now') - 2440587.5) * 86400.0)"

#: What plain SQL spells differently; `list` are the numbers bound as `:ids`, one in each row's `value`, `numbers` those
#: below `:count`, `writer` whose part of a count a connection adds to, `fresh` clips behind `:after` that were never
#: begun: PostgreSQL keeps to the feeder's index for a pair only, and of a pair SQLite uses but the first half.
SPELLED = {
    "sqlite": {
        "now": NOW_SQLITE,
        "list": "json_each(:ids)",
        "lock": "",
        "writer": "0",
        "fresh": "not_before = 0 AND id > :after",
        "numbers": "(WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n LIMIT :count) SELECT i FROM n)",
    },
    "postgresql": {
        "now": NOW_POSTGRESQL,
        "list": "unnest(CAST(:ids AS bigint[])) AS listed(value)",
        "lock": "FOR UPDATE",
        "writer": "pg_backend_pid()",
        "fresh": "(not_before, id) > (0, :after) AND not_before <= 0",
        "numbers": "generate_series(0, :count - 1) AS n(i)",
    },
}

ANOTHER_FILE = "Name a file that can be written with --db, or a folder with EARMARK_DATA_DIR."
#: A connection used so lately is not asked whether it is alive: that costs as much as a small query.
FRESH_S = 1.0
#: How a connection is told that each statement is a transaction of its own, which spares it BEGIN and ROLLBACK.
_ALONE: dict[str, dict[str, Any]] = {"sqlite": {"alone": True}, "postgresql": {"isolation_level": "AUTOCOMMIT"}}

# SQLite has no arrays: a list is written as JSON.
sqlite3.register_adapter(list, json.dumps)


class now(FunctionElement[float]):  # noqa: N801 - reads as the SQL function it is
    """The database's clock in seconds since 1970: leases must not depend on a worker's."""

    type = sa.Double()
    inherit_cache = True


@compiles(now, "postgresql")
def _now_postgresql(_element: now, _compiler: SQLCompiler, **_: Any) -> str:
    return NOW_POSTGRESQL


@compiles(now, "sqlite")
def _now_sqlite(_element: now, _compiler: SQLCompiler, **_: Any) -> str:
    return NOW_SQLITE


def connect(url: str, database: Database) -> sa.Engine:
    """Return an engine for a SQLite or PostgreSQL URL.

    Raises:
        ServiceError: the URL cannot be used.
    """
    parsed = urls.parse(url)
    if parsed.get_backend_name() == "sqlite":
        return _sqlite(parsed, database)
    return _postgresql(parsed, database)


def _sqlite(url: sa.URL, database: Database) -> sa.Engine:
    waiting = {"timeout": database.busy_timeout_s, "isolation_level": None}
    if sqlite_file.is_read_only(url.database):
        # Each connection looks anew whether somebody writes the file.
        engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args={**waiting, "uri": True})
        sa.event.listen(engine, "do_connect", partial(_open_read_only, Path(str(url.database))))
    else:
        engine = sa.create_engine(url, pool_size=database.pool_size, connect_args=waiting)
        sa.event.listen(engine, "do_connect", partial(_make_folder, Path(url.database or "")))
        sa.event.listen(engine, "connect", _set_pragmas)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _open_read_only(file: Path, _dialect: Any, _record: Any, arguments: list[Any], _: Any) -> None:
    arguments[:] = [sqlite_file.read_only_uri(file)]


def _make_folder(file: Path, *_: Any) -> None:
    # Not before, or looking into a database that is not there would leave a folder.
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseError(
            reason=f"The folder {file.parent} cannot be made for a database: {error.strerror}. {ANOTHER_FILE}"
        ) from error


def _set_pragmas(connection: Any, _record: Any) -> None:
    # A checkpoint holds up the transaction it falls on, and pages that change often are copied once for all of them.
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "wal_autocheckpoint=10000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    # A writer that starts as a reader can't be made to wait for its turn: it fails at once as "locked".
    if not options.get("alone"):
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("writing") else "BEGIN")


def _postgresql(url: sa.URL, database: Database) -> sa.Engine:
    waiting = {"connect_timeout": database.connect_timeout_s}
    engine = sa.create_engine(url, pool_size=database.pool_size, connect_args=waiting)
    sa.event.listen(engine, "checkin", _remember_when)
    sa.event.listen(engine, "checkout", partial(_ask_unless_fresh, engine.dialect))
    return engine


def _remember_when(_connection: Any, record: Any) -> None:
    record.info["back_at"] = time.monotonic()


def _ask_unless_fresh(dialect: sa.Dialect, connection: Any, record: Any, _proxy: Any) -> None:
    # As `pool_pre_ping` does, which asks each time.
    if time.monotonic() - record.info.get("back_at", math.inf) < FRESH_S:
        return
    try:
        dialect.do_ping(connection)
    except dialect.loaded_dbapi.Error as error:
        raise sa.exc.InvalidatePoolError from error


def execute(connection: sa.Connection, statement: str, **values: Any) -> sa.CursorResult[*tuple[Any, ...]]:
    """Execute plain SQL with its words in braces spelled as this database has them."""
    return connection.execute(_spelled(statement, connection.dialect.name), values)


@cache
def _spelled(statement: str, dialect: str) -> sa.TextClause:
    # Prepared once: the hottest statements are these, and SQLAlchemy's own take longer to put together than to run.
    words = SPELLED[dialect]
    return sa.text(statement.format(**words, ids=f"(SELECT value FROM {words['list']})"))  # noqa: S608


def ask(engine: sa.Engine, statement: str, **values: Any) -> Any:
    """Return the first value of plain SQL's first row, None if there is no row; values are in braces.

    For what is asked once a clip: about half the processor time of `execute`. It is a transaction of its own.
    """
    with _in_reach(engine), engine.connect().execution_options(**_ALONE[engine.dialect.name]) as connection:
        found = connection.exec_driver_sql(_marked(statement, engine.dialect.name, tuple(values)), values).first()
        return found and found[0]


@cache
def _marked(statement: str, dialect: str, names: tuple[str, ...]) -> str:
    mark = ":{}" if dialect == "sqlite" else "%({})s"
    return statement.format(**{name: mark.format(name) for name in names})


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a transaction that takes its turn as a writer and commits at the end."""
    with _in_reach(engine), engine.connect().execution_options(writing=True) as connection, connection.begin():
        yield connection


@contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a connection that sees one consistent state and writes nothing."""
    with _in_reach(engine), engine.connect() as connection:
        yield connection


@contextmanager
def _in_reach(engine: sa.Engine) -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        raise _sentence(engine, error) from error
    except DBAPIError as error:
        # As such and not of a narrower kind: SQLite says that the file is not a database.
        if type(error) is sa.exc.DatabaseError or error.connection_invalidated:
            raise _sentence(engine, error) from error
        if "does not exist" in str(error.orig) or "no such table" in str(error.orig):
            raise _sentence(engine, error) from error
        raise


def _sentence(engine: sa.Engine, error: DBAPIError) -> DatabaseError:
    where = urls.shown(engine.url)
    detail = str(error.orig).strip().splitlines()[0] if error.orig else str(error)
    if "no such table" in detail or ("relation" in detail and "does not exist" in detail):
        return DatabaseError(
            reason=f"The database {where} lacks a table ({detail}): run `earmark db upgrade`, or"
            " begin a new database if this one is of an unreleased Earmark."
        )
    if "locked" in detail:
        return DatabaseError(reason=f"The database {where} is locked by another program: try again later.")
    if engine.dialect.name == "sqlite":
        return DatabaseError(reason=_file_sentence(where, detail))
    return DatabaseError(
        reason=f"The database {where} cannot be used: {detail}. Is it running, and is EARMARK_DATABASE__URL right?"
    )


def _file_sentence(file: str, detail: str) -> str:
    if "full" in detail:
        return f"The disk of the database {file} is full: make room."
    if "readonly" in detail:
        return f"The database {file} may be read here, but not written."
    if "unable to open" in detail:
        return f"The database file {file} cannot be opened. {ANOTHER_FILE}"
    return f"The database {file} cannot be used: {detail}."
