"""The one queue in front of the model: windows of all chunks in, full batches through, a future score for each."""

from __future__ import annotations

import atexit
import faulthandler
import logging
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

#: Enough to fill any batch with like lengths, few enough that choosing costs nothing.
_LOOK_AHEAD = 512


@dataclass(frozen=True, slots=True, eq=False)
class _Ticket:
    samples: np.ndarray
    function_to_apply: str
    scores: Future[np.ndarray] = field(default_factory=Future)


class Batcher:
    """Score windows submitted from many threads; whenever the model is free it takes what is ready, on no timer.

    Each of the classifier's lanes is a thread: on a CPU one a core, which beats sharing out one forward pass; on CUDA
    two, so that one prepares its batch while the other's runs.
    """

    def __init__(self, classifier: Classifier, worker: settings.Worker) -> None:
        self.classifier = classifier
        self._max_bytes = int(worker.in_flight_bytes)
        self._silent_s = worker.silent_batcher_s
        self._waiting: deque[_Ticket] = deque()
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
        """Queue one window, (samples,) float32, and return its future scores, (labels,), or ClipError.

        Blocks while the windows waiting hold `in_flight_bytes`, so that decoders run no further ahead. Cancelling
        the future takes the window out of the queue.
        """
        ticket = _Ticket(samples, function_to_apply or self.classifier.card.function_to_apply)
        with self._changed:
            self._changed.wait_for(lambda: self._closed.is_set() or self._has_room(samples.nbytes))
            if self._closed.is_set():
                raise RuntimeError("this batcher is closed")
            self._waiting.append(ticket)
            self._waiting_bytes += samples.nbytes
            self._changed.notify_all()
        return ticket.scores

    def _has_room(self, nbytes: int) -> bool:
        return not self._waiting or self._waiting_bytes + nbytes <= self._max_bytes

    @property
    def waiting_bytes(self) -> int:
        """How much decoded audio waits."""
        return self._waiting_bytes

    def close(self) -> None:
        """Score what is waiting, then stop."""
        atexit.unregister(self._abandon)
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _abandon(self) -> None:
        """Stop after the batches at work: an interpreter that ends under a running model aborts the process."""
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
        except BaseException as error:  # without its lane a window would wait for ever
            _die(f"the batcher failed: {error!r}")

    def _wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed.is_set() or self._waiting)
            return bool(self._waiting)

    def _take(self, lane: Classifier) -> list[_Ticket]:
        with self._changed:
            share = -(-len(self._waiting) // lane.lanes)
            ahead = list(islice(self._waiting, min(share, _LOOK_AHEAD)))
            batch = (
                [ahead[place] for place in lane.choose([len(ticket.samples) for ticket in ahead])]
                if ahead
                else []
            )
            for ticket in batch:
                self._waiting.remove(ticket)
                self._waiting_bytes -= ticket.samples.nbytes
            self._changed.notify_all()
        return [ticket for ticket in batch if ticket.scores.set_running_or_notify_cancel()]

    def _deliver(self, lane: Classifier, batch: Sequence[_Ticket]) -> None:
        if not batch:
            return
        self._busy_since[threading.get_ident()] = time.monotonic()
        for ticket, outcome in zip(
            batch, lane.outcomes([ticket.samples for ticket in batch]), strict=True
        ):
            if isinstance(outcome, errors.ModelError) and not lane.healthy():
                _die(f"the model fails on {lane.device} whatever it is given: {outcome}")
            if isinstance(outcome, errors.ClipError):
                ticket.scores.set_exception(outcome)
            else:
                ticket.scores.set_result(classifiers.apply(outcome, ticket.function_to_apply))
        metrics.batch(len(batch), time.monotonic() - self._busy_since.pop(threading.get_ident()))

    def _watch(self) -> None:
        while not self._closed.wait(self._silent_s / 4):
            longest = max(
                (time.monotonic() - since for since in list(self._busy_since.values())), default=0.0
            )
            if longest > self._silent_s:
                _die(f"the model has not answered for {longest:.0f} s")


def _die(reason: str) -> NoReturn:
    """End the process at once; the supervisor starts another and the leases bring the clips back."""
    logger.critical(
        "%s; the worker ends", reason, exc_info=sys.exception(), extra={"action": "batcher_broken"}
    )
    faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    os._exit(errors.BROKEN_EXIT)
