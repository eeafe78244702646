"""A claimed chunk in progress: what runs, what waits for its host, what has come out."""

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

#: How often a waiting chunk looks whether the worker is to stop.
LOOK_UP_S = 0.25
#: After this a chunk's slow clips no longer hold up the next chunk.
PATIENCE_S = 5.0
#: A stopping worker lets running clips end within this, and gives the others back.
DRAIN_S = 5.0


class ChunkInProgress:
    """A claimed chunk on its way: what runs, what waits for its host, what has come out."""

    def __init__(
        self,
        claim: Claim,
        classify: Callable[[Claimed], Future[Outcome | Postponed]],
        deadline_s: float,
    ) -> None:
        self.claim = claim
        self.outcomes: list[Outcome] = []
        #: Clips to give back, and after how many seconds they may be tried again.
        self.given_back: dict[int, float] = {}
        self._classify = classify
        self._deadline = monotonic() + deadline_s
        self._stopping = False
        self._running: dict[Future[Outcome | Postponed], Claimed] = {}
        # Futures put themselves here: to wait for the first of sixteen would look at all of them for each that ends.
        self._ended: SimpleQueue[Future[Outcome | Postponed]] = SimpleQueue()
        self._parked: list[tuple[float, Claimed]] = []
        self._start(claim.clips)

    @property
    def unfinished(self) -> bool:
        return bool(self._running or self._parked)

    def stop(self) -> None:
        """Let what has begun end soon, and give back the rest."""
        if not self._stopping:
            self._stopping = True
            self._deadline = min(self._deadline, monotonic() + DRAIN_S)
            self.give_back(lambda future: not future.cancel())

    def go_on(self, patience_s: float, stopping: threading.Event) -> None:
        """Go on until every clip has come out, patience is at its end, or the chunk's time is up."""
        until = min(monotonic() + patience_s, self._deadline)
        while self.unfinished and monotonic() < min(until, self._deadline):
            if stopping.is_set():
                self.stop()
            with suppress(Empty):
                self._take(self._ended.get(timeout=LOOK_UP_S))
            self._unpark()

    def give_back(
        self, keep: Callable[[Future[Outcome | Postponed]], bool] = lambda _: False
    ) -> None:
        """Give up every clip that is not to be kept running."""
        kept = {future: clip for future, clip in self._running.items() if keep(future)}
        left = [clip for future, clip in self._running.items() if future not in kept]
        left += [clip for _, clip in self._parked]
        self.given_back |= dict.fromkeys([clip.id for clip in left], 0.0)
        self._running, self._parked = kept, []

    def collect(self) -> list[Outcome]:
        """Return the outcomes since the last time."""
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
        due = [clip for at, clip in self._parked if at <= monotonic()]
        self._parked = [(at, clip) for at, clip in self._parked if clip not in due]
        self._start(due)
