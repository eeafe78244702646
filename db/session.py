"""Engines and transactions: SQLite pragmas, the PostgreSQL pool, poolers and lost connections."""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from db import sqlite_file, urls
from db.database_errors import ANOTHER_FILE, connection_is_lost, in_a_sentence, sqlstate
from db.dialects import dialect_of, for_driver, prepared
from earmark.core.errors import DatabaseError
from earmark.core.settings import Database

logger = logging.getLogger(__name__)

#: A connection used so lately is not pinged: that costs as much as a small query.
FRESH_S = 1.0
#: SQLSTATEs of a pooler that hands one client's prepared statements to another.
PREPARED_ELSEWHERE = ("26000", "42P05")

# SQLite has no arrays: a list is written as JSON.
sqlite3.register_adapter(list, json.dumps)


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
            reason=f"The folder {file.parent} cannot be made for a database: {error.strerror}."
            f" {ANOTHER_FILE}"
        ) from error


def _set_pragmas(connection: Any, _record: Any) -> None:
    # A checkpoint holds up the transaction it falls on. A rare one copies a page that changes
    # often only once.
    for pragma in (
        "journal_mode=WAL",
        "synchronous=NORMAL",
        "foreign_keys=ON",
        "wal_autocheckpoint=10000",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    # A writer that starts as a reader cannot wait for its turn: it fails at once as "locked".
    if not options.get("alone"):
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("writing") else "BEGIN")


def _postgresql(url: sa.URL, database: Database) -> sa.Engine:
    waiting = {"connect_timeout": database.connect_timeout_s}
    engine = sa.create_engine(url, pool_size=database.pool_size, connect_args=waiting)
    statements = PreparedStatements()
    sa.event.listen(engine, "connect", statements.set_up)
    sa.event.listen(engine, "handle_error", statements.look_at)
    sa.event.listen(engine, "handle_error", _drop_connection)
    sa.event.listen(engine, "checkin", _remember_when)
    sa.event.listen(engine, "checkout", partial(_ask_unless_fresh, engine.dialect))
    return engine


class PreparedStatements:
    """Switches psycopg's prepared statements off behind a pooler that shares server connections.

    Their names are counted per client connection. On a shared server connection one client's name
    would run another client's statement.
    """

    def __init__(self) -> None:
        self._off = False

    def set_up(self, connection: Any, _record: Any) -> None:
        """Prepare nothing on a new connection through a pooler."""
        if self._off or behind_pooler(connection):
            connection.prepare_threshold = None

    def look_at(self, context: ExceptionContext) -> None:
        """Prepare nothing on later connections after an error that only a pooler causes."""
        if not self._off and sqlstate(context.original_exception) in PREPARED_ELSEWHERE:
            self._off = True
            logger.warning(
                "a pooler shares prepared statements among clients: they are switched off",
                extra={"action": "prepared_statements_off"},
            )


def behind_pooler(connection: Any) -> bool:
    """Say whether a psycopg connection goes through a pooler, which has process ids of its own."""
    connection.autocommit = True
    pid = connection.execute("SELECT pg_backend_pid()", prepare=False).fetchone()[0]
    connection.autocommit = False
    return bool(pid != connection.info.backend_pid)


def prepares(connection: sa.Connection) -> bool:
    """Say whether statements are prepared on a PostgreSQL connection."""
    driver: Any = connection.connection.dbapi_connection
    return driver.prepare_threshold is not None


def _drop_connection(context: ExceptionContext) -> None:
    # SQLAlchemy then replaces this connection and every older one of the pool.
    if connection_is_lost(context.original_exception):
        context.is_disconnect = True


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
    """Execute plain SQL, spelled as this database has it."""
    return connection.execute(prepared(statement, dialect_of(connection)), values)


def fetch(engine: sa.Engine, statement: str | sa.Executable, **values: Any) -> Sequence[Any]:
    """Return the rows of one read, which all fit in memory; of plain SQL as in `execute`."""
    with reading(engine) as connection:
        if isinstance(statement, str):
            return execute(connection, statement, **values).all()
        return connection.execute(statement, values).all()


def fetch_column(engine: sa.Engine, statement: str | sa.Executable, **values: Any) -> list[Any]:
    """Return the first column of the rows of one read."""
    return [row[0] for row in fetch(engine, statement, **values)]


def ask(engine: sa.Engine, statement: str, values: dict[str, Any]) -> Any:
    """Return the rows of plain SQL.

    For what is asked once a clip: about half the processor time of `execute`. It is a transaction
    of its own.
    """
    dialect = dialect_of(engine)
    with (
        _in_reach(engine),
        engine.connect().execution_options(**dialect.autocommit) as connection,
    ):
        return connection.exec_driver_sql(for_driver(statement, dialect), values).all()


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
        raise in_a_sentence(engine, error) from error
    except SQLAlchemyError as error:
        # Not the driver's: no connection of the pool became free in time, or a transaction was
        # lost with its server.
        raise DatabaseError(
            reason=f"The database {urls.shown(engine.url)} cannot be used: {error}"
        ) from error
