"""Is this worker fit? Outcomes in; clips for other workers, and a pause of this one, out."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from db.registry import Pause
from earmark.core.clips import Failure
from earmark.core.errors import Cause, FileNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from db.ledger import Claim, Claimed
    from earmark.core.clips import Outcome

logger = logging.getLogger(__name__)

#: So many errors in a row that may be the worker's are the worker's.
STREAK = 8
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

    def __init__(self, worker: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._worker = worker
        self._clock = clock
        self._lock = threading.Lock()
        self._streak = 0
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
        for outcome in outcomes:
            clip = clips[outcome.clip_id]
            if not isinstance(outcome, Failure) or _is_clips_own(outcome, clip):
                self._reset_streak()
                judged.append(outcome)
                continue
            if outcome.error.cause is Cause.worker:
                self._lengthen_streak(claim.run_id, outcome)
            judged.append(replace(outcome, given_back=self._should_give_back(clip)))
        return judged

    def _should_give_back(self, clip: Claimed) -> bool:
        before = clip.workers_before
        return len(before) < MOST_GIVEN_BACK and self._worker not in before

    def _reset_streak(self) -> None:
        if self._streak:
            with self._lock:
                self._reset()

    def _reset(self) -> None:
        self._streak, self._pause_s = 0, SHORTEST_PAUSE_S
        self._paused_until = float("-inf")

    def _lengthen_streak(self, run_id: int, failure: Failure) -> None:
        with self._lock:
            self._streak += 1
            if self._streak < STREAK or self.pause:
                return
            error = failure.error
            self._pause = Pause(
                f"{self._streak} clips in a row ended with {error.code}: {error}", run_id
            )
            self._paused_until = self._clock() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        logger.error(
            "this worker takes no chunks for a while: %s",
            self._pause.reason,
            extra={"action": "worker_paused", "code": failure.error.code},
        )


def _is_clips_own(failure: Failure, clip: Claimed) -> bool:
    error = failure.error
    return error.cause is Cause.clip or (
        isinstance(error, FileNotFound) and _folder_has_files(clip.uri)
    )


def _folder_has_files(uri: str) -> bool:
    """Return whether the folder of a missing file is there: then its disk is mounted here."""
    path = Path(unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri)
    try:
        with os.scandir(path.parent) as entries:
            return any(entries)
    except OSError:
        return False
