"""What a database permits: standbys and read-only files are only read; a role needs grants."""

from __future__ import annotations

from collections.abc import MutableMapping
from weakref import WeakKeyDictionary

import sqlalchemy as sa

from db import sqlite_file, urls
from db.session import reading
from earmark.core.errors import ServiceError

#: In place of `leases` on a standby: the table is UNLOGGED, and PostgreSQL does not send it there.
NO_LEASES = (
    "leases AS (SELECT CAST(NULL AS bigint) AS token, CAST(NULL AS integer) AS run_id WHERE false)"
)
READ_ONLY = "current_setting('default_transaction_read_only') = 'on'"
MAY_CREATE = """
SELECT quote_ident(current_user), quote_ident(current_schema()),
       has_schema_privilege(current_schema(), 'CREATE')
"""
_standby: MutableMapping[sa.Engine, bool] = WeakKeyDictionary()


def is_standby(engine: sa.Engine) -> bool:
    """Return whether this is a PostgreSQL that follows another; asked once an engine."""
    if engine.dialect.name == "sqlite":
        return False
    if engine not in _standby:
        with reading(engine) as connection:
            _standby[engine] = bool(connection.scalar(sa.text("SELECT pg_is_in_recovery()")))
    return _standby[engine]


def check_writable(engine: sa.Engine) -> None:
    """Raise ServiceError where a database can be read and not written."""
    where = urls.shown(engine.url)
    if engine.dialect.name == "sqlite":
        if sqlite_file.is_read_only(engine.url.database):
            raise ServiceError(reason=f"The database {where} may be read here, but not written.")
        return
    with reading(engine) as connection:
        standby, read_only = connection.execute(
            sa.text("SELECT pg_is_in_recovery(), " + READ_ONLY)
        ).one()
    if standby:
        raise ServiceError(
            reason=f"The database {where} is a standby, which can only be read: give the URL of its"
            " primary."
        )
    if read_only:
        raise ServiceError(
            reason=f"The database {where} can only be read now: default_transaction_read_only is"
            " on."
        )


def check_may_create(connection: sa.Connection) -> None:
    """Raise ServiceError where the role may not create tables in the schema that it uses."""
    if connection.dialect.name == "sqlite":
        return
    role, schema, may_create = connection.execute(sa.text(MAY_CREATE)).one()
    if schema is None:
        raise ServiceError(
            reason=f"The role {role} has no schema to use: `CREATE SCHEMA AUTHORIZATION {role}`"
            " makes it one."
        )
    if not may_create:
        raise ServiceError(
            reason=f"The role {role} may not create tables in the schema {schema}: have the"
            f" database's owner run `GRANT CREATE ON SCHEMA {schema} TO {role}`, or `CREATE SCHEMA"
            f" AUTHORIZATION {role}` for one of its own."
        )
