"""A claimed clip in, its outcome out: fetch, decode, cut into windows, score, combine."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

import numpy as np

from earmark.core.clips import Failure, Postponed, Source, Success, Timings, WindowPredictions
from earmark.core.errors import ClipError, DatabaseError, EarmarkError, ModelError, ServiceError
from workers import metrics
from workers.fetching.polite import HostBusyError
from workers.scoring import spans, windows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from db.ledger import Claimed
    from earmark.core.clips import AudioFacts, Outcome, Part, Waveform, Window
    from workers.decoding.pool import Decoded, Decoders
    from workers.fetching.breaker import Breaker
    from workers.fetching.fetch import Fetched
    from workers.models import RunPlan

logger = logging.getLogger(__name__)

#: A clip is put off by this while the database or the decoders are out of reach.
SERVICE_PAUSE_S = 10.0


class ClipFetcher(Protocol):
    """The fetcher of a pipeline; a worker's is a `PoliteFetcher`."""

    @property
    def breaker(self) -> Breaker: ...

    def fetch(self, uri: str, part: Part | None = None) -> Fetched: ...

    def close(self) -> None: ...


class Observer(Protocol):
    """Sees a clip between the stages of a pipeline."""

    def fetched(self, fetched: Fetched) -> None: ...

    def decoded(self, decoded: Decoded) -> None: ...


class Pipeline:
    """Classifies claimed clips, one per call, from many threads.

    Use one per worker and close it. It never raises: each clip ends as a Success, a Failure, or a
    Postponed if it has to be tried later. Pass an `observer` to see a clip between its stages.
    """

    def __init__(
        self,
        fetcher: ClipFetcher,
        decoders: Decoders,
        decoding_at_once: int,
        observer: Observer | None = None,
    ) -> None:
        self._fetcher = fetcher
        self._observer = observer
        self._decoders = decoders
        # Held until the model's queue has taken all windows, so that its limit bounds the audio.
        self._decoding = threading.Semaphore(decoding_at_once)

    def classify(self, clip: Claimed, plan: RunPlan) -> Outcome | Postponed:
        """Return the clip's outcome, or Postponed if its host or a service is not available now."""
        journey = _Journey(clip.id)
        try:
            return self._classify(clip, plan, journey)
        except HostBusyError as busy:
            return Postponed(clip.id, busy.wait_s)
        except ServiceError as error:
            logger.warning(
                "clip %d is put off: %s", clip.id, error, extra={"action": "clip_put_off"}
            )
            return Postponed(clip.id, SERVICE_PAUSE_S)
        except ClipError as error:
            return journey.failure(error)
        except Exception as error:
            logger.exception("clip %d failed unexpectedly", clip.id, extra={"action": "clip_error"})
            return journey.failure(ModelError(reason=repr(error)))

    @property
    def offline(self) -> bool:
        """Whether the worker's own network seems to be down."""
        return self._fetcher.breaker.open

    def close(self) -> None:
        self._fetcher.close()
        self._decoders.close()

    def _classify(self, clip: Claimed, plan: RunPlan, journey: _Journey) -> Success:
        if plan.reuse_urls and (known := _known(plan, clip.id, None)):
            return known
        with journey.stage("fetch_ms"):
            fetched = self._fetcher.fetch(clip.uri, clip.part)
        journey.source = fetched.source
        if self._observer:
            self._observer.fetched(fetched)
        try:
            known = _known(plan, clip.id, fetched.source)
        except ServiceError:
            fetched.file.close()
            raise
        if known:
            fetched.file.close()
            return replace(known, timings=journey.timings)
        sample_rate = plan.model.card.sample_rate
        with fetched.file, self._turn(journey):
            with journey.stage("decode_ms"):
                decoded = self._decoders.decode(fetched.file, sample_rate)
            if self._observer:
                self._observer.decoded(decoded)
            with journey.stage("classify_ms"):
                waveform, facts, start_s = spans.cut(decoded.waveform, decoded.facts, clip.part)
                scoring = _submit(waveform, start_s, plan)
        with journey.stage("classify_ms"):
            scored = [(window, future.result()) for window, future in scoring]
        return journey.success(facts, scored, plan)

    @contextmanager
    def _turn(self, journey: _Journey) -> Iterator[None]:
        # The wait for a decoder counts as decoding, so that too few decoders can be noticed.
        start = perf_counter()
        with journey.stage("decode_ms"):
            self._decoding.acquire()
        metrics.decoder_wait(perf_counter() - start)
        try:
            yield
        finally:
            self._decoding.release()


def _submit(
    waveform: Waveform, start_s: float, plan: RunPlan
) -> list[tuple[Window, Future[np.ndarray]]]:
    """Cut a waveform, which begins at `start_s`, into windows and queue each for the model."""
    card, options, batcher = plan.model.card, plan.options, plan.model.batcher
    cut = windows.split(
        waveform,
        window_s=card.usable_window_s(options.window_s),
        hop_s=options.hop_s,
        min_samples=card.min_samples,
    )
    cut = spans.shifted(cut, start_s)
    return [(window, batcher.submit(window.samples, options.function_to_apply)) for window in cut]


def _known(plan: RunPlan, clip_id: int, source: Source | None) -> Success | None:
    """Look up a clip's result; any failure of this is the database's, never the clip's."""
    try:
        try:
            return plan.known(clip_id, source)
        except DatabaseError:
            # The connection may have ended in the pool. All of them have been replaced by now.
            return plan.known(clip_id, source)
    except EarmarkError:
        raise
    except Exception as error:
        logger.exception(
            "a look-up in the database failed unexpectedly", extra={"action": "lookup_failed"}
        )
        reason = f"The look-up of a clip's result failed: {error!r}"
        raise DatabaseError(reason=reason, bug=True) from error


class _Journey:
    """The source and timings of a clip so far, for its outcome."""

    def __init__(self, clip_id: int) -> None:
        self.clip_id = clip_id
        self.source: Source | None = None
        self._ms: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self._ms[name] = self._ms.get(name, 0.0) + (perf_counter() - start) * 1000

    @property
    def timings(self) -> Timings:
        return Timings(**self._ms)

    def failure(self, error: ClipError) -> Failure:
        return Failure(self.clip_id, error, self.source, self.timings)

    def success(
        self, facts: AudioFacts, scored: list[tuple[Window, np.ndarray]], plan: RunPlan
    ) -> Success:
        assert self.source is not None
        options = plan.options
        combined = windows.combine(np.stack([scores for _, scores in scored]), options.combine)
        predictions = windows.top_k(combined, options.top_k, options.min_score)
        by_window = []
        if len(scored) > 1:
            for window, scores in scored:
                top = windows.top_k(scores, options.top_k, options.min_score)
                by_window.append(WindowPredictions(window.start_s, window.end_s, top))
        return Success(
            self.clip_id, self.source, facts, predictions, tuple(by_window), self.timings
        )
