"""What the feeder changes: clips that are due get a lease for the queue, and leases that have ended are taken back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from db.models import Clip, Lease, Run, RunCount, state_is
from db.session import execute, now, reading, writing

if TYPE_CHECKING:
    from earmark.settings import Ledger

#: Back to work, ahead of what was never begun; a worker's death is no try of the clip's own.
_TAKE_BACK = "UPDATE clips SET not_before = {now}, crashes = crashes + {crash} WHERE state = 'pending' AND id IN {ids}"
_LEASE = (
    "INSERT INTO leases (clip_id, run_id, until) SELECT value, :run_id, {now} + :lease_s FROM {list}"
    " WHERE true ON CONFLICT DO NOTHING RETURNING clip_id"
)
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
    return _take_back(engine, queue, sa.and_(Lease.token.is_(None), Lease.until < _CLOCK + within_s))


def _take_back(engine: sa.Engine, queue: str, ended: sa.ColumnElement[bool]) -> int:
    leases = sa.select(Lease.clip_id, Lease.token).where(ended, Lease.run_id.in_(_runs_of(queue)))
    # Most feeders find nothing, and on SQLite there is one writer.
    with reading(engine) as connection:
        if connection.execute(leases.limit(1)).first() is None:
            return 0
    with writing(engine) as connection:
        found = connection.execute(leases.order_by(Lease.clip_id).with_for_update(skip_locked=True)).all()
        connection.execute(sa.delete(Lease).where(Lease.clip_id.in_([row.clip_id for row in found])))
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
        runs = connection.execute(_runs_with_pending_clips(queue)).all()
        total = sum(run.priority for run in runs)
        picked = []
        for run in runs:
            count = -(-chunks * run.priority // total) * run.chunk_size
            clips = _pick_clips(connection, run.id, count, limits, after)
            picked.append(Picked(run.id, run.chunk_size, tuple(clips)))
        return [some for some in picked if some.clips]


def _my_turn(connection: sa.Connection, queue: str) -> bool:
    if connection.dialect.name == "sqlite":
        return True
    return bool(execute(connection, "SELECT pg_try_advisory_xact_lock(hashtext(:queue))", queue=queue).scalar())


def _pick_clips(
    connection: sa.Connection, run_id: int, count: int, limits: Ledger, after: dict[int, int]
) -> list[PickedClip]:
    again = _lease(connection, run_id, due_again(run_id, count), limits)
    wanted = count - len(again)
    fresh = _lease(connection, run_id, never_begun(run_id, wanted, after.get(run_id, 0)), limits) if wanted else []
    if wanted and not fresh and after.get(run_id):
        fresh = _lease(connection, run_id, never_begun(run_id, wanted, 0), limits)
    if wanted:
        after[run_id] = fresh[-1].id if fresh else 0
    return again + fresh


def due_again(run_id: int, count: int) -> sa.Select[int, str, int]:
    """Return the statement for a run's clips that were begun before and whose time has come."""
    return _pending(run_id).where(Clip.not_before > 0, Clip.not_before <= _CLOCK).limit(count)


def never_begun(run_id: int, count: int, after: int) -> sa.Select[int, str, int]:
    """Return the statement for a run's clips behind this one that no worker has had."""
    # Compared as a pair, so that PostgreSQL does not walk all ids of all runs instead.
    place, mark = sa.tuple_(Clip.not_before, Clip.id), sa.tuple_(sa.literal(0.0), sa.literal(after))
    return _pending(run_id).where(place > mark, Clip.not_before <= 0).limit(count)


def _pending(run_id: int) -> sa.Select[int, str, int]:
    # A lookup for each, never a join: PostgreSQL would sort whatever it joins.
    leased = sa.select(Lease.clip_id).where(Lease.clip_id == Clip.id).scalar_subquery()
    pending = sa.select(Clip.id, Clip.display_uri, Clip.crashes).where(Clip.run_id == run_id, state_is("pending"))
    return pending.where(leased.is_(None)).order_by(Clip.not_before, Clip.id)


def _lease(connection: sa.Connection, run_id: int, some: sa.Select[int, str, int], limits: Ledger) -> list[PickedClip]:
    found = [PickedClip(*row) for row in connection.execute(some)]
    values = {"ids": [clip.id for clip in found], "run_id": run_id, "lease_s": limits.queue_lease_s}
    leased = set(execute(connection, _LEASE, **values).scalars()) if found else set()
    return [clip for clip in found if clip.id in leased]


def _runs_of(queue: str) -> sa.Select[int]:
    return sa.select(Run.id).where(Run.queue == queue)


def _runs_with_pending_clips(queue: str) -> sa.Select[int, int, int]:
    pending = sa.select(RunCount.run_id).where(RunCount.state == "pending").group_by(RunCount.run_id)
    some = Run.id.in_(pending.having(sa.func.sum(RunCount.clips) > 0))
    return sa.select(Run.id, Run.chunk_size, Run.priority).where(Run.queue == queue, some).order_by(Run.id)
