"""Sources in (lists, folders, globs, audio files, standard input), a stream of clips out."""

from __future__ import annotations

import csv
import glob
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from earmark.clips import Clip
from earmark.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

InputFormat = Literal["auto", "txt", "csv", "tsv"]

AUDIO_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("wav", "flac", "ogg", "oga", "opus", "mp3", "m4a", "aac", "mp4", "webm", "mka", "wma", "amr"),
        *("aif", "aiff", "aifc", "au", "snd", "caf", "w64", "rf64"),
    )
)
LIST_SUFFIXES: dict[str, InputFormat] = {".txt": "txt", ".lst": "txt", ".csv": "csv", ".tsv": "tsv"}
#: A quoted cell may be a transcript; the csv module's own limit is 128 kB.
MAX_CELL_CHARS = 16 * 1024**2


@dataclass(slots=True)
class Tally:
    """What reading has passed over so far, to be reported."""

    blank: int = 0


def read_clips(
    sources: Iterable[str], *, input_format: InputFormat = "auto", url_col: str = "url", tally: Tally | None = None
) -> Iterator[Clip]:
    """Yield the clips of each source in turn, reading as it goes.

    A source is a URL, an audio file, a folder (every file in it, hidden ones apart), a glob, a list file or `-`.

    Raises:
        UsageError: a source does not exist, its format is not known, or it lacks the URL column.
    """
    reading = _Reading(input_format, url_col, tally or Tally())
    for source in sources:
        yield from reading.source(source)


@dataclass(frozen=True, slots=True)
class _Reading:
    input_format: InputFormat
    url_col: str
    tally: Tally

    def source(self, source: str) -> Iterator[Clip]:
        path = Path(source).expanduser()
        if source == "-":
            yield from self.lines(sys.stdin, Path.cwd(), self.format_of(path, standard_input=True))
        elif "://" in source:
            yield Clip(source)
        elif path.is_dir():
            yield from _walk(path)
        elif path.is_file():
            yield from self.file(path)
        elif glob.has_magic(source):
            yield from self.matches(str(path))
        else:
            raise UsageError(reason=f"There is no file or folder {source!r}.")

    def matches(self, pattern: str) -> Iterator[Clip]:
        found = sorted(glob.iglob(pattern, recursive=True))  # noqa: PTH207 - the pattern may be absolute
        if not found:
            raise UsageError(reason=f"No file matches {pattern!r}.")
        for match in found:
            if Path(match).is_file():
                yield from self.file(Path(match))

    def file(self, path: Path) -> Iterator[Clip]:
        if self.input_format == "auto" and path.suffix.lower() in AUDIO_SUFFIXES:
            yield Clip(_storable(path))
            return
        with _opened(path) as lines:
            yield from self.lines(lines, path.parent, self.format_of(path))

    def format_of(self, path: Path, *, standard_input: bool = False) -> InputFormat:
        if self.input_format != "auto":
            return self.input_format
        if standard_input:
            return "txt"
        try:
            return LIST_SUFFIXES[path.suffix.lower()]
        except KeyError:
            known = ", ".join(sorted(LIST_SUFFIXES))
            raise UsageError(
                reason=f"{path} is neither audio nor a list that its name tells ({known}): say --input-format."
            ) from None

    def lines(self, lines: TextIO, folder: Path, input_format: InputFormat) -> Iterator[Clip]:
        if input_format == "txt":
            return self.plain(lines, folder)
        return self.table(lines, folder, "\t" if input_format == "tsv" else ",")

    def plain(self, lines: TextIO, folder: Path) -> Iterator[Clip]:
        for line in lines:
            text = line.strip()
            if not text or text.startswith("#"):
                self.tally.blank += 1
            else:
                yield Clip(_resolved(text, folder))

    def table(self, lines: TextIO, folder: Path, delimiter: str) -> Iterator[Clip]:
        csv.field_size_limit(MAX_CELL_CHARS)
        rows = csv.DictReader(lines, delimiter=delimiter, restkey="more", restval="")
        if self.url_col not in (rows.fieldnames or ()):
            columns = ", ".join(rows.fieldnames or ()) or "none at all"
            raise UsageError(reason=f"The list has no column {self.url_col!r}; it has {columns}. Say --url-col.")
        for row in rows:
            uri = row.pop(self.url_col).strip()
            if uri:
                yield Clip(_resolved(uri, folder), {name: _text(cell) for name, cell in row.items()})
            else:
                self.tally.blank += 1


def _walk(folder: Path) -> Iterator[Clip]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Clip(_storable(Path(parent, name)))


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        # A byte that is not UTF-8 shows up as \xff in its row's URI: the line fails by itself and is not lost.
        with path.open(encoding="utf-8-sig", errors="backslashreplace", newline="") as lines:
            yield lines
    except OSError as error:
        raise UsageError(reason=f"The list {path} cannot be read: {error.strerror}.") from error


def _resolved(text: str, folder: Path) -> str:
    text = _text(text)
    if "://" in text:
        return text
    path = folder / Path(text).expanduser()
    return _storable(path) if path.exists() or Path(text).is_absolute() else text


def _storable(path: Path) -> str:
    absolute = str(path.absolute())
    return absolute if absolute.isprintable() else path.absolute().as_uri()


def _text(cell: str | list[str]) -> str:
    # PostgreSQL's text has no NUL.
    return (cell if isinstance(cell, str) else ",".join(cell)).replace("\0", "\\x00")
