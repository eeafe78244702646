"""A database URL in, an engine out: SQLite pragmas, PostgreSQL pool, clear sentences when it is out of reach."""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import time
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from db import sqlite_file, urls
from earmark.core.errors import DatabaseError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.sql.compiler import SQLCompiler

    from earmark.core.settings import Database

logger = logging.getLogger(__name__)

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
        "same": "IS",
        "writer": "0",
        "fresh": "not_before = 0 AND id > :after",
        "numbers": "(WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n LIMIT :count) SELECT i FROM n)",
    },
    "postgresql": {
        "now": NOW_POSTGRESQL,
        "list": "unnest(CAST(:ids AS bigint[])) AS listed(value)",
        "lock": "FOR UPDATE",
        "same": "IS NOT DISTINCT FROM",
        "writer": "pg_backend_pid()",
        "fresh": "(not_before, id) > (0, :after) AND not_before <= 0",
        "numbers": "generate_series(0, :count - 1) AS n(i)",
    },
}

ANOTHER_FILE = "Name a file that can be written with --db, or a folder with EARMARK_DATA_DIR."
#: A connection used so lately is not asked whether it is alive: that costs as much as a small query.
FRESH_S = 1.0
#: How a connection is told that each statement is a transaction of its own, which spares it BEGIN and ROLLBACK.
_ALONE: dict[str, dict[str, Any]] = {
    "sqlite": {"alone": True},
    "postgresql": {"isolation_level": "AUTOCOMMIT"},
}

#: SQLSTATEs, or their first characters, after which PostgreSQL connections are replaced: connection lost (08),
#: transaction state, such as read-only after a failover (25), prepared statement unknown (26000) or known
#: already (42P05), its result type changed (0A000), no resources (53), server stopped or failing over (57P).
DROPPED = ("08", "25", "26000", "42P05", "0A000", "53", "57P")
#: What a pooler says that hands one client's prepared statements to another.
PREPARED_ELSEWHERE = ("26000", "42P05")
READ_ONLY = "25006"
NO_PRIVILEGE = "42501"
NO_TABLE = "42P01"
#: SQLSTATE classes that mean that a statement or its values are wrong: data, integrity, syntax and names.
STATEMENT_WRONG = ("22", "23", "42")

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
    for pragma in (
        "journal_mode=WAL",
        "synchronous=NORMAL",
        "foreign_keys=ON",
        "wal_autocheckpoint=10000",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    # A writer that starts as a reader can't be made to wait for its turn: it fails at once as "locked".
    if not options.get("alone"):
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("writing") else "BEGIN")


def _postgresql(url: sa.URL, database: Database) -> sa.Engine:
    waiting = {"connect_timeout": database.connect_timeout_s}
    engine = sa.create_engine(url, pool_size=database.pool_size, connect_args=waiting)
    prepared = PreparedStatements()
    sa.event.listen(engine, "connect", prepared.set_up)
    sa.event.listen(engine, "handle_error", prepared.look_at)
    sa.event.listen(engine, "handle_error", _drop_connection)
    sa.event.listen(engine, "checkin", _remember_when)
    sa.event.listen(engine, "checkout", partial(_ask_unless_fresh, engine.dialect))
    return engine


class PreparedStatements:
    """Switches psycopg's prepared statements off where a pooler shares server connections among clients.

    Their names are counted per client connection. On a shared server connection one client's name would run
    another client's statement.
    """

    def __init__(self) -> None:
        self._off = False

    def set_up(self, connection: Any, _record: Any) -> None:
        """Prepare nothing on a new connection through a pooler."""
        if self._off or behind_pooler(connection):
            connection.prepare_threshold = None

    def look_at(self, context: ExceptionContext) -> None:
        """Prepare nothing on later connections after an error that only a pooler causes."""
        if not self._off and _sqlstate(context.original_exception) in PREPARED_ELSEWHERE:
            self._off = True
            logger.warning(
                "a pooler shares prepared statements among clients: they are switched off",
                extra={"action": "prepared_statements_off"},
            )


def behind_pooler(connection: Any) -> bool:
    """Say whether a psycopg connection goes through a pooler, which gives its clients process ids of its own."""
    connection.autocommit = True
    pid = connection.execute("SELECT pg_backend_pid()", prepare=False).fetchone()[0]
    connection.autocommit = False
    return bool(pid != connection.info.backend_pid)


