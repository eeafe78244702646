"""The brake of a run: pause it when its clips fail on every worker, and let it go on again."""

from __future__ import annotations

import math

import sqlalchemy as sa

from db import worker_registry
from db.dialects import now
from db.models import Clip, Lease, Run, state_is
from db.session import fetch, writing
from db.worker_registry import WorkerUp
from earmark.core.clips import State
from earmark.core.spelling import printable

#: A run with this limit is never paused.
NEVER = 1.0
#: The clips of a run that ended last.
LAST_CLIPS = 500
#: Fewer of them show nothing, and of one worker fewer than these.
LEAST_CLIPS = 100
LEAST_OF_A_WORKER = 20
#: The share of failures has to be above the limit by so many standard deviations: a list of which
#: just a fifth is missing must not pause once in a million clips. Of 500 clips, 145 must fail.
DEVIATIONS = 5.0
#: While every worker pauses, others may be starting: a model takes seconds to load.
SETTLE_S = 10.0
#: Whether some clips have not failed yet. Retries come last, so that in the end all may fail.
SELECT_FRESH = """
SELECT 1 FROM clips
WHERE run_id = :run_id AND state = 'pending' AND error_code IS NULL
ORDER BY not_before LIMIT 1
"""
#: Failed clips that were given back failed on other workers too, and not for a reason of their own.
SELECT_LAST = """
SELECT worker, count(*) AS clips,
       count(CASE WHEN state = 'failed' THEN given_back_by END) AS failed, max(error) AS error
FROM (
  SELECT worker, state, given_back_by,
         CASE WHEN given_back_by IS NOT NULL THEN error_code || ': ' || error END AS error
  FROM clips
  WHERE run_id = :run_id AND finished_at > (SELECT resumed_at FROM runs WHERE id = :run_id)
  ORDER BY finished_at DESC LIMIT :last
) AS last_clips
GROUP BY worker
"""
SELECT_GOING = """
SELECT id, name, stop_at FROM runs
WHERE queue = :queue AND paused IS NULL AND stop_at < :never AND (
    SELECT sum(clips) FROM run_counts WHERE run_id = runs.id AND state = 'pending'
) > 0
"""


def pause_failing(engine: sa.Engine, queue: str) -> list[str]:
    """Pause the runs of a queue whose clips fail on every worker; return a sentence for each."""
    runs = fetch(engine, SELECT_GOING, queue=queue, never=NEVER)
    if not runs:
        return []
    up = worker_registry.up(engine, queue)
    sentences = []
    for run in runs:
        reason = nobody_is_fit(up, run.id) or _too_many_fail(engine, run.id, run.stop_at)
        if reason and pause(engine, run.id, reason):
            sentences.append(in_a_sentence(run.name, reason))
    return sentences


def in_a_sentence(name: str, reason: str) -> str:
    """Return what there is to say about a paused run."""
    return (
        f"The run {name} is paused: {printable(reason)} Cure that, then `earmark resume {name}`;"
        " with `--stop-at off` it goes on whatever fails."
    )


def nobody_is_fit(up: list[WorkerUp], run_id: int) -> str | None:
    """Return why no worker can do a run, or None if some worker can or may be starting."""
    for worker in up:
        if worker.pause is None or worker.pause.run_id != run_id or worker.paused_s < SETTLE_S:
            return None
    if not up or up[0].pause is None:
        return None
    return f"none of the {len(up)} workers that are up can do it. {up[0].pause.reason}"


def _too_many_fail(engine: sa.Engine, run_id: int, limit: float) -> str | None:
    rows = fetch(engine, SELECT_LAST, run_id=run_id, last=LAST_CLIPS)
    clips = sum(row.clips for row in rows)
    failed = sum(row.failed for row in rows)
    if clips < LEAST_CLIPS or not clearly_more(failed, clips, limit):
        return None
    for row in rows:
        if row.clips >= LEAST_OF_A_WORKER and row.failed <= limit * row.clips:
            return None
    if not fetch(engine, SELECT_FRESH, run_id=run_id):
        return None
    example = max(row.error for row in rows if row.error)
    return (
        f"{failed} of its last {clips} clips failed for a reason that may be the workers' or the"
        f" network's, such as {example}"
    )


def clearly_more(failed: int, clips: int, limit: float) -> bool:
    """Return whether more than this share fails, and not just by chance."""
    spread = math.sqrt(clips * limit * (1 - limit))
    return failed > limit * clips + DEVIATIONS * spread


def pause(engine: sa.Engine, run_id: int, reason: str) -> bool:
    """Let no more clips of a run begin; return whether it was going."""
    going = sa.update(Run).where(Run.id == run_id, Run.paused.is_(None))
    queued = sa.delete(Lease).where(Lease.run_id == run_id, Lease.token.is_(None))
    with writing(engine) as connection:
        paused = connection.execute(going.values(paused=reason)).rowcount
        connection.execute(queued)
    return bool(paused)


def resume(engine: sa.Engine, run_id: int, stop_at: float | None = None) -> None:
    """Let a run go on; what happened before is no reason to pause it again."""
    with writing(engine) as connection:
        let_go(connection, run_id)
        if stop_at is not None:
            connection.execute(sa.update(Run).where(Run.id == run_id).values(stop_at=stop_at))


def let_go(connection: sa.Connection, run_id: int) -> None:
    """End a run's pause, if it has one, and let every worker try its clips again."""
    paused = sa.update(Run).where(Run.id == run_id, Run.paused.is_not(None))
    if not connection.execute(paused.values(paused=None, resumed_at=now())).rowcount:
        return
    begun = sa.update(Clip).where(Clip.run_id == run_id, state_is(State.pending))
    begun = begun.where(Clip.not_before > 0, Clip.given_back_by.is_not(None))
    # Running ones are their worker's to write, in an order of its own.
    leased = sa.select(Lease.clip_id).where(Lease.run_id == run_id)
    connection.execute(begun.where(Clip.id.not_in(leased)).values(given_back_by=None))
