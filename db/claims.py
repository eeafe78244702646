"""What a worker has claimed: clips that are its own until their leases end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from earmark.core import clips as words


@dataclass(frozen=True, slots=True)
class Claimed:
    """A clip a worker may work on until its lease ends."""

    id: int
    uri: str
    #: This try included.
    attempts: int
    crashes: int
    given_back_by: str | None = None
    #: The part of the file that is the clip; None for all of it.
    part: words.Part | None = None
    run_id: int = 0

    @property
    def workers_before(self) -> list[str]:
        """The workers that gave it back."""
        return (self.given_back_by or "").split()


@dataclass(frozen=True, slots=True)
class Claim:
    """The clips of a chunk that are still to do, and the token that lets their results in.

    Those of the other runs of a pass are among them.
    """

    token: int
    clips: tuple[Claimed, ...]
    run_id: int = 0
    #: How many of its clips ended with which error so far.
    errors: Counter[str] = field(default_factory=Counter, compare=False)

    def by_run(self) -> dict[int, tuple[Claimed, ...]]:
        """Return its clips by run."""
        runs: dict[int, tuple[Claimed, ...]] = {}
        for clip in self.clips:
            runs[clip.run_id] = (*runs.get(clip.run_id, ()), clip)
        return runs
