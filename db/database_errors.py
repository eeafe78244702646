"""Errors of the database drivers: which mean a lost connection, and the sentence for each."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from db import urls
from earmark.core.errors import DatabaseError

ANOTHER_FILE = "Name a file that can be written with --db, or a folder with EARMARK_DATA_DIR."
#: SQLSTATEs, or their first characters, after which PostgreSQL connections are replaced: connection
#: lost (08), transaction state, such as read-only after a failover (25), prepared statement unknown
#: (26000) or known already (42P05), its result type changed (0A000), no resources (53), server
#: stopped or failing over (57P).
DROPPED = ("08", "25", "26000", "42P05", "0A000", "53", "57P")
READ_ONLY = "25006"
NO_PRIVILEGE = "42501"
NO_TABLE = "42P01"
#: SQLSTATE classes of a wrong statement or value: data, integrity, syntax and names.
STATEMENT_WRONG = ("22", "23", "42")


def sqlstate(error: BaseException | None) -> str:
    """Return PostgreSQL's code of an error, empty where it has none."""
    return getattr(error, "sqlstate", None) or ""


def connection_is_lost(error: BaseException) -> bool:
    """Say whether a PostgreSQL connection is of no use after an error."""
    # An error without a state is the driver's own: of a lost connection, or of an answer that it
    # did not expect.
    state = sqlstate(error)
    return not state or state.startswith(DROPPED)


def in_a_sentence(engine: sa.Engine, error: DBAPIError) -> DatabaseError:
    """Return an error of the driver as one sentence with its cure."""
    where, detail = urls.shown(engine.url), _first_line(error.orig)
    if sentence := _well_known(detail, sqlstate(error.orig)):
        return DatabaseError(reason=f"The database {where} {sentence}")
    if _statement_is_wrong(error):
        return DatabaseError(
            reason=f"The database {where} refuses a statement of Earmark: {detail}. This is a bug"
            " in Earmark, or the tables are not as it made them: please report it.",
            bug=True,
        )
    if engine.dialect.name == "sqlite":
        return DatabaseError(reason=_file_sentence(where, detail))
    return DatabaseError(
        reason=f"The database {where} cannot be used: {detail}. Is it running, and is"
        " EARMARK_DATABASE__URL right?"
    )


def _first_line(error: BaseException | None) -> str:
    text = str(error).strip() or repr(error)
    return text.splitlines()[0]


def _well_known(detail: str, state: str) -> str | None:
    if "no such table" in detail or state == NO_TABLE:
        return (
            f"lacks a table ({detail}): run `earmark db upgrade`, or begin a new database if this"
            " one is of an unreleased Earmark."
        )
    if "locked" in detail:
        return "is locked by another program: try again later."
    if "statement pooling mode" in detail:
        return (
            f"is behind a pooler that gives each statement a connection ({detail}): set pool_mode"
            " to transaction or session."
        )
    if state == READ_ONLY:
        return (
            f"is read-only ({detail}): it is a standby, or a failover is under way."
            " EARMARK_DATABASE__URL must lead to the primary."
        )
    if state == NO_PRIVILEGE:
        return f"refuses its role: {detail}. GRANT it that, or make it the tables' owner."
    return None


def _statement_is_wrong(error: DBAPIError) -> bool:
    if error.connection_invalidated:
        return False
    if state := sqlstate(error.orig):
        return state.startswith(STATEMENT_WRONG)
    # SQLite's general error: a wrong name or syntax. Full, locked and broken files have their own.
    if getattr(error.orig, "sqlite_errorname", "") == "SQLITE_ERROR":
        return True
    return isinstance(error, (sa.exc.ProgrammingError, sa.exc.IntegrityError, sa.exc.DataError))


def _file_sentence(file: str, detail: str) -> str:
    if "full" in detail:
        return f"The disk of the database {file} is full: make room."
    if "readonly" in detail:
        return f"The database {file} may be read here, but not written."
    if "unable to open" in detail:
        return f"The database file {file} cannot be opened. {ANOTHER_FILE}"
    return f"The database {file} cannot be used: {detail}."
