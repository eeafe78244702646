"""What people change: retry, redo, cancel and prune. Each transaction is a small one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from db import brake
from db.dialects import now
from db.models import Base, Clip, Lease, Run, RunCount, WindowEmbedding, WindowPrediction, state_is
from db.outcomes import error_values
from db.session import execute, fetch_column, writing
from earmark.core.clips import State
from earmark.core.errors import Cancelled, UsageError

#: Clips deleted or redone in one transaction: about a second in which other writers of a SQLite
#: file wait.
PRUNED_AT_ONCE = 5000
#: The same clips of the runs that follow theirs.
SELECT_FOLLOWING = """
SELECT same.id FROM clips own
JOIN runs theirs ON theirs.follows = own.run_id
JOIN clips same ON same.run_id = theirs.id AND same.uri_key = own.uri_key
WHERE own.id IN {ids}
"""
_NO_ERROR: dict[str, Any] = {"error_code": None, "error_stage": None, "error": None}


def retry_failed(engine: sa.Engine, run_id: int, codes: Iterable[str] = ()) -> int:
    """Make failed clips of a run `pending` again: all, or those with these codes; count them.

    If the run is paused, it goes on. So do the runs that follow it, with these clips.
    """
    failed = [state_is(State.failed)]
    if wanted := list(codes):
        failed.append(Clip.error_code.in_(wanted))
    same = sa.select(Clip.uri_key).where(Clip.run_id == run_id, *failed)
    with writing(engine) as connection:
        following = connection.scalars(sa.select(Run.id).where(Run.follows == run_id)).all()
        for each in following:
            brake.let_go(connection, each)
            theirs = sa.update(Clip).where(Clip.run_id == each, *failed, Clip.uri_key.in_(same))
            connection.execute(theirs.values(_fresh()))
        brake.let_go(connection, run_id)
        own = sa.update(Clip).where(Clip.run_id == run_id, *failed)
        return connection.execute(own.values(_fresh())).rowcount


def redo_done(engine: sa.Engine, run_id: int) -> int:
    """Make the clips of a run that are done `pending` again, without their results; count them."""
    redone = last = 0
    done = sa.select(Clip.id).where(Clip.run_id == run_id, state_is(State.done)).order_by(Clip.id)
    while True:
        # Behind the last one, since workers end clips meanwhile.
        ids = fetch_column(engine, done.where(Clip.id > last).limit(PRUNED_AT_ONCE))
        if not ids:
            return redone
        last = ids[-1]
        redone += redo(engine, ids)


def redo(engine: sa.Engine, clip_ids: Sequence[int]) -> int:
    """Make clips that have a result or have failed `pending` again; return how many.

    The same clips of runs that follow theirs come with them.
    """
    with writing(engine) as connection:
        following = execute(connection, SELECT_FOLLOWING, ids=list(clip_ids)).scalars().all()
        if following:
            _redo(connection, following)
        return _redo(connection, clip_ids)


def _redo(connection: sa.Connection, clip_ids: Sequence[int]) -> int:
    ended = Clip.id.in_(clip_ids), Clip.state.in_([State.done, State.failed])
    for table in (WindowPrediction, WindowEmbedding):
        of_clips = table.clip_id.in_(sa.select(Clip.id).where(*ended))
        connection.execute(sa.delete(table).where(of_clips))
    return connection.execute(sa.update(Clip).where(*ended).values(_fresh())).rowcount


def _fresh() -> dict[str, Any]:
    """Return the columns of a clip that is to be tried as if for the first time."""
    return {
        "state": State.pending,
        "not_before": now(),
        "attempts": 0,
        "crashes": 0,
        "finished_at": None,
        "given_back_by": None,
        "unheard": False,
        "duration_s": None,
        **_NO_ERROR,
    }


def cancel(engine: sa.Engine, run_id: int) -> int:
    """Make every clip of a run that is not final `cancelled`; return how many.

    Clips that workers have are among them: their outcomes are no longer written, and a failure
    cannot bring them back.
    """
    final = {
        **error_values(Cancelled()),
        "state": State.cancelled,
        "not_before": None,
        "finished_at": now(),
    }
    of_run = Lease.run_id == run_id
    with writing(engine) as connection:
        # Locked in the order in which workers lock them.
        connection.execute(
            sa.select(Lease.clip_id).where(of_run).order_by(Lease.clip_id).with_for_update()
        ).all()
        connection.execute(sa.delete(Lease).where(of_run))
        unfinished = sa.update(Clip).where(Clip.run_id == run_id, state_is(State.pending))
        return connection.execute(unfinished.values(final)).rowcount


def prune(engine: sa.Engine, run_id: int) -> int:
    """Delete a run with its clips and results, in small transactions; return its number of clips.

    Raises:
        UsageError: the run is not at its end.
    """
    if _unfinished(engine, run_id):
        raise UsageError(reason="This run is not at its end: `earmark cancel` it first.")
    pruned = 0
    while deleted := _delete_clips(engine, run_id):
        pruned += deleted
    with writing(engine) as connection:
        for table in _tables_with("run_id"):
            connection.execute(sa.delete(table).where(table.c.run_id == run_id))
        connection.execute(sa.delete(Run).where(Run.id == run_id))
    return pruned


def _tables_with(column: str) -> list[sa.Table]:
    """Return the tables with this column; one that refers to another comes before it."""
    return [table for table in reversed(Base.metadata.sorted_tables) if column in table.c]


def _unfinished(engine: sa.Engine, run_id: int) -> int:
    clips = sa.select(sa.func.coalesce(sa.func.sum(RunCount.clips), 0))
    pending = clips.where(RunCount.run_id == run_id, RunCount.state == State.pending)
    return int(fetch_column(engine, pending)[0])


def _delete_clips(engine: sa.Engine, run_id: int) -> int:
    first = sa.select(Clip.id).where(Clip.run_id == run_id).limit(PRUNED_AT_ONCE)
    with writing(engine) as connection:
        ids = connection.scalars(first).all()
        for table in _tables_with("clip_id"):
            connection.execute(sa.delete(table).where(table.c.clip_id.in_(ids)))
        connection.execute(sa.delete(Clip).where(Clip.id.in_(ids)))
    return len(ids)
