"""Is this worker fit? Outcomes in; clips for other workers, and a pause of this one, out."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from urllib.parse import unquote

from db.claims import Claim, Claimed
from db.worker_registry import Pause
from earmark.core.clips import Failure, Outcome
from earmark.core.errors import Cause, DatabaseError, FileNotFound

logger = logging.getLogger(__name__)

#: So many errors in a row that may be the worker's are the worker's.
STREAK = 8
#: So many statements in a row that the database refuses as wrong: none will be recorded.
REFUSALS = 3
#: A clip is given back at most so often; the next worker's error is final.
MOST_GIVEN_BACK = 2
#: The pause before a worker tries again; it doubles while it stays unfit.
SHORTEST_PAUSE_S = 15.0
LONGEST_PAUSE_S = 120.0


class Fitness:
    """Judges a worker by its outcomes, and pauses it after a streak of errors of its own.

    Use one per worker, shared by its threads: `judge` all outcomes before they are recorded, and
    take no chunk while there is a `pause`. An error of the network pauses nobody here: that is
    the breaker's business.
    """

    def __init__(
        self,
        worker: str,
        file_roots: Sequence[Path],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker = worker
        self._roots = [Path(os.path.realpath(root)) for root in file_roots]
        self._clock = clock
        self._lock = threading.Lock()
        self._streak = self._refusals = 0
        self._pause: Pause | None = None
        self._pause_s = SHORTEST_PAUSE_S
        self._paused_until = float("-inf")

    @property
    def pause(self) -> Pause | None:
        """Why to take no chunks; None after the pause, for a try."""
        return self._pause if self._clock() < self._paused_until else None

    def end_pause(self) -> None:
        """Take chunks again: there are other runs than the one that cannot be done here."""
        with self._lock:
            self._reset()

    def judge(self, claim: Claim, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Return the outcomes to record: clips that another worker should try are given back."""
        clips = {clip.id: clip for clip in claim.clips}
        judged: list[Outcome] = []
        beside = _other_model_works(claim, outcomes)
        for outcome in outcomes:
            clip = clips[outcome.clip_id]
            if not isinstance(outcome, Failure) or outcome.error.cause is Cause.clip:
                self._reset_streak()
                judged.append(outcome)
                continue
            own = isinstance(outcome.error, FileNotFound) and _disk_is_there(clip, self._roots)
            # What another worker gave back is no sign of this one.
            sign = outcome.error.cause is Cause.worker and not own and not clip.workers_before
            if sign and not beside:
                self._lengthen_streak(claim.run_id, outcome)
            given_back = self._should_give_back(clip, own=own)
            judged.append(replace(outcome, given_back=given_back, own=own))
        return judged

    def recorded(self) -> None:
        """Note that the database took some outcomes."""
        self._refusals = 0

    def refused(self, run_id: int, error: DatabaseError) -> None:
        """Note that the database refused a statement of Earmark as wrong."""
        with self._lock:
            self._refusals += 1
            if self._refusals >= REFUSALS:
                self._begin_pause(Pause(str(error), run_id), "database")

    def _should_give_back(self, clip: Claimed, *, own: bool) -> bool:
        before = clip.workers_before
        if own:
            return not before and not _folder_has_files(clip)
        return len(before) < MOST_GIVEN_BACK and self._worker not in before

    def _reset_streak(self) -> None:
        if self._streak:
            with self._lock:
                self._reset()

    def _reset(self) -> None:
        self._streak, self._pause_s = 0, SHORTEST_PAUSE_S
        self._paused_until = float("-inf")

    def _lengthen_streak(self, run_id: int, failure: Failure) -> None:
        error = failure.error
        with self._lock:
            self._streak += 1
            if self._streak >= STREAK:
                reason = f"{self._streak} clips in a row ended with {error.code}: {error}"
                # A full disk may have room again: that is no reason to pause the run as well.
                paused_run = None if error.transient else run_id
                self._begin_pause(Pause(reason, paused_run), error.code)

    def _begin_pause(self, pause: Pause, code: str) -> None:
        if self.pause:
            return
        self._pause = pause
        self._paused_until = self._clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        logger.error(
            "this worker takes no chunks for a while: %s",
            pause.reason,
            extra={"action": "worker_paused", "code": code},
        )


def _other_model_works(claim: Claim, outcomes: Sequence[Outcome]) -> bool:
    """Return whether one model of a pass succeeds: what fails beside it is not the worker."""
    several = len(set(map(attrgetter("run_id"), claim.clips))) > 1
    return several and not all(isinstance(outcome, Failure) for outcome in outcomes)


def _disk_is_there(clip: Claimed, roots: Sequence[Path]) -> bool:
    """Return whether the nearest folder above a missing file holds something.

    A folder where a disk is to be mounted is empty without it. Above the roots nothing counts.
    """
    for folder in _path(clip).parents:
        if not any(folder.is_relative_to(root) for root in roots):
            return False
        if folder.exists():
            return _has_entries(folder)
    return False


def _folder_has_files(clip: Claimed) -> bool:
    return _has_entries(_path(clip).parent)


def _has_entries(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entries)
    except OSError:
        return False


def _path(clip: Claimed) -> Path:
    path = clip.uri.removeprefix("file://")
    return Path(os.path.realpath(unquote(path) if path != clip.uri else path))
