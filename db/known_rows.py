"""Rows of a list whose clips a run has already: other columns, fresh URLs, changed files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import sqlalchemy as sa

from db import bulk_insert, changes
from db.bulk_insert import Listed
from db.models import Clip
from db.rows import parsed
from db.session import execute, reading, writing
from earmark.core.clips import KEY_BYTES, State

#: The keys are looked up one by one, for the same reason as in `bulk_insert.SELECT_UNLIKE`.
SELECT_IDS = """
SELECT (
    SELECT id FROM clips
    WHERE run_id = (SELECT :run_id) AND uri_key = substr(:keys, i * :size + 1, :size)
)
FROM {numbers} ORDER BY i
"""
SELECT_STORED = """
SELECT id, state, uri, meta, bytes, finished_at FROM clips WHERE id IN {ids}
"""
ENDED = (State.done, State.failed)
#: Locked in the order in which workers lock them.
LOCK_CLIPS = "SELECT id FROM clips WHERE id IN {ids} ORDER BY id {lock}"


@dataclass(slots=True)
class KnownRows:
    """Counts of rows whose clips a run has already."""

    #: Rows that say something else of a clip than the first row did, which stays.
    other_columns: int = 0
    #: Clips without a result that have a new URL now.
    fresh_urls: int = 0
    #: Local files that have changed since they were classified.
    changed_files: int = 0

    def add(self, other: KnownRows) -> None:
        self.other_columns += other.other_columns
        self.fresh_urls += other.fresh_urls
        self.changed_files += other.changed_files


def unlike(engine: sa.Engine, run_id: int, rows: list[Listed]) -> tuple[list[Listed], list[Listed]]:
    """Return the rows that are not as a run has them already, and those to compare with it.

    To look costs a fraction of a failed insert.
    """
    with reading(engine) as connection:
        found = bulk_insert.unlike(connection, run_id, rows, [row[2] for row in rows])
    keys = {row[0] for row in found}
    return found, [row for row in rows if row[0] in keys or _may_change(row)]


def settle(
    engine: sa.Engine, run_id: int, rows: Iterable[Listed], *, again: bool = False
) -> KnownRows:
    """Compare rows with the clips that they are, and return how they differ.

    Clips without a result take the rows' URLs, since a signature ends.

    Args:
        again: put clips whose local file has changed back to work.
    """
    compared = [row for row in rows if row[2] is not None or _may_change(row)]
    differing = KnownRows()
    urls: dict[int, str] = {}
    changed: set[int] = set()
    for (_, uri, meta, _, renews_url), clip in _known(engine, run_id, compared):
        clip_id, state, stored_uri, stored_meta, size, finished_at = clip
        if meta != stored_meta and not _same_meta(meta, stored_meta):
            differing.other_columns += 1
        if renews_url and uri != stored_uri and state != State.done:
            urls[clip_id] = uri
        if uri[0] == "/" and state in ENDED and _changed(uri, size, finished_at):
            changed.add(clip_id)
    if urls:
        _renew_urls(engine, urls)
    if again and changed:
        changes.redo(engine, sorted(changed))
    differing.fresh_urls, differing.changed_files = len(urls), len(changed)
    return differing


def _may_change(row: Listed) -> bool:
    """Return whether a row's URL may be signed anew, or its file may have changed."""
    return row[4] or row[1].startswith("/")


def _known(
    engine: sa.Engine, run_id: int, rows: list[Listed]
) -> Iterator[tuple[Listed, Sequence[Any]]]:
    """Yield those of the rows whose clips the run has, with these clips."""
    if not rows:
        return
    keys = b"".join(map(itemgetter(0), rows))
    values = {"run_id": run_id, "keys": keys, "size": KEY_BYTES, "count": len(rows)}
    with reading(engine) as connection:
        ids = execute(connection, SELECT_IDS, **values).scalars().all()
        stored = execute(connection, SELECT_STORED, ids=list(filter(None, ids))).all()
    clips = {clip[0]: clip for clip in stored}
    for clip_id, row in zip(ids, rows, strict=True):
        if clip_id is not None:
            yield row, clips[clip_id]


def _same_meta(listed: str | None, stored: Any) -> bool:
    if listed is None or stored is None:
        return listed is stored
    return bool(json.loads(listed) == parsed(stored))


def _changed(path: str, size: int | None, finished_at: float) -> bool:
    """Return whether a file is another than when its clip ended."""
    try:
        now = os.stat(path)  # noqa: PTH116 - a path of another machine may be anything
    except (OSError, ValueError):
        return False
    # Not the time of modification: a copy may keep that of its original.
    return now.st_ctime > finished_at or size not in (None, now.st_size)


def _renew_urls(engine: sa.Engine, urls: dict[int, str]) -> None:
    renewed = sa.update(Clip).where(Clip.id == sa.bindparam("clip_id"), Clip.state != State.done)
    with writing(engine) as connection:
        execute(connection, LOCK_CLIPS, ids=sorted(urls)).all()
        rows = [{"clip_id": clip_id, "fresh": uri} for clip_id, uri in urls.items()]
        connection.execute(renewed.values(uri=sa.bindparam("fresh")), rows)
