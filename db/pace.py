"""How fast a run goes, and how its workers spend the time: read from the clips that ended last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from db.access import is_standby
from db.models import Clip, Lease
from db.runs import Progress
from db.session import fetch
from earmark.core.clips import State
from earmark.core.options import CHUNK_SIZE

#: Clips to look at: enough to even out bursts, few enough for a look each half second.
LAST_CLIPS = 10_000
LAST_S = 300.0
#: Pace is shown from so many clips (of a worker, where it is about workers) and seconds on.
LEAST_CLIPS = 40
LEAST_S = 5.0
#: The rate of a finished, small run is known from so many seconds on: a burst says nothing.
LEAST_MEASURED_S = 0.5

#: Sums over the clips that ended last, except the first moment's: those had begun before.
SELECT_RECENT = """
WITH ended AS (
  SELECT finished_at, duration_s, fetch_ms, decode_ms, classify_ms, worker FROM clips
  WHERE run_id = :run_id AND finished_at > (SELECT {now} - :last_s)
  ORDER BY finished_at DESC LIMIT :last_clips
)
SELECT count(*) AS clips, {now} - max(begin_at) AS seconds, count(DISTINCT worker) AS workers,
       CAST(coalesce(sum(duration_s), 0) AS double precision) AS audio_s,
       CAST(coalesce(sum(fetch_ms), 0) AS double precision) AS fetch_ms,
       CAST(coalesce(sum(decode_ms), 0) AS double precision) AS decode_ms,
       CAST(coalesce(sum(classify_ms), 0) AS double precision) AS classify_ms,
       (SELECT coalesce(nullif(chunk_size, 0), :chunk_size) FROM runs WHERE id = :run_id)
       AS chunk_size
FROM ended JOIN (SELECT min(finished_at) AS begin_at FROM ended) AS begun
ON ended.finished_at > begun.begin_at
"""


@dataclass(frozen=True, slots=True)
class Workload:
    """Clips that each worker has in each stage at once, on average."""

    fetching: float
    decoding: float
    classifying: float
    chunk_size: int


@dataclass(frozen=True, slots=True)
class Pace:
    """A run's speed; None where there are too few clips to tell."""

    clips_per_s: float | None = None
    audio_s_per_s: float | None = None
    #: Until the last clip, at this pace.
    eta_s: float | None = None
    #: Milliseconds of a clip in each stage, waits included.
    fetch_ms: float | None = None
    decode_ms: float | None = None
    classify_ms: float | None = None
    #: None too where workers have other runs as well, or the run is about to end.
    workload: Workload | None = None


def pace(engine: sa.Engine, run_id: int, state: Progress) -> Pace:
    """Return how fast a run goes now, or went if it is at its end."""
    if state.finished:
        if state.final < LEAST_CLIPS or state.seconds < LEAST_S:
            return Pace()
        return Pace(state.final / state.seconds, state.audio_s / state.seconds)
    recent = _recent(engine, run_id)
    if recent is None:
        return Pace()
    clips_per_s = recent.clips / recent.seconds
    return Pace(
        clips_per_s=clips_per_s,
        audio_s_per_s=recent.audio_s / recent.seconds,
        eta_s=(state.total - state.final) / clips_per_s,
        fetch_ms=recent.fetch_ms / recent.clips,
        decode_ms=recent.decode_ms / recent.clips,
        classify_ms=recent.classify_ms / recent.clips,
        workload=_workload(engine, run_id, state, recent),
    )


def _workload(engine: sa.Engine, run_id: int, state: Progress, recent: Any) -> Workload | None:
    # The last clips of a run, a few clips of many workers, and workers that have other runs too
    # are no measure.
    waiting = state.states[State.pending] + state.states[State.queued]
    if not waiting or recent.clips < LEAST_CLIPS * recent.workers:
        return None
    if _others_at_work(engine, run_id):
        return None
    # A worker's clips in a stage: the time that they spent there over the time gone by.
    gone_by_ms = 1000 * recent.seconds * recent.workers
    return Workload(
        recent.fetch_ms / gone_by_ms,
        recent.decode_ms / gone_by_ms,
        recent.classify_ms / gone_by_ms,
        recent.chunk_size,
    )


def _recent(engine: sa.Engine, run_id: int) -> Any:
    """Return the sums of `SELECT_RECENT`; None of too few clips."""
    bounds = {"last_s": LAST_S, "last_clips": LAST_CLIPS, "chunk_size": CHUNK_SIZE}
    (row,) = fetch(engine, SELECT_RECENT, run_id=run_id, **bounds)
    if row.clips < LEAST_CLIPS or row.seconds < LEAST_S or not row.workers:
        return None
    return row


def _others_at_work(engine: sa.Engine, run_id: int) -> bool:
    if is_standby(engine):
        return True  # Perhaps: a standby has no leases.
    running = sa.select(Lease.clip_id).where(Lease.run_id != run_id, Lease.token.is_not(None))
    return bool(fetch(engine, running.limit(1)))


@dataclass(frozen=True, slots=True)
class Measured:
    """Totals of a finished run, and its rate."""

    clips: int
    done: int
    bytes: int
    audio_s: float
    #: Between a tenth and nine tenths of the clips, without start and stragglers; None of too few.
    clips_per_s: float | None


def measure(engine: sa.Engine, run_id: int) -> Measured:
    """Return the totals and the rate of a finished, small run: its clips are held in memory."""
    columns = Clip.finished_at, Clip.state, Clip.bytes, Clip.duration_s
    clips = sa.select(*columns).where(Clip.run_id == run_id).order_by(Clip.finished_at)
    rows = fetch(engine, clips)
    done = [row for row in rows if row.state == State.done]
    return Measured(
        clips=len(rows),
        done=len(done),
        bytes=sum(row.bytes or 0 for row in rows),
        audio_s=sum(row.duration_s or 0.0 for row in done),
        clips_per_s=_rate([row.finished_at for row in rows]),
    )


def _rate(ended_at: list[float]) -> float | None:
    if len(ended_at) < LEAST_CLIPS:
        return None
    first, last = len(ended_at) // 10, len(ended_at) * 9 // 10 - 1
    seconds = ended_at[last] - ended_at[first]
    return (last - first) / seconds if seconds >= LEAST_MEASURED_S else None