def prepares(connection: sa.Connection) -> bool:
    """Say whether statements are prepared on a PostgreSQL connection."""
    driver: Any = connection.connection.dbapi_connection
    return driver.prepare_threshold is not None


def _drop_connection(context: ExceptionContext) -> None:
    # SQLAlchemy then replaces this connection and every older one of the pool, as after a lost server. An error
    # without a state is the driver's own: of a lost connection, or of an answer that it did not expect.
    state = _sqlstate(context.original_exception)
    if not state or state.startswith(DROPPED):
        context.is_disconnect = True


def _sqlstate(error: BaseException | None) -> str:
    return getattr(error, "sqlstate", None) or ""


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


def execute(
    connection: sa.Connection, statement: str, **values: Any
) -> sa.CursorResult[*tuple[Any, ...]]:
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
    with (
        _in_reach(engine),
        engine.connect().execution_options(**_ALONE[engine.dialect.name]) as connection,
    ):
        found = connection.exec_driver_sql(
            _marked(statement, engine.dialect.name, tuple(values)), values
        ).first()
        return found and found[0]


@cache
def _marked(statement: str, dialect: str, names: tuple[str, ...]) -> str:
    mark = ":{}" if dialect == "sqlite" else "%({})s"
    marks = {name: mark.format(name) for name in names}
    return statement.format(**marks, same=SPELLED[dialect]["same"])


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a transaction that takes its turn as a writer and commits at the end."""
    with (
        _in_reach(engine),
        engine.connect().execution_options(writing=True) as connection,
        connection.begin(),
    ):
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
    except DBAPIError as error:
        raise _sentence(engine, error) from error
    except SQLAlchemyError as error:
        # Not the driver's: no connection of the pool became free in time, or a transaction was lost with its server.
        raise DatabaseError(
            reason=f"The database {urls.shown(engine.url)} cannot be used: {error}"
        ) from error


def _sentence(engine: sa.Engine, error: DBAPIError) -> DatabaseError:
    where = urls.shown(engine.url)
    detail = (
        str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else repr(error.orig)
    )
    state = _sqlstate(error.orig)
    if "no such table" in detail or state == NO_TABLE:
        return DatabaseError(
            reason=f"The database {where} lacks a table ({detail}): run `earmark db upgrade`, or"
            " begin a new database if this one is of an unreleased Earmark."
        )
    if "locked" in detail:
        return DatabaseError(
            reason=f"The database {where} is locked by another program: try again later."
        )
    if "statement pooling mode" in detail:
        return DatabaseError(
            reason=f"The database {where} is behind a pooler that gives each statement a connection ({detail}): set"
            " pool_mode to transaction or session."
        )
    if state == READ_ONLY:
        return DatabaseError(
            reason=f"The database {where} is read-only ({detail}): it is a standby, or a failover is under way."
            " EARMARK_DATABASE__URL must lead to the primary."
        )
    if state == NO_PRIVILEGE:
        return DatabaseError(
            reason=f"The database {where} refuses its role: {detail}. GRANT it that, or make it the tables' owner."
        )
    if _statement_is_wrong(error):
        return DatabaseError(
            reason=f"The database {where} refuses a statement of Earmark: {detail}. This is a bug in Earmark, or the"
            " tables are not as it made them: please report it.",
            bug=True,
        )
    if engine.dialect.name == "sqlite":
        return DatabaseError(reason=_file_sentence(where, detail))
    return DatabaseError(
        reason=f"The database {where} cannot be used: {detail}. Is it running, and is EARMARK_DATABASE__URL right?"
    )


def _statement_is_wrong(error: DBAPIError) -> bool:
    if error.connection_invalidated:
        return False
    if state := _sqlstate(error.orig):
        return state.startswith(STATEMENT_WRONG)
    return isinstance(error, (sa.exc.ProgrammingError, sa.exc.IntegrityError, sa.exc.DataError))


def _file_sentence(file: str, detail: str) -> str:
    if "full" in detail:
        return f"The disk of the database {file} is full: make room."
    if "readonly" in detail:
        return f"The database {file} may be read here, but not written."
    if "unable to open" in detail:
        return f"The database file {file} cannot be opened. {ANOTHER_FILE}"
    return f"The database {file} cannot be used: {detail}."
