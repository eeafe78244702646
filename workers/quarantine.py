"""A clip suspected of killing workers in, its outcome out, from a process that may die of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from types import SimpleNamespace

from db.claims import Claimed
from earmark.core import broker
from earmark.core.clips import Failure, Outcome, Postponed
from earmark.core.errors import EarmarkError, ModelError, WorkerLost
from earmark.core.options import RunOptions
from earmark.core.processes import end_with_parent
from earmark.core.settings import Settings
from workers.alone import Alone

#: What the process of a quarantine keeps.
_here = SimpleNamespace()


class Quarantine:
    """A process for suspected clips, one at a time.

    Use one per worker and close it. The process starts with the first clip, and again after each
    death.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._alone = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def classify(self, clip: Claimed, options: RunOptions) -> Outcome | Postponed:
        """Return the clip's outcome: `worker_lost` if the process dies or hangs."""
        with self._alone:
            self._pool = self._pool or self._start()
            try:
                working = self._pool.submit(_classify_alone, clip, options)
                return working.result(self._settings.worker.chunk_deadline_s / 2)
            except (BrokenProcessPool, TookTooLong):
                self.close()
                return Failure(clip.id, WorkerLost())
            except EarmarkError as error:
                return Failure(clip.id, ModelError(reason=str(error)))

    def close(self) -> None:
        """End the process at once."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            self._pool.shutdown()
            self._pool = None

    def _start(self) -> ProcessPoolExecutor:
        fresh = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(
            1, fresh, initializer=_begin, initargs=(os.getpid(), self._settings)
        )


def _begin(parent: int, settings: Settings) -> None:
    _here.settings = settings
    end_with_parent(parent, signal.SIGKILL)
    broker.configure(settings.broker)


def _classify_alone(clip: Claimed, options: RunOptions) -> Outcome | Postponed:
    return _equipment(options).classify(clip)


@cache
def _equipment(options: RunOptions) -> Alone:
    return Alone(_here.settings, options)
