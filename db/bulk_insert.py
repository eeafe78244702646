"""Inserts the clips of a list that a run does not have yet: thousands a second."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from operator import attrgetter, itemgetter
from typing import Any

import psycopg
import sqlalchemy as sa
from more_itertools import chunked
from sqlalchemy.exc import DBAPIError

from db.session import execute, writing
from earmark.core.clips import KEY_BYTES, Clip, Part, clip_key, display_uri
from earmark.core.spelling import storable

#: A clip as submitted: its key, its URI, its meta as JSON, its part of the file, whether another
#: row of this key may bring another URL. A plain tuple, since the garbage collector looks at any
#: other kind again and again.
Listed = tuple[bytes, str, str | None, Part | None, bool]
#: Once a transaction: a trigger would cost as much as the row.
ADD_TO_COUNT = """
INSERT INTO run_counts AS n (run_id, state, writer, clips, audio_s, finished_at)
VALUES (:run_id, 'pending', {writer}, :clips, 0, 0)
ON CONFLICT (run_id, state, writer) DO UPDATE SET clips = n.clips + excluded.clips
"""
#: The positions of the rows that a run does not have, or has with another meta than a given one.
#: The keys are one string of bytes: a list of keys would take longer to send than to look up. The
#: run's id is hidden from PostgreSQL's planner, and keys are looked up one by one, since its
#: statistics are older than the run: it would read the whole table for a join, or all clips of the
#: run for each key.
SELECT_UNLIKE = """
WITH compared AS MATERIALIZED (
    SELECT i, meta, (
        SELECT coalesce(meta, {no_meta}) FROM clips
        WHERE run_id = (SELECT :run_id) AND uri_key = substr(:keys, i * :size + 1, :size)
    ) AS stored
    FROM {metas}
)
SELECT i FROM compared WHERE stored IS NULL OR stored <> meta ORDER BY i
"""
_COLUMNS = "state, run_id, uri_key, uri, meta, display_uri"
_PART_COLUMNS = ", ".join(Part.__slots__)
_SKIP_KNOWN = "ON CONFLICT (run_id, uri_key) DO NOTHING"
#: For SQLite, followed by its rows. So many rows a statement are a third faster than one by one,
#: and every build of SQLite allows so many parameters.
_ROWS_AT_ONCE = 100
INSERT_VALUES = f"INSERT INTO clips ({_COLUMNS}) VALUES {{rows}} {_SKIP_KNOWN}"  # noqa: S608
_VALUES_ROW = "('pending', ?, ?, ?, ?, ?)"
INSERT_PARTS = INSERT_VALUES.replace(_COLUMNS, f"{_COLUMNS}, {_PART_COLUMNS}")
_PARTS_ROW = "('pending', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_WHOLE = Part()
_values_of = attrgetter(*Part.__slots__)
#: For PostgreSQL: a third cheaper than INSERT, but has no ON CONFLICT.
COPY_CLIPS = f"COPY clips ({_COLUMNS}, {_PART_COLUMNS}) FROM STDIN"
_encode = json.JSONEncoder(default=str).encode
#: Held until the transaction ends, which works behind a transaction pooler too.
LOCK_RUN = "SELECT pg_advisory_xact_lock(hashtext('earmark submit'), :run_id)"
SHARE_RUN = "SELECT pg_advisory_xact_lock_shared(hashtext('earmark submit'), :run_id)"


def listed(clip: Clip) -> Listed:
    """Return the values of a clip that are written when it is submitted."""
    meta = _json(clip.meta) if clip.meta else None
    renews_url = clip.key is not None or "?" in clip.uri
    return clip_key(clip), clip.uri, meta, clip.part, renews_url


def add(engine: sa.Engine, added: Mapping[int, list[Listed]]) -> dict[int, int]:
    """Add rows to each run as `pending` clips, except those it has; return how many were new.

    Rows sorted by their key write each page of the index only once.
    """
    counts = dict.fromkeys(added, 0)
    if any(added.values()):
        with writing(engine) as connection:
            for run_id in sorted(added):
                counts[run_id] = _insert(connection, run_id, added[run_id])
    return counts


def _insert(connection: sa.Connection, run_id: int, rows: list[Listed]) -> int:
    # By the driver itself: SQLAlchemy would look at every parameter of every row.
    if connection.dialect.name == "sqlite":
        counting = connection.execution_options(preserve_rowcount=True)
        added = 0
        for group in chunked(rows, _ROWS_AT_ONCE):
            added += _insert_values(counting, run_id, group)
    else:
        _take_turn(connection, run_id, rows)
        added = _copy(connection, run_id, rows)
    execute(connection, ADD_TO_COUNT, run_id=run_id, clips=added)
    return added


def unlike(
    connection: sa.Connection, run_id: int, rows: list[Listed], metas: list[str | None]
) -> list[Listed]:
    """Return the rows that a run does not have yet, or has with another meta than the given one."""
    keys = b"".join(map(itemgetter(0), rows))
    values = {"run_id": run_id, "keys": keys, "size": KEY_BYTES, "metas": metas}
    positions = execute(connection, SELECT_UNLIKE, **values).scalars()
    return [rows[position] for position in positions]


def _insert_values(connection: sa.Connection, run_id: int, rows: list[Listed]) -> int:
    parts = any(row[3] for row in rows)
    values: list[Any] = []
    for key, uri, meta, part, _ in rows:
        values += (run_id, key, uri, meta, _shown(uri))
        if parts:
            values += _values_of(part or _WHOLE)
    insert, row = (INSERT_PARTS, _PARTS_ROW) if parts else (INSERT_VALUES, _VALUES_ROW)
    statement = insert.format(rows=", ".join([row] * len(rows)))
    return connection.exec_driver_sql(statement, tuple(values)).rowcount


def _take_turn(connection: sa.Connection, run_id: int, rows: list[Listed]) -> None:
    """Wait until no other submission to the run can deadlock with this one.

    Submissions wait for each other's keys. They share the run while all insert in the order of the
    keys. One that inserts in the list's order needs the run to itself.
    """
    in_order = all(before[0] <= after[0] for before, after in pairwise(rows))
    execute(connection, SHARE_RUN if in_order else LOCK_RUN, run_id=run_id)


def _copy(connection: sa.Connection, run_id: int, rows: list[Listed]) -> int:
    missing = unlike(connection, run_id, rows, [None] * len(rows))
    # The first row of a clip counts.
    new = list({row[0]: row for row in reversed(missing)}.values())[::-1]
    driver: Any = connection.connection
    try:
        with connection.begin_nested(), driver.cursor() as cursor, cursor.copy(COPY_CLIPS) as copy:
            for key, uri, meta, part, _ in new:
                values = (rf"\x{key.hex()}", uri, meta, _shown(uri), *_values_of(part or _WHOLE))
                copy.write_row(("pending", run_id, *values))
        return len(new)
    except psycopg.errors.UniqueViolation:
        # Another submission to the run has just added some of them.
        return _copy(connection, run_id, rows)
    except psycopg.Error as error:
        raise DBAPIError(COPY_CLIPS, None, error) from error


def _shown(uri: str) -> str | None:
    shown = display_uri(uri)
    return shown if shown != uri else None


def _json(meta: Mapping[str, Any]) -> str:
    text = _encode(meta)
    if "\\u" in text or "NaN" in text or "Infinity" in text:
        return _encode(_storable(meta))
    return text


def _storable(value: Any) -> Any:
    # Databases refuse NaN and the infinities in JSON.
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, dict):
        return {_storable(str(name)): _storable(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
