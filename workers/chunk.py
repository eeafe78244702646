"""A claimed chunk in progress: its clips in work, their outcomes, and those to give back."""

from __future__ import annotations

import math
import threading
from collections import defaultdict, deque
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from db.passes import lets_through, unheard
from earmark.core.clips import Part, Postponed, Success
from workers.clip import ClipInWork
from workers.loading.process import Known, Suspected

if TYPE_CHECKING:
    from collections.abc import Mapping

    from db.claims import Claim
    from earmark.core.clips import Outcome
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

    def verdict(self, clip: ClipInWork) -> Outcome | Postponed | None:
        """Return the end that the run that a clip's run follows has for it; None: it is heard."""

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
        #: Those of them that wait for another one's outcome.
        self._held: set[ClipInWork] = set()
        self._start(self._let_through(self._clips_in_work()))

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

    def _let_through(self, clips: list[ClipInWork]) -> list[ClipInWork]:
        """Return clips without those that another run has decided; some wait for it here."""
        by_id = {clip.clip_id: clip for clip in clips}
        started = []
        for clip in clips:
            end = None
            if first := by_id.get(clip.claimed.first or 0):
                first.followers.append(clip)
                clip.held = True
                self._held.add(clip)
            elif clip.claimed.first is not None:
                end = self._work.verdict(clip)
            if end is None:
                started.append(clip)
            else:
                self._take(clip, end)
        return started

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
        left = len(self._running) - len(self._held)
        if len(self._ended) >= left or isinstance(end, (Known, Suspected)):
            self._wake.set()

    def _take_ended(self) -> None:
        while self._ended:
            clip, end = self._ended.popleft()
            if self._running.pop(clip.clip_id, None):
                self._held.discard(clip)
                self._take(clip, end)

    def _take(self, clip: ClipInWork, end: End) -> None:
        match end:
            case None:
                self._note(clip, clip.success())
            case Postponed():
                self._note(clip, end)
            case Suspected() if clip.held:
                # By itself, once the other run has decided.
                self._note(clip, Postponed(clip.clip_id, 0.0))
            case Suspected():
                self._running[clip.clip_id] = clip
                self._work.quarantine(clip)
            case Known():
                self._take_known(clip, end)
            case _:
                self._note(clip, end)

    def _note(self, clip: ClipInWork, end: Outcome | Postponed) -> None:
        if isinstance(end, Postponed):
            self.given_back[clip.clip_id] = end.delay_s
        else:
            self._outcomes.append(end)
        for follower in clip.followers:
            if follower in self._held:
                self._held.remove(follower)
                self._decide(follower, clip, end)

    def _decide(self, clip: ClipInWork, first: ClipInWork, end: Outcome | Postponed) -> None:
        """Have a clip heard, or end it as the same clip of the run that its run follows says."""
        if isinstance(end, Success):
            labels = first.plan.model.card.labels
            heard = ((labels[each.label], each.score) for each in end.predictions)
            if lets_through(heard, clip.plan.options):
                clip.release()
                return
            end = unheard(end, clip.clip_id)
        clip.cancel()
        del self._running[clip.clip_id]
        self._note(clip, replace(end, clip_id=clip.clip_id))

    def _take_known(self, clip: ClipInWork, known: Known) -> None:
        first = self._work.in_work(known.clip_id)
        if first and first.wait_for_end(clip, known):
            self._running[clip.clip_id] = clip
            return
        outcome = first and first.outcome_of(clip, known)
        outcome = outcome or self._work.result_of(known, clip)
        if outcome:
            self._note(clip, outcome)
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
            if self._running.pop(clip.clip_id, None):
                clip.cancel()
                self._held.discard(clip)
                self._note(clip, Postponed(clip.clip_id, 0.0))
        self._work.forget(clips)
