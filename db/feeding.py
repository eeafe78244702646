"""What the feeder changes: clips that are due get a lease for the queue, and leases that have ended are taken back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from db.models import Lease, Run
from db.session import execute, now, reading, writing

if TYPE_CHECKING:
    from earmark.core.settings import Ledger

#: Back to work, ahead of what was never begun; a worker's death is no try of the clip's own.
_TAKE_BACK = "UPDATE clips SET not_before = {now}, crashes = crashes + {crash} WHERE state = 'pending' AND id IN {ids}"
#: The list as one value: a fleet that dies leaves more leases than a statement may have parameters.
_RELEASE = "DELETE FROM leases WHERE clip_id IN {ids}"
_LEASE = (
    "INSERT INTO leases (clip_id, run_id, until) SELECT value, :run_id, {now} + :lease_s FROM {list}"
    " WHERE true ON CONFLICT DO NOTHING RETURNING clip_id"
)
#: PostgreSQL keeps the plan it made when there were hardly any leases: it must not be one that reads them all.
_MY_TURN = "SELECT pg_try_advisory_xact_lock(hashtext(:queue)) FROM set_config('enable_seqscan', 'off', true)"
_RUNS = """
SELECT id, chunk_size, priority, (SELECT id FROM ledger) AS ledger_id FROM runs
WHERE queue = :queue AND (SELECT sum(clips) FROM run_counts WHERE run_id = runs.id AND state = 'pending') > 0
ORDER BY id
"""
# The lease is looked up for each clip, never joined: PostgreSQL would sort whatever it joins.
_PENDING = """
SELECT id, coalesce(display_uri, uri), crashes FROM clips
WHERE run_id = :run_id AND state = 'pending' AND {due} AND (SELECT clip_id FROM leases WHERE clip_id = clips.id) IS NULL
ORDER BY not_before, id LIMIT :count
"""
#: Chunks of one ledger that wait in a queue, or have been lost from it.
_QUEUED = """
SELECT coalesce(sum(1.0 / runs.chunk_size), 0) FROM leases JOIN runs ON runs.id = leases.run_id
WHERE runs.queue = :queue AND leases.token IS NULL
"""
#: A run's clips that were begun before and whose time has come.
DUE_AGAIN = _PENDING.replace("{due}", "not_before > 0 AND not_before <= (SELECT {now})")
#: A run's clips behind `:after` that no worker has had.
NEVER_BEGUN = _PENDING.replace("{due}", "{fresh}")
#: Read once a statement, so that an index can be used.
_CLOCK = sa.select(now()).scalar_subquery()


@dataclass(frozen=True, slots=True)
class PickedClip:
    """A clip that has been leased to the queue and now has to be sent."""

    id: int
    display_uri: str
    crashes: int


@dataclass(frozen=True, slots=True)
class Picked:
    """What the feeder took from one run."""

    ledger_id: str
    run_id: int
    chunk_size: int
    clips: tuple[PickedClip, ...]


def take_back(engine: sa.Engine, queue: str) -> int:
    """Take back the clips whose lease has ended; return how many.

    A worker that let a lease end has died with the clip: that counts as a crash.
    """
    return _take_back(engine, queue, Lease.until < _CLOCK)


def take_back_queued(engine: sa.Engine, queue: str, within_s: float) -> int:
    """Take back the clips whose time in the queue would end within so many seconds; return how many."""
    return _take_back(
        engine, queue, sa.and_(Lease.token.is_(None), Lease.until < _CLOCK + within_s)
    )


def queued_chunks(engine: sa.Engine, queue: str) -> int:
    """Return about how many chunks of this ledger are in a queue."""
    with reading(engine) as connection:
        return int(execute(connection, _QUEUED, queue=queue).scalar_one())


def _take_back(engine: sa.Engine, queue: str, ended: sa.ColumnElement[bool]) -> int:
    runs = sa.select(Run.id).where(Run.queue == queue)
    leases = sa.select(Lease.clip_id, Lease.token).where(ended, Lease.run_id.in_(runs))
    # Most feeders find nothing, and on SQLite there is one writer.
    with reading(engine) as connection:
        if connection.execute(leases.limit(1)).first() is None:
            return 0
    with writing(engine) as connection:
        found = connection.execute(
            leases.order_by(Lease.clip_id).with_for_update(skip_locked=True)
        ).all()
        execute(connection, _RELEASE, ids=[row.clip_id for row in found])
        queued = [row.clip_id for row in found if row.token is None]
        crashed = [row.clip_id for row in found if row.token is not None]
        return sum(
            execute(connection, _TAKE_BACK.replace("{crash}", crash), ids=ids).rowcount
            for ids, crash in ((queued, "0"), (crashed, "1"))
            if ids
        )


def pick(
    engine: sa.Engine, queue: str, chunks: int, limits: Ledger, after: dict[int, int] | None = None
) -> list[Picked]:
    """Lease about so many chunks of clips that are due to the queue, shared among the runs by their priorities.

    On PostgreSQL, while another feeder picks for the same queue, there is nothing to pick.

    Args:
        after: by run, the last fresh clip picked before, and kept up to date. It spares the walk over the clips that
            are on their way, and PostgreSQL that over the index entries of those final since its last vacuum.
    """
    after = {} if after is None else after
    with writing(engine) as connection:
        if not _my_turn(connection, queue):
            return []
        runs = execute(connection, _RUNS, queue=queue).all()
        total = sum(run.priority for run in runs)
        picked = []
        for run in runs:
            count = -(-chunks * run.priority // total) * run.chunk_size
            clips = _pick_clips(connection, run.id, count, limits, after)
            picked.append(Picked(run.ledger_id, run.id, run.chunk_size, tuple(clips)))
        return [some for some in picked if some.clips]


def _my_turn(connection: sa.Connection, queue: str) -> bool:
    if connection.dialect.name == "sqlite":
        return True
    return bool(execute(connection, _MY_TURN, queue=queue).scalar())


def _pick_clips(
    connection: sa.Connection, run_id: int, count: int, limits: Ledger, after: dict[int, int]
) -> list[PickedClip]:
    def lease(statement: str, **values: int) -> list[PickedClip]:
        found = [
            PickedClip(*row)
            for row in execute(connection, statement, run_id=run_id, **values).all()
        ]
        if not found:
            return []
        ids = [clip.id for clip in found]
        leased = set(
            execute(connection, _LEASE, ids=ids, run_id=run_id, lease_s=limits.queue_lease_s)
            .scalars()
            .all()
        )
        return [clip for clip in found if clip.id in leased]

    again = lease(DUE_AGAIN, count=count)
    wanted = count - len(again)
    fresh = lease(NEVER_BEGUN, count=wanted, after=after.get(run_id, 0)) if wanted else []
    if wanted and not fresh and after.get(run_id):
        fresh = lease(NEVER_BEGUN, count=wanted, after=0)
    if wanted:
        after[run_id] = fresh[-1].id if fresh else 0
    return again + fresh
