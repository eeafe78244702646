"""How fast a run goes, and how its workers spend the time: read from the clips that ended last."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from db.access import is_standby
from db.dialects import now
from db.models import Clip, Lease, Run
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

_CHUNK_SIZE = sa.func.coalesce(sa.func.nullif(Run.chunk_size, 0), CHUNK_SIZE)


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


@dataclass(frozen=True, slots=True)
class _Recent:
    """Sums over the clips that ended last, except the first moment's: those had begun before."""

    clips: int
    seconds: float
    audio_s: float
    fetch_ms: float
    decode_ms: float
    classify_ms: float
    workers: int
    chunk_size: int

    def at_once(self, stage_ms: float) -> float:
        """Return the clips of a worker in a stage: the time spent there over the time gone by."""
        return stage_ms / 1000 / self.seconds / self.workers


def pace(engine: sa.Engine, run_id: int, state: Progress) -> Pace:
    """Return how fast a run goes now, or went if it is at its end."""
    if state.finished:
        seconds = max(state.seconds, 0.1)
        return Pace(state.final / seconds, state.audio_s / seconds) if state.final else Pace()
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


def _workload(engine: sa.Engine, run_id: int, state: Progress, recent: _Recent) -> Workload | None:
    # The last clips of a run, a few clips of many workers, and workers that have other runs too
    # are no measure.
    waiting = state.states[State.pending] + state.states[State.queued]
    if not waiting or recent.clips < LEAST_CLIPS * recent.workers:
        return None
    if _others_at_work(engine, run_id):
        return None
    return Workload(
        recent.at_once(recent.fetch_ms),
        recent.at_once(recent.decode_ms),
        recent.at_once(recent.classify_ms),
        recent.chunk_size,
    )


def _recent(engine: sa.Engine, run_id: int) -> _Recent | None:
    last = (
        sa.select(
            Clip.finished_at,
            Clip.duration_s,
            Clip.fetch_ms,
            Clip.decode_ms,
            Clip.classify_ms,
            Clip.worker,
        )
        .where(
            Clip.run_id == run_id,
            Clip.finished_at > sa.select(now() - LAST_S).scalar_subquery(),
        )
        .order_by(Clip.finished_at.desc())
        .limit(LAST_CLIPS)
        .cte("ended")
    )
    begin = sa.select(sa.func.min(last.c.finished_at)).scalar_subquery()
    figures = sa.select(
        sa.func.count().label("clips"),
        (now() - begin).label("seconds"),
        _sum(last.c.duration_s).label("audio_s"),
        _sum(last.c.fetch_ms).label("fetch_ms"),
        _sum(last.c.decode_ms).label("decode_ms"),
        _sum(last.c.classify_ms).label("classify_ms"),
        sa.func.count(last.c.worker.distinct()).label("workers"),
        sa.select(_CHUNK_SIZE).where(Run.id == run_id).scalar_subquery().label("chunk_size"),
    ).where(last.c.finished_at > begin)
    (row,) = fetch(engine, figures)
    if row.clips < LEAST_CLIPS or row.seconds < LEAST_S or not row.workers:
        return None
    return _Recent(**row._mapping)


def _sum(column: sa.ColumnElement[float]) -> sa.ColumnElement[float]:
    return sa.cast(sa.func.coalesce(sa.func.sum(column), 0.0), sa.Double)


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
