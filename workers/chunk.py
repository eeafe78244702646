"""A claimed chunk in progress: its running clips, those that wait for their host, its outcomes."""

from __future__ import annotations

from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING

from earmark.core.clips import Postponed

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from db.ledger import Claim, Claimed
    from earmark.core.clips import Outcome

#: A waiting chunk checks this often whether the worker stops.
CHECK_EVERY_S = 0.25
#: A chunk's message is acknowledged after this; slow clips finish in the background.
PATIENCE_S = 5.0
#: A stopping worker lets running clips end for this long, and gives the others back.
DRAIN_S = 5.0


class ChunkInProgress:
    """The clips of one claim, from their start to their outcomes.

    Use one per claim, from one thread: `run` it for as long as you can wait, `collect` the
    outcomes to record them, and `give_back` the rest. `classify` starts a clip on another thread
    and returns its future. Clips that wait less than PATIENCE_S for their host are started again
    here; the others are given back.
    """

    def __init__(
        self,
        claim: Claim,
        classify: Callable[[Claimed], Future[Outcome | Postponed]],
        deadline_s: float,
    ) -> None:
        self.claim = claim
        self.outcomes: list[Outcome] = []
        #: By id, the clips to give back, and the seconds until they may be tried again.
        self.given_back: dict[int, float] = {}
        self._classify = classify
        self._deadline = monotonic() + deadline_s
        self._stopping = False
        self._running: dict[Future[Outcome | Postponed], Claimed] = {}
        # Each future puts itself here when it ends, so that nothing has to look at all of them.
        self._ended: SimpleQueue[Future[Outcome | Postponed]] = SimpleQueue()
        self._parked: list[tuple[float, Claimed]] = []
        self._start(claim.clips)

    @property
    def unfinished(self) -> bool:
        return bool(self._running or self._parked)

    def stop(self) -> None:
        """Let running clips end within DRAIN_S, and give back the others."""
        if not self._stopping:
            self._stopping = True
            self._deadline = min(self._deadline, monotonic() + DRAIN_S)
            self.give_back(lambda future: not future.cancel())

    def run(self, patience_s: float, stopping: threading.Event) -> None:
        """Run until each clip has an outcome, or `patience_s` or the chunk's deadline is over."""
        until = min(monotonic() + patience_s, self._deadline)
        while self.unfinished and monotonic() < min(until, self._deadline):
            if stopping.is_set():
                self.stop()
            with suppress(Empty):
                self._take(self._ended.get(timeout=CHECK_EVERY_S))
            self._unpark()

    def give_back(
        self, keep: Callable[[Future[Outcome | Postponed]], bool] = lambda _: False
    ) -> None:
        """Give back every clip but those to be kept running."""
        running, parked = self._running, self._parked
        self._running, self._parked = {}, []
        for future, clip in running.items():
            if keep(future):
                self._running[future] = clip
            else:
                self.given_back[clip.id] = 0.0
        for _, clip in parked:
            self.given_back[clip.id] = 0.0

    def collect(self) -> list[Outcome]:
        """Return the outcomes since the last call."""
        collected, self.outcomes = self.outcomes, []
        return collected

    def _start(self, clips: Iterable[Claimed]) -> None:
        for clip in clips:
            future = self._classify(clip)
            self._running[future] = clip
            future.add_done_callback(self._ended.put)

    def _take(self, ended: Future[Outcome | Postponed]) -> None:
        clip = self._running.pop(ended, None)
        if clip is None:  # it was given back
            return
        result = ended.result()
        if not isinstance(result, Postponed):
            self.outcomes.append(result)
        elif result.delay_s < PATIENCE_S:
            self._parked.append((monotonic() + result.delay_s, clip))
        else:
            self.given_back[clip.id] = result.delay_s

    def _unpark(self) -> None:
        now = monotonic()
        parked, self._parked = self._parked, []
        for due_at, clip in parked:
            if due_at <= now:
                self._start([clip])
            else:
                self._parked.append((due_at, clip))
