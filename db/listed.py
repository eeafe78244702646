"""Clips of a list in; new rows of `clips` out, in one statement."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from earmark.clips import display_uri, uri_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    import sqlalchemy as sa

    from earmark.clips import Clip

#: A clip as it is submitted: the key of its URI, the URI, and its meta as JSON.
Listed = tuple[bytes, str, str | None]

_INSERT = "INSERT INTO clips (run_id, uri_key, uri, meta, display_uri, state)"
#: Once a transaction; PostgreSQL's trigger runs no more often.
_COUNT = (
    "INSERT INTO run_counts (run_id, state, writer, clips, audio_s, finished_at) VALUES (?, 'pending', 0, ?, 0, 0)"
    " ON CONFLICT DO UPDATE SET clips = clips + excluded.clips"
)
#: Rows a statement on SQLite: a third faster than one by one, and every build allows so many parameters.
_ROWS_AT_ONCE = 100
#: In binary, since keys written as text cost 40 microseconds each.
_POSTGRESQL = (
    f"{_INSERT} SELECT %s, listed.*, 'pending' "  # noqa: S608 - our own words
    "FROM unnest(%b::bytea[], %b::text[], %s::jsonb[], %b::text[]) AS listed ON CONFLICT DO NOTHING"
)


def listed(clip: Clip) -> Listed:
    """Return what of a clip is written when it is submitted."""
    return uri_key(clip.uri), clip.uri, _json(clip.meta) if clip.meta else None


def insert(connection: sa.Connection, run_id: int, rows: list[Listed]) -> int:
    """Insert the rows a run has not yet; return how many those were."""
    # The driver itself: SQLAlchemy would look at every parameter of every row.
    counting = connection.execution_options(preserve_rowcount=True)
    if connection.dialect.name == "sqlite":
        added = sum(_insert_some(counting, run_id, rows[at : at + _ROWS_AT_ONCE]) for at in _starts(rows))
        connection.exec_driver_sql(_COUNT, (run_id, added))
        return added
    keys, uris, metas = (list(column) for column in zip(*rows, strict=True))
    shown = [_shown(uri) for uri in uris]
    return counting.exec_driver_sql(_POSTGRESQL, (run_id, keys, uris, metas, shown)).rowcount


def known_keys(connection: sa.Connection, run_id: int, rows: list[Listed]) -> set[bytes]:
    """Return which of the rows' keys a run has already."""
    find = "SELECT uri_key FROM clips WHERE run_id = "
    keys = [row[0] for row in rows]
    if connection.dialect.name == "postgresql":
        found = connection.exec_driver_sql(f"{find} %s AND uri_key = ANY(%b::bytea[])", (run_id, keys))
        return {bytes(row[0]) for row in found}
    known: set[bytes] = set()
    for at in _starts(rows):
        some = keys[at : at + _ROWS_AT_ONCE]
        marks = ", ".join("?" * len(some))
        found = connection.exec_driver_sql(f"{find} ? AND uri_key IN ({marks})", (run_id, *some))
        known.update(found.scalars().all())
    return known


def _starts(rows: list[Listed]) -> range:
    return range(0, len(rows), _ROWS_AT_ONCE)


def _insert_some(connection: sa.Connection, run_id: int, rows: list[Listed]) -> int:
    marks = ", ".join(["(?, ?, ?, ?, ?, 'pending')"] * len(rows))
    values = [value for key, uri, meta in rows for value in (run_id, key, uri, meta, _shown(uri))]
    return connection.exec_driver_sql(f"{_INSERT} VALUES {marks} ON CONFLICT DO NOTHING", tuple(values)).rowcount


def _shown(uri: str) -> str | None:
    shown = display_uri(uri)
    return shown if shown != uri else None


def _json(meta: Mapping[str, Any]) -> str:
    text = json.dumps(meta, default=str)
    if "\\u" in text or "NaN" in text or "Infinity" in text:
        return json.dumps(_storable(meta), default=str)
    return text


def _storable(value: Any) -> Any:
    # What Python's JSON has and a database's has not: NUL, half a surrogate pair, numbers that are none.
    if isinstance(value, str):
        return value.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_storable(str(name)): _storable(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(inner) for inner in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
