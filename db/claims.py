"""What a worker has claimed: clips that are its own until their leases end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

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

    @property
    def workers_before(self) -> list[str]:
        """The workers that gave it back."""
        return (self.given_back_by or "").split()


@dataclass(frozen=True, slots=True)
class Claim:
    """The clips of a chunk that are still to do, and the token that lets their results in."""

    token: int
    clips: tuple[Claimed, ...]
    run_id: int = 0
    #: How many of its clips ended with which error so far.
    errors: Counter[str] = field(default_factory=Counter, compare=False)
