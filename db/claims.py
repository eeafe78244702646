"""What a worker has claimed: clips that are its own until their leases end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from earmark.core.clips import Part


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
    part: Part | None = None
    run_id: int = 0
    #: The same clip of the run that its run follows; 0 if there is none any more.
    first: int | None = None

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

    @property
    def ids(self) -> set[int]:
        return {clip.id for clip in self.clips}

    def by_run(self) -> Iterator[Claim]:
        """Yield the part of each run."""
        runs: dict[int, list[Claimed]] = defaultdict(list)
        for clip in self.clips:
            runs[clip.run_id].append(clip)
        for run_id, clips in runs.items():
            yield replace(self, clips=tuple(clips), run_id=run_id)
