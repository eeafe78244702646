"""One clip at a time, by a loader and a model of its own: for suspects, and without a queue."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from queue import SimpleQueue
from typing import TYPE_CHECKING

from earmark.core.clips import Failure
from earmark.core.errors import WorkerLost
from workers.clip import ClipInWork, WindowQueue
from workers.loading.loaders import Loaders
from workers.loading.process import Known, Suspected
from workers.models import plan_alone

if TYPE_CHECKING:
    from db.claims import Claimed
    from earmark.core.clips import Outcome, Postponed
    from earmark.core.options import RunOptions
    from earmark.core.settings import Settings
    from workers.clip import End
    from workers.loading.process import Observer


class Alone:
    """A loader with one decoder, and a model behind it. Use one per process, and close it.

    Raises ServiceError when created if the model or the decoder cannot be had.

    Args:
        observer: sees each step. With one, neither the limits that workers share nor their Redis
            is asked for.
        queue: in place of the queue in front of the model.
    """

    def __init__(
        self,
        settings: Settings,
        options: RunOptions,
        observer: Observer | None = None,
        queue: WindowQueue | None = None,
    ) -> None:
        one = settings.changed(worker={"loaders": 1, "decoders": 1})
        with ExitStack() as opened:
            self._loaders = Loaders(one, queue or WindowQueue(), observer)
            opened.callback(self._loaders.close)
            self.plan = plan_alone(options, settings, self._loaders.scored)
            opened.callback(self.plan.model.batcher.close)
            self._loaders.wait_until_ready()
            self._opened = opened.pop_all()

    def classify(self, clip: Claimed) -> Outcome | Postponed:
        """Return the clip's outcome; `worker_lost` if loaders die of it."""
        ends: SimpleQueue[End] = SimpleQueue()
        work = ClipInWork(clip, self.plan, threading.Lock(), lambda _, end: ends.put(end))
        self._loaders.deal([(work, self.plan.job)])
        end = ends.get()
        if end is None:
            return work.success()
        if isinstance(end, Suspected):
            return Failure(clip.id, WorkerLost())
        assert not isinstance(end, Known)  # a clip of no run shares nothing
        return end

    def close(self) -> None:
        self._opened.close()
