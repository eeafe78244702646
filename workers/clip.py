"""A claimed clip in work: its windows to the model, their scores to its outcome."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from earmark.core.clips import Embedding, Failure, Success, WindowPredictions
from earmark.core.errors import (
    ClipError,
    DecodeError,
    DecoderCrashed,
    DecoderMemory,
    DecoderTimeout,
)
from workers.scoring import best_labels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from db.claims import Claimed
    from earmark.core.clips import AudioFacts, Outcome, Part, Postponed, Prediction, Source, Timings
    from earmark.core.options import RunOptions
    from workers.loading.process import Dealt, Facts, Known, LoadedWindow, Loading, Suspected
    from workers.models import RunPlan
    from workers.scoring.batcher import Batcher, QueuedWindow

    #: None: all of its windows have scores.
    End = Success | Failure | Postponed | Known | Suspected | None


#: Errors of a decoder that it may not have again with the same bytes.
BY_CHANCE = (DecoderCrashed, DecoderMemory, DecoderTimeout)


class Answer(NamedTuple):
    """A clip's best labels, those of its windows if there are several, and their channel."""

    predictions: tuple[Prediction, ...]
    windows: tuple[WindowPredictions, ...]
    channel: int | None


class Scores:
    """The scores of a clip's windows, combined as they come, those of each channel apart."""

    def __init__(self, options: RunOptions) -> None:
        self._options = options
        self._combined: dict[int, np.ndarray] = {}
        self._counts: Counter[int] = Counter()
        self._windows: list[WindowPredictions] = []
        self._embeddings: list[Embedding] = []
        #: The BEST labels of a clip that is one window, and its channel.
        self._best: tuple[np.ndarray, int] | None = None

    def add(
        self,
        span: tuple[float, float],
        outcome: np.ndarray | best_labels.Embedded,
        channel: int = 0,
    ) -> None:
        """Add what the model made of a window: scores, shape (labels,); the mix is channel 0."""
        scores = outcome
        if isinstance(scores, best_labels.Embedded):
            self._embeddings.append(Embedding(*span, scores.vector, channel or None))
            scores = scores.scores
        if scores.dtype == best_labels.BEST:
            self._best = scores, channel
            return
        best = best_labels.top_k(scores, self._options.top_k, self._options.min_score)
        self._windows.append(WindowPredictions(*span, best, channel or None))
        self._counts[channel] += 1
        combined = self._combined.get(channel)
        if combined is None:
            # The sum of a day's windows needs the digits.
            self._combined[channel] = scores.astype(np.float64)
        elif self._options.combine == "max":
            np.maximum(combined, scores, out=combined)
        else:
            combined += scores

    def success(self, clip_id: int, source: Source, facts: AudioFacts, timings: Timings) -> Success:
        """Return the outcome of the clip."""
        embeddings = tuple(self._embeddings)
        best, parts, channel = self.answer()
        return Success(clip_id, source, facts, best, parts, timings, channel, embeddings=embeddings)

    def answer(self) -> Answer:
        """Return the best labels, of the channel that has the highest score."""
        if self._best is not None:
            scores, channel = self._best
            return Answer(
                best_labels.predictions(scores, self._options.min_score), (), channel or None
            )
        if len(self._windows) == 1:
            (only,) = self._windows
            return Answer(only.predictions, (), only.channel)
        answers = {channel: self._answer_of(channel) for channel in sorted(self._combined)}
        channel = max(answers, key=lambda number: answers[number].max())
        best = best_labels.top_k(answers[channel], self._options.top_k, self._options.min_score)
        ordered = sorted(self._windows, key=lambda each: (each.start_s, each.channel or 0))
        return Answer(best, tuple(ordered), channel or None)

    def _answer_of(self, channel: int) -> np.ndarray:
        combined = self._combined[channel]
        if self._options.combine == "mean":
            combined = combined / self._counts[channel]
        return combined.astype(np.float32)


