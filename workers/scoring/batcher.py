"""The queue in front of a model: windows of all chunks in, batches of scores out."""

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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from earmark.core import errors
from workers import metrics
from workers.scoring import devices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np

    from earmark.core import settings
    from workers.scoring.best_labels import Outcome
    from workers.scoring.classifier import Classifier

logger = logging.getLogger(__name__)

#: Windows looked at for a batch: enough to fill it with like lengths, and quick to choose from.
_LOOK_AHEAD = 512


@dataclass(slots=True, eq=False)
class QueuedWindow:
    """A window that waits for the model."""

    #: Shape (samples,), float32. It must stay valid until `scored` is called for this window.
    samples: np.ndarray
    function_to_apply: str
    #: The caller's own. The batcher never looks at it.
    tag: object
    #: 0: the scores of all labels, shape (labels,). Else only the best labels leave the device:
    #: an array of `best_labels.BEST`, shape (top_k,).
    top_k: int = 0
    #: Whether its embedding is wanted too.
    embedded: bool = False
    #: When it was queued, by the monotonic clock.
    queued_at: float = field(default=0.0, init=False)

    @property
    def wanted(self) -> tuple[str, int, bool]:
        """What is wanted of the model: alike for all windows of a batch."""
        return self.function_to_apply, self.top_k, self.embedded


class Batcher:
    """Scores windows that many threads submit, in batches.

    Use one per loaded model and close it. `scored` is called once per batch, from the thread that
    scored it, with the windows and the outcome of each: its scores or its error.
    The queue has no limit of its own: the memory that holds the samples bounds it.

    A model that becomes free takes the windows that are ready; there is no timer. Each lane of the
    classifier is a thread: one a core on a CPU, which beats dividing one forward pass; two on CUDA,
    where one prepares its batch while the other runs.

    A batcher that fails, or whose model is silent for EARMARK_WORKER__SILENT_BATCHER_S, ends the
    process (exit 70), because clips would wait for it without end.
    """

    def __init__(
        self,
        classifier: Classifier,
        worker: settings.Worker,
        scored: Callable[[list[QueuedWindow], list[Outcome]], None],
    ) -> None:
        self.classifier = classifier
        self._scored = scored
        self._silent_s = worker.silent_batcher_s
        self._waiting: deque[QueuedWindow] = deque()
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

    def put(self, windows: Iterable[QueuedWindow]) -> None:
        """Queue windows; this never blocks.

        Raises:
            RuntimeError: the batcher is closed.
        """
        added = list(windows)
        now = time.monotonic()
        for window in added:
            window.queued_at = now
        with self._changed:
            if self._closed.is_set():
                raise RuntimeError("this batcher is closed")
            self._waiting.extend(added)
            self._waiting_bytes += _bytes(added)
            self._changed.notify(len(added))

    def drop(self, keep: Callable[[QueuedWindow], bool]) -> None:
        """Remove the waiting windows for which `keep` returns False.

        `scored` is not called for them; it is still called for windows that are being scored.
        """
        with self._changed:
            self._waiting = deque(window for window in self._waiting if keep(window))
            self._waiting_bytes = _bytes(self._waiting)

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
        self.drop(lambda _: False)
        self.close()

    def _work(self, lane: Classifier) -> None:
        if lane.device == "cpu":
            devices.use_one_thread()
        try:
            while self._wait():
                self._score(lane, self._take(lane))
        except BaseException as error:  # windows would wait for a dead lane without end
            _die(f"the batcher failed: {error!r}")

    def _wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed.is_set() or self._waiting)
            return bool(self._waiting)

    def _take(self, lane: Classifier) -> list[QueuedWindow]:
        """Take a batch out of the queue: the oldest window, and others that go with it."""
        with self._changed:
            # Cores work at the same time. On a GPU, one full batch is quicker than two halves.
            sharing = lane.lanes if lane.device == "cpu" else 1
            share = math.ceil(len(self._waiting) / sharing)
            ahead = [self._waiting.popleft() for _ in range(min(share, _LOOK_AHEAD))]
            batch = _choose(lane, ahead)
            taken = set(map(id, batch))
            self._waiting.extendleft(
                window for window in reversed(ahead) if id(window) not in taken
            )
            self._waiting_bytes -= _bytes(batch)
        return batch

    def _score(self, lane: Classifier, batch: list[QueuedWindow]) -> None:
        if not batch:
            return
        began = time.monotonic()
        self._busy_since[threading.get_ident()] = began
        function, top_k, embedded = batch[0].wanted
        samples = [window.samples for window in batch]
        outcomes = lane.outcomes(samples, function, top_k, embedded=embedded)
        failures = [outcome for outcome in outcomes if isinstance(outcome, errors.ModelError)]
        if failures and not lane.healthy():
            _die(f"the model fails on {lane.device} even on silence: {failures[0]}")
        del self._busy_since[threading.get_ident()]
        waited_s = sum(began - window.queued_at for window in batch)
        metrics.batch(len(batch), waited_s, time.monotonic() - began)
        self._scored(batch, outcomes)

    def _watch(self) -> None:
        while not self._closed.wait(self._silent_s / 4):
            now = time.monotonic()
            longest_s = now - min(self._busy_since.copy().values(), default=now)
            if longest_s > self._silent_s:
                _die(f"the model has not answered for {longest_s:.0f} s")


def _choose(lane: Classifier, ahead: list[QueuedWindow]) -> list[QueuedWindow]:
    """Return a batch out of these windows, with the oldest among them."""
    if not ahead:
        return []
    alike = [window for window in ahead if window.wanted == ahead[0].wanted]
    lengths = [len(window.samples) for window in alike]
    return [alike[place] for place in lane.choose(lengths)]


def _bytes(windows: Iterable[QueuedWindow]) -> int:
    return sum(window.samples.nbytes for window in windows)


def _die(reason: str) -> NoReturn:
    """End the process at once: a supervisor starts another, and leases bring the clips back."""
    logger.critical(
        "%s; the worker ends", reason, exc_info=sys.exception(), extra={"action": "batcher_broken"}
    )
    faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    os._exit(errors.BROKEN_EXIT)
