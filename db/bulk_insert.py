"""Clips of a list in; new rows of `clips` out, in one statement."""

from __future__ import annotations

import json
import math
import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import psycopg
from sqlalchemy.exc import DBAPIError

from db.session import execute
from earmark.core.clips import KEY_BYTES, display_uri, uri_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    import sqlalchemy as sa

    from earmark.core.clips import Clip

#: A clip as it is submitted: the key of its URI, the URI, and its meta as JSON.
Listed = tuple[bytes, str, str | None]

_INSERT = "INSERT INTO clips (run_id, uri_key, uri, meta, display_uri, state)"
#: Once a transaction: a trigger would cost as much as the row.
_COUNT = """
INSERT INTO run_counts AS n (run_id, state, writer, clips, audio_s, finished_at)
VALUES (:run_id, 'pending', {writer}, :clips, 0, 0)
ON CONFLICT (run_id, state, writer) DO UPDATE SET clips = n.clips + excluded.clips
"""
#: The places of the rows a run lacks. The keys come as one string of bytes: a list of them would take longer to send
#: than to look up, and nothing comes back of a list that is submitted again. Looked up one by one: to join a
#: table it has not counted yet, PostgreSQL would read all of it. And it must not see the run's id: of a run that came
#: after it had counted last it expects one clip, and would look through all of the run's for each.
_LACKING = """
SELECT i FROM {numbers}
WHERE (
    SELECT run_id FROM clips WHERE run_id = (SELECT :run_id) AND uri_key = substr(:keys, i * :size + 1, :size)
) IS NULL
ORDER BY i
"""
#: Rows a statement on SQLite: a third faster than one by one, and every build allows so many parameters.
_ROWS_AT_ONCE = 100
_KNOWN = "ON CONFLICT (run_id, uri_key) DO NOTHING"
#: A third cheaper than INSERT, but knows no ON CONFLICT.
_COPY = "COPY clips (run_id, uri_key, uri, meta, display_uri, state) FROM STDIN (FORMAT BINARY)"
_COPY_HEAD, _COPY_END = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
_COPY_NULL = b"\xff\xff\xff\xff"
#: What the first byte of a binary jsonb says.
_JSONB_VERSION = b"\1"
_length = struct.Struct("!i").pack
_encode = json.JSONEncoder(default=str).encode
#: Held until the transaction ends, which works behind a transaction pooler too.
_HAVE_RUN = "SELECT pg_advisory_xact_lock(hashtext('earmark submit'), :run_id)"
_SHARE_RUN = _HAVE_RUN.replace("lock(", "lock_shared(")
#: In binary, since keys written as text cost 40 microseconds each.
_POSTGRESQL = (
    f"{_INSERT} SELECT %s, listed.*, 'pending' "  # noqa: S608 - our own words
    f"FROM unnest(%b::bytea[], %b::text[], %b::text[]::jsonb[], %b::text[]) AS listed {_KNOWN}"
)


def listed(clip: Clip) -> Listed:
    """Return what of a clip is written when it is submitted."""
    return uri_key(clip.uri), clip.uri, _json(clip.meta) if clip.meta else None


def insert(connection: sa.Connection, run_id: int, rows: list[Listed]) -> int:
    """Insert the rows a run has not yet; return how many those were."""
    # The driver itself: SQLAlchemy would look at every parameter of every row.
    counting = connection.execution_options(preserve_rowcount=True)
    if connection.dialect.name == "sqlite":
        added = sum(
            _insert_some(counting, run_id, rows[at : at + _ROWS_AT_ONCE]) for at in _starts(rows)
        )
    else:
        _take_turn(connection, run_id, rows)
        added = _copy(counting, run_id, lacking(connection, run_id, rows))
    execute(connection, _COUNT, run_id=run_id, clips=added)
    return added


def lacking(connection: sa.Connection, run_id: int, rows: list[Listed]) -> list[Listed]:
    """Return the rows that a run has not yet."""
    values = {"keys": b"".join(row[0] for row in rows), "size": KEY_BYTES, "count": len(rows)}
    return [
        rows[at] for at in execute(connection, _LACKING, run_id=run_id, **values).scalars().all()
    ]


def _starts(rows: list[Listed]) -> range:
    return range(0, len(rows), _ROWS_AT_ONCE)


def _insert_some(connection: sa.Connection, run_id: int, rows: list[Listed]) -> int:
    marks = ", ".join(["(?, ?, ?, ?, ?, 'pending')"] * len(rows))
    values = [value for key, uri, meta in rows for value in (run_id, key, uri, meta, _shown(uri))]
    return connection.exec_driver_sql(f"{_INSERT} VALUES {marks} {_KNOWN}", tuple(values)).rowcount


def _take_turn(connection: sa.Connection, run_id: int, rows: list[Listed]) -> None:
    """Wait until no other submission to the run can deadlock with this one.

    Submissions wait for each other's keys. Where all insert in the order of the keys, none waits in a circle; one in
    the list's order needs the run to itself.
    """
    in_order = all(before[0] <= after[0] for before, after in pairwise(rows))
    execute(connection, _SHARE_RUN if in_order else _HAVE_RUN, run_id=run_id)


def _copy(connection: sa.Connection, run_id: int, rows: list[Listed]) -> int:
    new = list({row[0]: row for row in rows}.values())
    driver: Any = connection.connection
    try:
        with connection.begin_nested(), driver.cursor() as cursor, cursor.copy(_COPY) as copy:
            copy.write(_copied(run_id, new))
        return len(new)
    except psycopg.errors.UniqueViolation:
        # Another submits to the same run just now, and has added some of them.
        keys, uris, metas = (list(column) for column in zip(*new, strict=True))
        shown = [_shown(uri) for uri in uris]
        return connection.exec_driver_sql(_POSTGRESQL, (run_id, keys, uris, metas, shown)).rowcount
    except psycopg.Error as error:
        raise DBAPIError(_COPY, None, error) from error


def _copied(run_id: int, rows: list[Listed]) -> bytes:
    start = struct.pack("!hiii", 6, 4, run_id, KEY_BYTES)
    parts, pending = [_COPY_HEAD], _field("pending")
    for key, uri, meta in rows:
        parts += (
            start,
            key,
            _field(uri),
            _field(meta, _JSONB_VERSION),
            _field(_shown(uri)),
            pending,
        )
    return b"".join([*parts, _COPY_END])


def _field(text: str | None, before: bytes = b"") -> bytes:
    if text is None:
        return _COPY_NULL
    value = before + text.encode()
    return _length(len(value)) + value


def _shown(uri: str) -> str | None:
    shown = display_uri(uri)
    return shown if shown != uri else None


def _json(meta: Mapping[str, Any]) -> str:
    text = _encode(meta)
    if "\\u" in text or "NaN" in text or "Infinity" in text:
        return _encode(_storable(meta))
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