@dataclass(slots=True, eq=False)
class ClipInWork:
    """A clip of a chunk from its deal to its end, which `end` is told once.

    Loaders and lanes call it from their threads; `lock` is its chunk's.
    """

    claimed: Claimed
    plan: RunPlan
    lock: Any
    end: Callable[[ClipInWork, End], None]
    progressed_at: float = field(default_factory=time.monotonic)
    #: Whether its chunk waits for its end.
    wanted: bool = True
    #: The clips of its chunk and its file, itself among them: all wait for one download.
    beside: list[ClipInWork] = field(default_factory=list)
    #: The same clips of runs that follow its run, and whether it is such a one, which waits.
    followers: list[ClipInWork] = field(default_factory=list)
    held: bool = False
    _dealt: Dealt | None = None
    _facts: Facts | None = None
    _scores: Scores | None = None
    _scored: int = 0
    _decoded_at: float = 0.0
    _classify_ms: float = 0.0
    #: Copies of it, which wait for its end.
    _copies: list[tuple[ClipInWork, Known]] = field(default_factory=list)
    _ended: bool = False
    _failure: Failure | None = None

    @property
    def clip_id(self) -> int:
        return self.claimed.id

    @property
    def uri(self) -> str:
        return self.claimed.uri

    @property
    def part(self) -> Part | None:
        return self.claimed.part

    @property
    def is_one_window(self) -> bool:
        return self._facts is not None and self._facts.windows == 1

    def begin(self, dealt: Dealt) -> None:
        with self.lock:
            self._dealt = dealt
            self._facts = self._failure = None
            self._ended = False
            self._scores = Scores(self.plan.options)
            self._scored = 0
            if dealt.job.held and not self.held:
                dealt.release()

    def release(self) -> None:
        """Have it heard, since the run that its run follows lets it through."""
        with self.lock:
            self.held = False
            if self._dealt is not None:
                self._dealt.release()

    def decoded(self, dealt: Dealt, facts: Facts) -> None:
        with self.lock:
            if dealt is self._dealt:
                self._facts = facts
                self._decoded_at = time.perf_counter()
                self._note_progress()

    def ended(self, dealt: Dealt, end: End) -> None:
        with self.lock:
            if dealt is self._dealt:
                self._close(end)

    def scored(self, window: LoadedWindow, outcome: best_labels.Outcome) -> None:
        with self.lock:
            if window.dealt is not self._dealt:
                return
            if isinstance(outcome, ClipError):
                window.dealt.cancel()
                source = self._facts and self._facts.source
                self._close(Failure(self.clip_id, outcome, source or None))
                return
            assert self._scores is not None
            self._scores.add(window.span, outcome, window.channel)
            self._scored += 1
            self._note_progress()

    def cancel(self) -> None:
        """Stop the work on it: nobody waits for its end any more."""
        with self.lock:
            dealt, self._dealt = self._dealt, None
            self.wanted = False
            self._let_copies_go()
        if dealt is not None:
            dealt.cancel()

    def success(self) -> Success:
        """Return the outcome of a clip whose windows all have scores."""
        facts, scores = self._facts, self._scores
        assert facts is not None
        assert scores is not None
        timings = replace(facts.timings, classify_ms=facts.room_ms + self._classify_ms)
        return scores.success(self.clip_id, facts.source, facts.audio, timings)

    def wait_for_end(self, copy: ClipInWork, known: Known) -> bool:
        """End a copy with `known` again when this clip ends; False if this is not at work."""
        with self.lock:
            at_work = self._dealt is not None and copy is not self
            if at_work:
                self._copies.append((copy, known))
            return at_work

    def outcome_of(self, copy: ClipInWork, known: Known) -> Outcome | None:
        """Return the outcome that this clip shares with a copy, if its bytes have one."""
        first: Outcome | None = self._failure
        if self._ended:
            first = replace(self.success(), reused=True)
        if first is None or first.source != known.source:
            return None
        return replace(first, clip_id=copy.clip_id, timings=known.timings)

    def _note_progress(self) -> None:
        self.progressed_at = time.monotonic()
        for copy, _ in self._copies:
            copy.progressed_at = self.progressed_at
        for other in self.beside:
            other.progressed_at = self.progressed_at
        if self._facts is not None and self._scored == self._facts.windows:
            self._classify_ms = (time.perf_counter() - self._decoded_at) * 1000
            self._close(None)

    def _close(self, end: End) -> None:
        self._dealt = None
        self._ended = end is None
        if isinstance(end, Failure) and _is_of_bytes(end.error):
            self._failure = end
        self.end(self, end)
        self._let_copies_go()

    def _let_copies_go(self) -> None:
        copies, self._copies = self._copies, []
        for copy, known in copies:
            copy.end(copy, known)


def _is_of_bytes(error: ClipError) -> bool:
    return isinstance(error, DecodeError) and not isinstance(error, BY_CHANCE)


class WindowQueue:
    """The queues in front of the models, for the windows of clips in work."""

    def put(self, loaded: list[LoadedWindow]) -> list[LoadedWindow]:
        """Queue windows; return those whose model is closed, since their chunk is at its end."""
        # Imported here because it imports torch, which takes seconds.
        from workers.scoring.batcher import QueuedWindow

        groups: dict[Batcher, list[QueuedWindow]] = defaultdict(list)
        for window in loaded:
            clip = cast("ClipInWork", window.dealt.clip)
            options, model = clip.plan.options, clip.plan.model
            function = options.function_to_apply or model.card.function_to_apply
            best = options.top_k if clip.is_one_window else 0
            queued = QueuedWindow(window.samples, function, window, best, options.embeddings)
            groups[model.batcher].append(queued)
        refused = []
        for batcher, queue in groups.items():
            try:
                batcher.put(queue)
            except RuntimeError:
                refused += [cast("LoadedWindow", queued.tag) for queued in queue]
        return refused

    def take_back(self, clips: Iterable[Loading]) -> list[LoadedWindow]:
        """Return the waiting windows that nobody wants, out of the queues of these clips."""
        unwanted: list[LoadedWindow] = []

        def is_wanted(queued: QueuedWindow) -> bool:
            window = cast("LoadedWindow", queued.tag)
            if not window.dealt.wanted:
                unwanted.append(window)
            return window.dealt.wanted

        for batcher in {cast("ClipInWork", clip).plan.model.batcher for clip in clips}:
            batcher.drop(is_wanted)
        return unwanted
