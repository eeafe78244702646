"""A claimed chunk in progress: its clips in work, their outcomes, and those to give back."""

from __future__ import annotations

import math
import threading
from collections import defaultdict, deque
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from earmark.core.clips import Part, Postponed
from workers.clip import ClipInWork
from workers.loading.process import Known, Suspected

if TYPE_CHECKING:
    from collections.abc import Mapping

    from db.claims import Claim
    from earmark.core.clips import Outcome, Success
    from workers.clip import End
    from workers.models import RunPlan

#: A waiting chunk checks this often whether the worker stops.
CHECK_EVERY_S = 0.25
#: A chunk's message is acknowledged after this; slow clips finish in the background.
PATIENCE_S = 5.0
#: A stopping worker lets clips at a decoder or the model end for this long, and gives them back
#: then.
DRAIN_S = 5.0
#: A clip is suspected of killing workers once this many died while they held it.
SUSPECT_CRASHES = 2


class Work(Protocol):
    """The ways in which clips come to their end."""

    def load(self, clips: list[ClipInWork], *, join: bool) -> None:
        """Have clips loaded and scored; `join` those whose content is at work already."""

    def quarantine(self, clip: ClipInWork) -> None:
        """Have a suspect classified in a process of its own."""

    def in_work(self, clip_id: int) -> ClipInWork | None:
        """Return a clip of any chunk of this worker."""

    def result_of(self, known: Known, clip: ClipInWork) -> Success | None:
        """Return the recorded result that a clip shares, if there is one."""

    def forget(self, clips: list[ClipInWork]) -> None:
        """Take clips out of the queue of the model."""

    def drain(self) -> None:
        """Have clips given back that are at no decoder."""


class ChunkInProgress:
    """The clips of one claim, from their start to their outcomes.

    Those of runs that are not among the `plans` are left out.

    Use one per claim, from one thread: `run` it for as long as you can wait, `collect` the
    outcomes to record them, and `give_back` the rest. A clip whose host wants a longer pause is
    given back, and so is a clip that makes no progress for `deadline_s`.
    """

    def __init__(
        self, claim: Claim, plans: Mapping[int, RunPlan], deadline_s: float, work: Work
    ) -> None:
        self.claim = claim
        self.plans = plans
        #: By id, the clips to give back, and the seconds until they may be tried again.
        self.given_back: dict[int, float] = {}
        self._work = work
        self._deadline_s = deadline_s
        self._give_up_at = math.inf
        self._lock = threading.Lock()
        self._outcomes: list[Outcome] = []
        self._ended: deque[tuple[ClipInWork, End]] = deque()
        #: The chunk's thread has something to do.
        self._wake = threading.Event()
        self._running: dict[int, ClipInWork] = {}
        self._start(self._clips_in_work())

    @property
    def unfinished(self) -> bool:
        return bool(self._running)

    def run(self, patience_s: float, stopping: threading.Event) -> None:
        """Run until each clip has an outcome or is given back, or `patience_s` is over."""
        until = monotonic() + patience_s
        while self._running and monotonic() < min(until, self._give_up_at):
            if stopping.is_set():
                self._drain()
            self._wake.wait(CHECK_EVERY_S)
            self._wake.clear()
            self._take_ended()
            self._give_back_stuck()

    def give_back(self) -> None:
        """Give back every clip that is not at its end."""
        self._take_ended()
        self._stop(list(self._running.values()))

    def collect(self) -> list[Outcome]:
        """Return the outcomes since the last call."""
        self._take_ended()
        collected, self._outcomes = self._outcomes, []
        return collected

    def _clips_in_work(self) -> list[ClipInWork]:
        clips = []
        files: dict[tuple[Any, ...], list[ClipInWork]] = defaultdict(list)
        for claimed in self.claim.clips:
            if claimed.run_id not in self.plans:
                continue
            clip = ClipInWork(claimed, self.plans[claimed.run_id], self._lock, self._end)
            clip.beside = files[clip.uri, (clip.part or Part()).place]
            clip.beside.append(clip)
            clips.append(clip)
        return clips

    def _start(self, clips: list[ClipInWork], *, join: bool = True) -> None:
        innocent = []
        for clip in clips:
            self._running[clip.clip_id] = clip
            if clip.claimed.crashes >= SUSPECT_CRASHES:
                self._work.quarantine(clip)
            else:
                innocent.append(clip)
        if innocent:
            self._work.load(innocent, join=join)

    def _end(self, clip: ClipInWork, end: End) -> None:
        # Called by any thread, which does as little as it can: others wait for it.
        self._ended.append((clip, end))
        if len(self._ended) == len(self._running) or isinstance(end, (Known, Suspected)):
            self._wake.set()

    def _take_ended(self) -> None:
        while self._ended:
            clip, end = self._ended.popleft()
            if self._running.pop(clip.clip_id, None):
                self._take(clip, end)

    def _take(self, clip: ClipInWork, end: End) -> None:
        match end:
            case None:
                self._outcomes.append(clip.success())
            case Postponed():
                self.given_back[clip.clip_id] = end.delay_s
            case Suspected():
                self._running[clip.clip_id] = clip
                self._work.quarantine(clip)
            case Known():
                self._take_known(clip, end)
            case _:
                self._outcomes.append(end)

    def _take_known(self, clip: ClipInWork, known: Known) -> None:
        first = self._work.in_work(known.clip_id)
        if first and first.wait_for_end(clip, known):
            self._running[clip.clip_id] = clip
            return
        outcome = first and first.outcome_of(clip, known)
        outcome = outcome or self._work.result_of(known, clip)
        if outcome:
            self._outcomes.append(outcome)
        else:
            self._start([clip], join=False)

    def _drain(self) -> None:
        if self._give_up_at == math.inf:
            self._give_up_at = monotonic() + DRAIN_S
            self._work.drain()

    def _give_back_stuck(self) -> None:
        since = monotonic() - self._deadline_s
        stuck = [clip for clip in self._running.values() if clip.progressed_at < since]
        if stuck:
            self._stop(stuck)

    def _stop(self, clips: list[ClipInWork]) -> None:
        for clip in clips:
            clip.cancel()
            del self._running[clip.clip_id]
            self.given_back[clip.clip_id] = 0.0
        self._work.forget(clips)
