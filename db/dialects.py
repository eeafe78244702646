"""SQL that SQLite and PostgreSQL spell differently: one `Dialect` for each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

#: A parameter as statements write it. A cast of PostgreSQL has two colons.
PARAMETER = re.compile(r"(?<!:):(\w+)")


def _each_row(rows: list[dict[str, Any]]) -> Any:
    return rows


def _one_document(rows: list[dict[str, Any]]) -> Any:
    return (json.dumps(rows, default=_hex),)


def _hex(digest: bytes) -> str:
    return rf"\x{digest.hex()}"


# Equal only to itself, since it is a key of the caches below.
@dataclass(frozen=True, eq=False, kw_only=True)
class Dialect:
    """How one database spells what SQL leaves open. Use it by writing `{field}` in a statement."""

    #: As SQLAlchemy calls the database.
    name: str
    #: The clock, in seconds since 1970.
    now: str
    #: A table of the numbers bound as `:ids`, in the column `value`.
    id_rows: str
    #: The same numbers after IN.
    ids: str
    #: The numbers below `:count`, in the column `i`.
    numbers: str
    #: The texts bound as `:metas`, in the column `meta`, with their positions in the column `i`.
    metas: str
    #: The meta of a clip that has none, to compare with.
    no_meta: str
    #: Locks the rows of a SELECT. SQLite has one writer at a time.
    lock: str
    #: Compares NULL as a value.
    same: str
    #: Has a run's clips read in the order of their rows. SQLite would take them by label, and read
    #: ten million rows in no order at all.
    in_run_order: str
    #: The part of a count that this connection adds to.
    writer: str
    #: Clips behind `:after` that were never begun. PostgreSQL keeps to the feeder's index for a
    #: pair only, and SQLite uses only the first half of a pair.
    fresh: str

    #: A named parameter of the driver, as a replacement for `PARAMETER`.
    parameter: str
    #: Execution options that make each statement its own transaction, without BEGIN and ROLLBACK.
    autocommit: dict[str, Any]
    #: INSERT of SQLAlchemy that knows ON CONFLICT.
    insert: Callable[..., Any]

    #: Rows to write, as the driver takes them. SQLite is fastest with one statement a row.
    #: PostgreSQL gets one JSON document: several times as fast, and triggers run once.
    pack: Callable[[list[dict[str, Any]]], Any]
    #: A value of such a row: what stands before the name of its column.
    value: str
    #: Which clips an UPDATE with such rows changes.
    matching_clips: str
    #: The clips with the ids of such rows, for an INSERT.
    copied_clips: str
    #: The source of an INSERT of such rows into `window_predictions`.
    window_rows: str
    #: The source of an INSERT of such rows into `window_embeddings`.
    embedding_rows: str

    #: Seconds since 1970 as a timestamp.
    timestamp: str
    #: Bytes as hexadecimal digits.
    hexadecimal: str
    #: A text as JSON.
    json: str
    #: The labels and scores of a row, one row each, as `p`.
    each_label: str
    #: Of these: the rank, and the score.
    rank: str
    score: str
    #: The host of `uri`, empty for a path.
    host: str


SQLITE = Dialect(
    name="sqlite",
    now="((julianday('now') - 2440587.5) * 86400.0)",
    id_rows="json_each(:ids)",
    ids="(SELECT value FROM json_each(:ids))",
    numbers=(
        "(WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n LIMIT :count)"
        " SELECT i FROM n)"
    ),
    metas="(SELECT key AS i, value AS meta FROM json_each(:metas)) AS listed",
    no_meta="''",
    lock="",
    same="IS",
    in_run_order="INDEXED BY clips_run",
    writer="0",
    fresh="not_before = 0 AND id > :after",
    parameter=r":\1",
    autocommit={"alone": True},
    insert=sqlite.insert,
    pack=_each_row,
    value=":",
    matching_clips="WHERE id = :id",
    copied_clips="FROM clips WHERE id = :id",
    window_rows="VALUES (:clip_id, :start_s, :end_s, :label_ids, :scores, :channel)",
    embedding_rows="VALUES (:clip_id, :number, :vector)",
    timestamp="datetime({}, 'unixepoch')",
    hexadecimal="lower(hex({}))",
    json="{}",
    each_label="json_each({}.label_ids) p",
    rank="p.key + 1",
    score="{}.scores ->> p.key",
    host=(
        "CASE instr(uri, '://') WHEN 0 THEN '' ELSE substr(uri, instr(uri, '://') + 3,"
        " instr(substr(uri, instr(uri, '://') + 3) || '/', '/') - 1) END"
    ),
)
POSTGRESQL = Dialect(
    name="postgresql",
    now="extract(epoch from clock_timestamp())::double precision",
    id_rows="unnest(CAST(:ids AS bigint[])) AS listed(value)",
    ids="(SELECT value FROM unnest(CAST(:ids AS bigint[])) AS listed(value))",
    numbers="generate_series(0, :count - 1) AS n(i)",
    metas=(
        "(SELECT CAST(number AS integer) - 1 AS i, CAST(meta AS jsonb) AS meta"
        " FROM unnest(CAST(:metas AS text[])) WITH ORDINALITY AS each(meta, number)) AS listed"
    ),
    no_meta="'null'",
    lock="FOR UPDATE",
    same="IS NOT DISTINCT FROM",
    in_run_order="",
    writer="pg_backend_pid()",
    fresh="(not_before, id) > (0, :after) AND not_before <= 0",
    parameter=r"%(\1)s",
    autocommit={"isolation_level": "AUTOCOMMIT"},
    insert=postgresql.insert,
    pack=_one_document,
    value="outcome.",
    matching_clips=(
        "FROM json_populate_recordset(NULL::clips, %s) AS outcome WHERE clips.id = outcome.id"
    ),
    copied_clips=(
        "FROM clips JOIN json_populate_recordset(NULL::clips, %s) AS outcome"
        " ON clips.id = outcome.id"
    ),
    window_rows="SELECT * FROM json_populate_recordset(NULL::window_predictions, %s)",
    embedding_rows="SELECT * FROM json_populate_recordset(NULL::window_embeddings, %s)",
    timestamp="to_timestamp({})",
    hexadecimal="encode({}, 'hex')",
    json="CAST({} AS jsonb)",
    each_label="unnest({}.label_ids, {}.scores) WITH ORDINALITY AS p(value, score, key)",
    rank="p.key",
    score="p.score",
    host="split_part(split_part(uri, '://', 2), '/', 1)",
)
DIALECTS = {"sqlite": SQLITE, "postgresql": POSTGRESQL}


def dialect_of(database: sa.Engine | sa.Connection) -> Dialect:
    """Return the dialect of a database."""
    return DIALECTS[database.dialect.name]


class _Field(str):
    """A field of a dialect, whose empty braces are filled with what stands behind its name."""

    __slots__ = ()

    def __format__(self, filling: str) -> str:
        return self.replace("{}", filling)


@cache
def spelled(statement: str, dialect: Dialect) -> str:
    """Return a statement with the dialect's fields in place of their names in braces.

    `{timestamp:c.at}` is the field `timestamp` with `c.at` in its own braces.
    """
    return statement.format_map({name: _Field(field) for name, field in vars(dialect).items()})


@cache
def prepared(statement: str, dialect: Dialect) -> sa.TextClause:
    """Return a spelled statement for SQLAlchemy: kept, since the hottest statements are these."""
    return sa.text(spelled(statement, dialect))


@cache
def for_driver(statement: str, dialect: Dialect) -> str:
    """Return a spelled statement with the parameters as the driver names them."""
    return PARAMETER.sub(dialect.parameter, spelled(statement, dialect))


class now(FunctionElement[float]):  # noqa: N801 - reads as the SQL function it is
    """The database's clock in seconds since 1970: leases must not depend on a worker's."""

    type = sa.Double()
    inherit_cache = True


@compiles(now)
def _now(_element: now, compiler: SQLCompiler, **_: Any) -> str:
    return DIALECTS[compiler.dialect.name].now
