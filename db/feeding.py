"""Leases for the feeder: pick clips that are due, take back clips whose lease has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from db.dialects import now
from db.models import Lease, Run
from db.session import execute, fetch, fetch_column, writing
from earmark.core.options import CHUNK_SIZE
from earmark.core.settings import Ledger

#: Due at once, ahead of clips that were never begun. A worker's death is no try of the clip's own.
TAKE_BACK = """
UPDATE clips SET not_before = {now}, crashes = crashes + :crashes
WHERE state = 'pending' AND id IN {ids}
"""
#: The ids are one value: a fleet that dies leaves more leases than a statement has parameters.
DELETE_LEASES = "DELETE FROM leases WHERE clip_id IN {ids}"
INSERT_LEASES = """
INSERT INTO leases (clip_id, run_id, until)
SELECT value, :run_id, {now} + :lease_s FROM {id_rows}
WHERE true ON CONFLICT DO NOTHING RETURNING clip_id
"""
#: Held until the transaction ends. PostgreSQL keeps the plans it made while there were hardly any
#: leases, and they must not be sequential scans.
TRY_LOCK_QUEUE = """
SELECT pg_try_advisory_xact_lock(hashtext(:queue))
FROM set_config('enable_seqscan', 'off', true)
"""
SELECT_UNFINISHED_RUNS = """
SELECT id, name, chunk_size, priority, (SELECT id FROM ledger) AS ledger_id FROM runs
WHERE queue = :queue AND paused IS NULL
AND (SELECT paused FROM runs first WHERE first.id = runs.follows) IS NULL AND (
    SELECT sum(clips) FROM run_counts WHERE run_id = runs.id AND state = 'pending'
) > 0
ORDER BY id
"""
#: A run's clips that were begun before and whose time has come. The lease is looked up for each
#: clip, never joined: PostgreSQL would sort the joined rows.
DUE_AGAIN = """
SELECT id, coalesce(display_uri, uri) AS display_uri, crashes FROM clips
WHERE run_id = :run_id AND state = 'pending'
AND not_before > 0 AND not_before <= (SELECT {now})
AND (SELECT clip_id FROM leases WHERE clip_id = clips.id) IS NULL
ORDER BY not_before, id LIMIT :count
"""
#: A run's clips behind `:after` that no worker has had.
NEVER_BEGUN = """
SELECT id, coalesce(display_uri, uri) AS display_uri, crashes FROM clips
WHERE run_id = :run_id AND state = 'pending' AND {fresh}
AND (SELECT clip_id FROM leases WHERE clip_id = clips.id) IS NULL
ORDER BY not_before, id LIMIT :count
"""
#: For how long the oldest clip of each run that goes on has been due.
SELECT_OLDEST = """
SELECT {now} - CASE WHEN due > 0 THEN due ELSE created_at END AS due_s, paused FROM (
  SELECT created_at, paused, (
    SELECT min(not_before) FROM clips WHERE run_id = runs.id AND state = 'pending'
  ) AS due
  FROM runs WHERE queue = :queue
) AS begun
WHERE due IS NOT NULL
"""
#: Chunks of one ledger that wait in a queue, or have been lost from it.
COUNT_QUEUED_CHUNKS = """
SELECT coalesce(sum(1.0 / coalesce(nullif(runs.chunk_size, 0), :chunk_size)), 0)
FROM leases JOIN runs ON runs.id = leases.run_id
WHERE runs.queue = :queue AND leases.token IS NULL
"""
#: Read once a statement, so that an index can be used.
CLOCK = sa.select(now()).scalar_subquery()


@dataclass(frozen=True, slots=True)
class PickedClip:
    """A clip that has been leased to the queue and now has to be sent."""

    id: int
    display_uri: str
    crashes: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """The runs of a queue that are not at their end."""

    #: For how long the oldest clip of a run that goes on has been due.
    oldest_s: float
    paused_runs: int


@dataclass(frozen=True, slots=True)
class Picked:
    """The clips that the feeder took from one run."""

    ledger_id: str
    run_id: int
    run_name: str
    chunk_size: int
    clips: tuple[PickedClip, ...]


def take_back(engine: sa.Engine, queue: str) -> int:
    """Take back the clips whose lease has ended; return how many.

    A worker that let a lease end has died with the clip: that counts as a crash.
    """
    return _take_back(engine, queue, Lease.until < CLOCK)


def take_back_queued(engine: sa.Engine, queue: str, within_s: float) -> int:
    """Take back queued clips whose lease would end within so many seconds; return how many."""
    ends_soon = sa.and_(Lease.token.is_(None), Lease.until < CLOCK + within_s)
    return _take_back(engine, queue, ends_soon)


def queued_chunks(engine: sa.Engine, queue: str, chunk_size: int) -> int:
    """Return about how many chunks of this ledger are in a queue."""
    sizes = {"queue": queue, "chunk_size": chunk_size}
    return int(fetch_column(engine, COUNT_QUEUED_CHUNKS, **sizes)[0])


def waiting(engine: sa.Engine, queue: str) -> Waiting:
    """Return how long clips of a queue wait, and how many of its runs are paused."""
    runs = fetch(engine, SELECT_OLDEST, queue=queue)
    oldest_s = max((run.due_s for run in runs if run.paused is None), default=0.0)
    return Waiting(max(0.0, oldest_s), sum(run.paused is not None for run in runs))


def _take_back(engine: sa.Engine, queue: str, ended: sa.ColumnElement[bool]) -> int:
    runs = sa.select(Run.id).where(Run.queue == queue)
    leases = sa.select(Lease.clip_id, Lease.token).where(ended, Lease.run_id.in_(runs))
    # Most feeders find nothing, and on SQLite there is one writer.
    if not fetch(engine, leases.limit(1)):
        return 0
    locked = leases.order_by(Lease.clip_id).with_for_update(skip_locked=True)
    with writing(engine) as connection:
        rows = connection.execute(locked).all()
        queued, crashed = [], []
        for row in rows:
            if row.token is None:
                queued.append(row.clip_id)
            else:
                crashed.append(row.clip_id)
        execute(connection, DELETE_LEASES, ids=queued + crashed)
        taken = _make_due(connection, queued, crashes=0)
        return taken + _make_due(connection, crashed, crashes=1)


def _make_due(connection: sa.Connection, ids: list[int], *, crashes: int) -> int:
    if not ids:
        return 0
    return execute(connection, TAKE_BACK, ids=ids, crashes=crashes).rowcount


def pick(
    engine: sa.Engine,
    queue: str,
    chunks: int,
    limits: Ledger,
    after: dict[int, int] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> list[Picked]:
    """Lease clips that are due to the queue: about so many chunks, shared by the runs' priorities.

    On PostgreSQL, while another feeder picks for the same queue, there is nothing to pick.

    Args:
        after: by run, the last fresh clip picked before; kept up to date. Without it a statement
            would walk over the clips in flight, and on PostgreSQL over the index entries of clips
            that became final since the last vacuum.
        chunk_size: of runs that leave it open.
    """
    after = {} if after is None else after
    picked = []
    with writing(engine) as connection:
        if not _try_lock(connection, queue):
            return []
        runs = execute(connection, SELECT_UNFINISHED_RUNS, queue=queue).all()
        priorities = sum(run.priority for run in runs)
        for run in runs:
            share = -(-chunks * run.priority // priorities)
            size = run.chunk_size or chunk_size
            clips = _pick_clips(connection, run.id, share * size, limits, after)
            if clips:
                picked.append(Picked(run.ledger_id, run.id, run.name, size, tuple(clips)))
    return picked


def _try_lock(connection: sa.Connection, queue: str) -> bool:
    if connection.dialect.name == "sqlite":
        return True
    return bool(execute(connection, TRY_LOCK_QUEUE, queue=queue).scalar())


def _pick_clips(
    connection: sa.Connection, run_id: int, count: int, limits: Ledger, after: dict[int, int]
) -> list[PickedClip]:
    again = _lease(connection, DUE_AGAIN, limits, run_id=run_id, count=count)
    count -= len(again)
    if not count:
        return again
    last = after.get(run_id, 0)
    fresh = _lease(connection, NEVER_BEGUN, limits, run_id=run_id, count=count, after=last)
    if last and not fresh:
        # From the start again: clips that were given back or added meanwhile.
        fresh = _lease(connection, NEVER_BEGUN, limits, run_id=run_id, count=count, after=0)
    after[run_id] = fresh[-1].id if fresh else 0
    return again + fresh


def _lease(
    connection: sa.Connection, select: str, limits: Ledger, *, run_id: int, **values: Any
) -> list[PickedClip]:
    rows = execute(connection, select, run_id=run_id, **values).all()
    if not rows:
        return []
    # In the order in which a claim takes the clips of a pass, or the two could deadlock.
    ids = sorted(row.id for row in rows)
    lease = {"run_id": run_id, "lease_s": limits.queue_lease_s, "ids": ids}
    leased = set(execute(connection, INSERT_LEASES, **lease).scalars())
    return [PickedClip(*row) for row in rows if row.id in leased]
