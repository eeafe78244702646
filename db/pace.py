"""How fast a run goes, and what holds it back: read from the clips that came to their end last."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from db.access import is_standby
from db.models import Clip, Lease, Run
from db.session import now, reading

if TYPE_CHECKING:
    from db.results import Progress
    from earmark.core.settings import Worker

#: Looked at: enough to even out bursts, few enough for a look each half second at any size of run.
LAST_CLIPS = 10_000
LAST_S = 300.0
#: Fewer clips (of a worker, where it is about workers), or a shorter time, tell nothing.
LEAST_CLIPS = 40
LEAST_S = 5.0
#: A model that waits less than this of the time has nothing to gain.
WAITS = 0.1
#: Clips that spend most of their time at the model wait for it.
MOSTLY = 0.5


@dataclass(frozen=True, slots=True)
class Pace:
    """What may be said of a run's speed; None where there is too little to go by."""

    clips_per_s: float | None = None
    audio_s_per_s: float | None = None
    #: Until the last clip, at this pace.
    eta_s: float | None = None
    #: A sentence: what the workers wait for, and its cure.
    bottleneck: str | None = None
    #: What a clip spends in each stage, waits included.
    fetch_ms: float | None = None
    decode_ms: float | None = None
    classify_ms: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Recent:
    """Sums over the clips that ended last, without the first moment's: those had begun before."""

    clips: int
    seconds: float
    audio_s: float
    fetch_ms: float
    decode_ms: float
    classify_ms: float
    workers: int
    chunk_size: int

    def at_once(self, ms: float) -> float:
        """Return how many clips a worker has in a stage, on average: the time spent there over the time gone by."""
        return ms / 1000 / self.seconds / self.workers


def pace(engine: sa.Engine, run_id: int, state: Progress, limits: Worker) -> Pace:
    """Return how fast a run goes now, or went if it is at its end."""
    if state.finished:
        seconds = max(state.seconds, 0.1)
        return Pace(state.final / seconds, state.audio_s / seconds) if state.final else Pace()
    recent = _recent(engine, run_id)
    if recent is None:
        return Pace()
    rate = recent.clips / recent.seconds
    left = state.total - state.final
    # The last clips, a glance at few of many workers, and a model that works for other runs too say nothing.
    waiting = (
        state.states["pending"] + state.states["queued"]
        and recent.clips >= LEAST_CLIPS * recent.workers
    )
    bottleneck = (
        _bottleneck(recent, limits) if waiting and not _others_at_work(engine, run_id) else None
    )
    each = [ms / recent.clips for ms in (recent.fetch_ms, recent.decode_ms, recent.classify_ms)]
    return Pace(rate, recent.audio_s / recent.seconds, left / rate, bottleneck, *each)


def _recent(engine: sa.Engine, run_id: int) -> _Recent | None:
    since = sa.select(now() - LAST_S).scalar_subquery()
    wanted = [
        getattr(Clip, name)
        for name in ("duration_s", "fetch_ms", "decode_ms", "classify_ms", "worker")
    ]
    last = sa.select(Clip.finished_at, *wanted).where(
        Clip.run_id == run_id, Clip.finished_at > since
    )
    ended = last.order_by(Clip.finished_at.desc()).limit(LAST_CLIPS).cte("ended")
    begin = sa.select(sa.func.min(ended.c.finished_at)).scalar_subquery()
    sums = [sa.func.coalesce(sa.func.sum(column), 0.0) for column in list(ended.c)[1:5]]
    figures = sa.select(
        sa.func.count(), now() - begin, *sums, sa.func.count(ended.c.worker.distinct())
    )
    size = sa.select(Run.chunk_size).where(Run.id == run_id).scalar_subquery()
    with reading(engine) as connection:
        row = connection.execute(figures.add_columns(size).where(ended.c.finished_at > begin)).one()
    enough = row[0] >= LEAST_CLIPS and row[1] >= LEAST_S and row[-2]
    return _Recent(*row[:2], *map(float, row[2:6]), *row[6:]) if enough else None


def _others_at_work(engine: sa.Engine, run_id: int) -> bool:
    if is_standby(engine):
        return True  # it may be: who is at work is not known there
    running = (
        sa.select(Lease.clip_id).where(Lease.run_id != run_id, Lease.token.is_not(None)).limit(1)
    )
    with reading(engine) as connection:
        return connection.scalar(running) is not None


def _bottleneck(recent: _Recent, limits: Worker) -> str | None:
    fetching, decoding, classifying = map(
        recent.at_once, (recent.fetch_ms, recent.decode_ms, recent.classify_ms)
    )
    # No clip is at the model at least so much of the time, however its clips overlap.
    waits = 1 - classifying
    if waits < WAITS:
        share = classifying / (fetching + decoding + classifying)
        cure = "add workers, each with a device of its own, or take a faster one"
        return (
            f"Clips spend {share:.0%} of their time at the model: {cure}."
            if share > MOSTLY
            else None
        )
    if decoding > fetching:
        return f"The model waits at least {waits:.0%} of the time for decoding: add workers on other processors."
    in_chunks = limits.concurrency * recent.chunk_size
    if fetching > MOSTLY * min(limits.clips_in_flight, in_chunks):
        cure = (
            "EARMARK_WORKER__CLIPS_IN_FLIGHT"
            if limits.clips_in_flight <= in_chunks
            else "--concurrency"
        )
        return f"The model waits at least {waits:.0%} of the time for downloads: raise {cure} or add workers."
    cure = "raise EARMARK_FETCH__HOST_CONCURRENCY if the limits on one host hold them back"
    return f"The model waits at least {waits:.0%} of the time, with {fetching:.1f} downloads a worker at once: {cure}."


@dataclass(frozen=True, slots=True)
class Measured:
    """What the clips of a finished run took."""

    clips: int
    done: int
    bytes: int
    audio_s: float
    #: Between a tenth and nine tenths of the clips: neither the start nor the last stragglers. None of too few.
    clips_per_s: float | None


def measure(engine: sa.Engine, run_id: int) -> Measured:
    """Return what the clips of a finished run took; keeps their times in memory, so it is for small ones."""
    columns = Clip.finished_at, Clip.state, Clip.bytes, Clip.duration_s
    with reading(engine) as connection:
        rows = connection.execute(
            sa.select(*columns).where(Clip.run_id == run_id).order_by(Clip.finished_at)
        ).all()
    done = [row for row in rows if row.state == "done"]
    first, last = len(rows) // 10, len(rows) * 9 // 10 - 1
    seconds = rows[last].finished_at - rows[first].finished_at if len(rows) >= LEAST_CLIPS else 0.0
    rate = (last - first) / seconds if seconds > 0 else None
    sums = sum(row.bytes or 0 for row in rows), sum(row.duration_s or 0.0 for row in done)
    return Measured(len(rows), len(done), *sums, rate)
