"""Counts of the lines of lists, and examples of those that gave no clip."""

from __future__ import annotations

from dataclasses import dataclass, field

#: Refused lines shown one by one; the others are only counted.
EXAMPLES = 10


@dataclass(frozen=True, slots=True)
class Refused:
    """A line of a list that gave no clip, with the reason."""

    place: str
    line: int
    reason: str

    def __str__(self) -> str:
        place = f"{self.place}, line {self.line}" if self.line else self.place
        return f"{place}: {self.reason}"


@dataclass(slots=True)
class Tally:
    """Counts of the lines read so far: clips + blank + refused + extra + not_audio = lines."""

    #: Lines of text, rows of a parquet, files of a folder.
    lines: int = 0
    clips: int = 0
    #: Empty lines and comments.
    blank: int = 0
    #: A table's header, and the second and later lines of a cell.
    extra: int = 0
    refused: int = 0
    #: Files of a folder or a glob that are neither audio nor a list.
    not_audio: int = 0
    #: Those of them that are shown.
    passed_over: int = 0
    #: Clips whose file was not there, and the path of the first that was tried.
    missing: int = 0
    tried: str = ""
    #: Sentences on how a list was read, where that is not plain.
    notes: list[str] = field(default_factory=list)
    examples: list[Refused] = field(default_factory=list)

    def refuse(self, place: str, line: int, reason: str) -> None:
        self.refused += 1
        self._show(Refused(place, line, reason))

    def pass_over(self, file: str, reason: str) -> None:
        """Count a file of a glob that is no clip, and show it."""
        self.lines += 1
        self.not_audio += 1
        self.passed_over += 1
        self._show(Refused(file, 0, reason))

    def _show(self, refused: Refused) -> None:
        if len(self.examples) < EXAMPLES:
            self.examples.append(refused)
