"""A batcher that gives a future for each window, and bounds the bytes that wait in it."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, cast

from earmark.core.errors import ClipError
from workers.scoring.batcher import Batcher, QueuedWindow

if TYPE_CHECKING:
    import numpy as np

    from earmark.core.settings import Worker
    from workers.scoring.classifier import Classifier


class FutureBatcher(Batcher):
    """A batcher whose callers wait for their windows one by one."""

    def __init__(self, classifier: Classifier, worker: Worker) -> None:
        self._max_bytes = int(worker.in_flight_bytes)
        self._taken = threading.Condition()
        super().__init__(classifier, worker, self._resolve)

    def submit(self, samples: np.ndarray, function: str | None = None) -> Future[np.ndarray]:
        """Queue one window, shape (samples,), float32; return its future scores, shape (labels,).

        Blocks while waiting windows hold EARMARK_WORKER__IN_FLIGHT_BYTES, so that decoders run no
        further ahead. The future raises a ClipError if its window fails.

        Raises:
            RuntimeError: the batcher is closed.
        """
        scores: Future[np.ndarray] = Future()
        function = function or self.classifier.card.function_to_apply
        with self._taken:
            self._taken.wait_for(lambda: self._has_room(samples.nbytes))
            self.put([QueuedWindow(samples, function, scores)])
        return scores

    def _has_room(self, nbytes: int) -> bool:
        return not self.waiting_bytes or self.waiting_bytes + nbytes <= self._max_bytes

    def _resolve(self, batch: list[QueuedWindow], outcomes: list[np.ndarray | ClipError]) -> None:
        for window, outcome in zip(batch, outcomes, strict=True):
            scores = cast("Future[np.ndarray]", window.tag)
            if isinstance(outcome, ClipError):
                scores.set_exception(outcome)
            else:
                scores.set_result(outcome)
        with self._taken:
            self._taken.notify_all()
