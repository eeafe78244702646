"""The queue in front of a model: windows of all chunks in, a future score for each out."""

from __future__ import annotations

import atexit
import faulthandler
import logging
import math
import os
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NoReturn

import torch

from earmark.core import errors, settings
from workers import metrics
from workers.scoring import classifier as classifiers

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from workers.scoring.classifier import Classifier

logger = logging.getLogger(__name__)

#: Windows looked at for a batch: enough to fill it with like lengths, and quick to choose from.
_LOOK_AHEAD = 512


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """A queued window, with the future of its scores."""

    samples: np.ndarray
    function_to_apply: str
    scores: Future[np.ndarray] = field(default_factory=Future)


class Batcher:
    """Scores windows that many threads submit, in batches.

    Use one per loaded model and close it. A model that becomes free takes the windows that are
    ready; there is no timer. Each lane of the classifier is a thread: one a core on a CPU, which
    beats dividing one forward pass; two on CUDA, where one prepares its batch while the other runs.

    A batcher that fails, or whose model is silent for EARMARK_WORKER__SILENT_BATCHER_S, ends the
    process (exit 70), because clips would wait for it without end.
    """

    def __init__(self, classifier: Classifier, worker: settings.Worker) -> None:
        self.classifier = classifier
        self._max_bytes = int(worker.in_flight_bytes)
        self._silent_s = worker.silent_batcher_s
        self._waiting: deque[_Entry] = deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._busy_since: dict[int, float] = {}
        lanes = [classifier, *(classifier.twin() for _ in range(classifier.lanes - 1))]
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name="model", daemon=True)
            for lane in lanes
        ]
        self._threads.append(threading.Thread(target=self._watch, name="model-watch", daemon=True))
        for thread in self._threads:
            thread.start()
        atexit.register(self._abandon)

    def submit(
        self, samples: np.ndarray, function_to_apply: str | None = None
    ) -> Future[np.ndarray]:
        """Queue one window, shape (samples,), float32; return its future scores, shape (labels,).

        Blocks while waiting windows hold EARMARK_WORKER__IN_FLIGHT_BYTES, so that decoders run no
        further ahead. The future raises a ClipError if its window fails. Cancelling it removes
        the window from the queue.

        Raises:
            RuntimeError: the batcher is closed.
        """
        entry = _Entry(samples, function_to_apply or self.classifier.card.function_to_apply)
        with self._changed:
            self._changed.wait_for(lambda: self._closed.is_set() or self._has_room(samples.nbytes))
            if self._closed.is_set():
                raise RuntimeError("this batcher is closed")
            self._waiting.append(entry)
            self._waiting_bytes += samples.nbytes
            self._changed.notify_all()
        return entry.scores

    def _has_room(self, nbytes: int) -> bool:
        return not self._waiting or self._waiting_bytes + nbytes <= self._max_bytes

    @property
    def waiting_bytes(self) -> int:
        """Bytes of decoded audio that wait."""
        return self._waiting_bytes

    def close(self) -> None:
        """Score the waiting windows, then stop."""
        atexit.unregister(self._abandon)
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _abandon(self) -> None:
        """Stop after the running batches: Python aborts if it exits under a running model."""
        with self._changed:
            while self._waiting:
                self._waiting.popleft().scores.cancel()
        self.close()

    def _work(self, lane: Classifier) -> None:
        if lane.device == "cpu":
            torch.set_num_threads(1)
        try:
            while self._wait():
                self._deliver(lane, self._take(lane))
        except BaseException as error:  # windows would wait for a dead lane without end
            _die(f"the batcher failed: {error!r}")

    def _wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed.is_set() or self._waiting)
            return bool(self._waiting)

    def _take(self, lane: Classifier) -> list[_Entry]:
        """Take a batch out of the queue, without its cancelled windows."""
        with self._changed:
            batch = self._choose(lane)
            for entry in batch:
                self._waiting.remove(entry)
                self._waiting_bytes -= entry.samples.nbytes
            self._changed.notify_all()
        return [entry for entry in batch if entry.scores.set_running_or_notify_cancel()]

    def _choose(self, lane: Classifier) -> list[_Entry]:
        """Return a batch for a lane, out of its share of the waiting windows."""
        if not self._waiting:
            return []
        share = math.ceil(len(self._waiting) / lane.lanes)
        ahead = list(islice(self._waiting, min(share, _LOOK_AHEAD)))
        lengths = [len(entry.samples) for entry in ahead]
        return [ahead[place] for place in lane.choose(lengths)]

    def _deliver(self, lane: Classifier, batch: Sequence[_Entry]) -> None:
        if not batch:
            return
        self._busy_since[threading.get_ident()] = time.monotonic()
        outcomes = lane.outcomes([entry.samples for entry in batch])
        for entry, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, errors.ModelError) and not lane.healthy():
                _die(f"the model fails on {lane.device} even on silence: {outcome}")
            if isinstance(outcome, errors.ClipError):
                entry.scores.set_exception(outcome)
            else:
                entry.scores.set_result(classifiers.apply(outcome, entry.function_to_apply))
        metrics.batch(len(batch), time.monotonic() - self._busy_since.pop(threading.get_ident()))

    def _watch(self) -> None:
        while not self._closed.wait(self._silent_s / 4):
            now = time.monotonic()
            longest_s = now - min(self._busy_since.copy().values(), default=now)
            if longest_s > self._silent_s:
                _die(f"the model has not answered for {longest_s:.0f} s")


def _die(reason: str) -> NoReturn:
    """End the process at once: a supervisor starts another, and leases bring the clips back."""
    logger.critical(
        "%s; the worker ends", reason, exc_info=sys.exception(), extra={"action": "batcher_broken"}
    )
    faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    os._exit(errors.BROKEN_EXIT)
