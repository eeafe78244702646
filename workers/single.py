"""One clip classified in this process from start to end, for suspects and for `earmark explain`."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from earmark.core.clips import AudioFacts, Failure, Postponed, Success, Timings
from earmark.core.errors import ClipError
from workers.clip import Scores
from workers.loading.clip import failure_or_pause
from workers.loading.cutter import Cutter
from workers.loading.spans import Span

if TYPE_CHECKING:
    from collections.abc import Iterator

    from db.claims import Claimed
    from earmark.core.clips import Outcome, Part, Source
    from workers.decoding.decoder import Piece
    from workers.decoding.pool import Decoders
    from workers.fetching.fetch import Fetched
    from workers.loading.cutter import Cut
    from workers.models import RunPlan
    from workers.scoring import windows


class Fetcher(Protocol):
    """Fetches a clip."""

    def fetch(self, uri: str, part: Part | None = None) -> Fetched: ...


class Observer(Protocol):
    """Sees a clip between its stages."""

    def fetched(self, fetched: Fetched) -> None: ...

    def decoded(self, samples: np.ndarray, channel: int) -> None:
        """See a piece of a channel's waveform, shape (samples,); the mix is channel 0."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """Windows that are at the model, in order, and their outcomes."""

    outcomes: list[windows.Outcome | None]
    left: int
    #: Lanes are at several of them at once.
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: threading.Event = field(default_factory=threading.Event)


def scored(queued: list[Any], outcomes: list[windows.Outcome]) -> None:
    """Take what the model made of windows; its batcher is created with this."""
    for window, outcome in zip(queued, outcomes, strict=True):
        waiting, place = cast("tuple[_Waiting, int]", window.tag)
        waiting.outcomes[place] = outcome
        with waiting.lock:
            waiting.left -= 1
        if not waiting.left:
            waiting.done.set()


class SingleClip:
    """Fetches, decodes and scores a clip; a piece of it after the other, however long it is.

    Use one for each clip. It never raises: the clip ends as a Success, a Failure, or a Postponed if
    it has to be tried later.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        decoders: Decoders,
        max_windows: int,
        observer: Observer | None = None,
    ) -> None:
        self._fetcher = fetcher
        self._decoders = decoders
        self._max_windows = max_windows
        self._observer = observer
        self._source: Source | None = None
        self._ms: dict[str, float] = {}

    def classify(self, clip: Claimed, plan: RunPlan) -> Outcome | Postponed:
        """Return the clip's outcome."""
        try:
            return self._classify(clip, plan)
        except Exception as error:
            end = failure_or_pause(clip.id, error)
            if isinstance(end, ClipError):
                return Failure(clip.id, end, self._source, Timings(**self._ms))
            return Postponed(clip.id, end)

    def _classify(self, clip: Claimed, plan: RunPlan) -> Success:
        with self._stage("fetch_ms"):
            fetched = self._fetcher.fetch(clip.uri, clip.part)
        self._source = fetched.source
        with fetched.file:
            if self._observer:
                self._observer.fetched(fetched)
            facts, scores = self._decode(fetched, clip.part, plan)
        return scores.success(clip.id, fetched.source, facts, Timings(**self._ms))

    def _decode(
        self, fetched: Fetched, part: Part | None, plan: RunPlan
    ) -> tuple[AudioFacts, Scores]:
        shape, scores = plan.shape, Scores(plan.options)
        span = Span.of(part, shape.sample_rate)
        cutter = Cutter(shape, self._max_windows)
        channels = plan.options.decoded_channels
        pieces = self._decoders.pieces(fetched.file, shape.sample_rate, channels)
        while True:
            with self._stage("decode_ms"):
                piece: Piece = next(pieces)
            samples, end = piece.samples, piece.end
            if span:
                samples = span.cut(samples, piece.channel)
            if span and isinstance(end, AudioFacts):
                end = span.facts(end)
            if self._observer:
                self._observer.decoded(samples, piece.channel)
            cut = list(cutter.cut(samples, piece.channel, last=end is not None))
            with self._stage("classify_ms"):
                _score(cut, span.start if span else 0, plan, scores)
            if isinstance(end, AudioFacts):
                return end, scores

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self._ms[name] = self._ms.get(name, 0.0) + (perf_counter() - start) * 1000


def _score(cut: list[Cut], first: int, plan: RunPlan, scores: Scores) -> None:
    """Have the model score windows that are cut from the sample `first` on; add their scores."""
    # Imported here because it imports torch, which takes seconds.
    from workers.scoring.batcher import QueuedWindow

    if not cut:
        return
    shape = plan.shape
    function = plan.options.function_to_apply or plan.model.card.function_to_apply
    waiting = _Waiting([None] * len(cut), len(cut))
    queued = []
    for place, window in enumerate(cut):
        padded = np.pad(window.samples, (0, max(0, shape.least - len(window.samples))))
        tag = waiting, place
        queued.append(QueuedWindow(padded, function, tag, 0, plan.options.embeddings))
    plan.model.batcher.put(queued)
    waiting.done.wait()
    for window, outcome in zip(cut, waiting.outcomes, strict=True):
        if isinstance(outcome, ClipError):
            raise outcome
        assert outcome is not None
        span = shape.span(first + window.start, len(window.samples))
        scores.add(span, outcome, window.channel)
