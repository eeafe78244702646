"""A list in, its rows out, streamed: txt, csv, tsv, jsonl or parquet, compressed or not, on this machine or another."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import shutil
import sys
import tempfile
from collections import deque
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from earmark.core import options
from earmark.core.clips import display_uri
from earmark.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

InputFormat = options.InputFormat
#: A URL or path as the list has it, and all else its row says.
Row = tuple[str, "Mapping[str, Any]"]

LIST_SUFFIXES: dict[str, InputFormat] = {
    ".txt": "txt",
    ".lst": "txt",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
COMPRESSED_SUFFIXES = frozenset({".gz", ".zst", ".zstd", ".bz2"})
#: No URL comes near it; a transcript in a cell may.
MAX_LINE_CHARS = 1024**2
#: So many refused lines are told one by one, the rest are counted.
EXAMPLES = 10
PARQUET_ROWS_AT_ONCE = 20_000


@dataclass(frozen=True, slots=True)
class Refused:
    """A line of a list that gave no clip, and why."""

    place: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.place}, line {self.line}: {self.reason}"


@dataclass(slots=True)
class Tally:
    """What became of the lines read so far: clips + blank + refused + extra = lines."""

    #: Lines of text, rows of a parquet, files of a folder.
    lines: int = 0
    clips: int = 0
    #: Empty lines and comments.
    blank: int = 0
    #: A table's header, and the further lines of cells that hold several.
    extra: int = 0
    refused: int = 0
    examples: list[Refused] = field(default_factory=list)

    def refuse(self, place: str, line: int, reason: str) -> None:
        self.refused += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(Refused(place, line, reason))


def named_format(name: str) -> InputFormat | None:
    """Return the format that a list's name tells."""
    path = PurePosixPath(name)
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        path = path.with_suffix("")
    return LIST_SUFFIXES.get(path.suffix.lower())


class ListReader:
    """Reads one list; a line that cannot be used is told with its number, and the rest goes on."""

    def __init__(
        self, place: str, tally: Tally, *, input_format: InputFormat = "auto", url_col: str = "url"
    ) -> None:
        self.place = place
        self.shown = "standard input" if place == "-" else display_uri(place)
        #: The line or row being read, from 1.
        self.number = 0
        self._tally = tally
        self._format = input_format
        self._url_col = url_col

    def rows(self) -> Iterator[Row]:
        """Yield the list's rows as they are read.

        Raises:
            UsageError: the list cannot be opened, its format is not known, or it lacks the URL column.
        """
        with _opened(self.place, self.shown) as stream:
            input_format = self._format_of(stream)
            if input_format == "parquet":
                yield from self._parquet(stream)
            else:
                yield from self._text(stream, input_format)

    def refuse(self, reason: str, line: int | None = None) -> None:
        self._tally.refuse(self.shown, line or self.number, reason)

    def _format_of(self, stream: io.BufferedReader) -> InputFormat:
        found = self._format if self._format != "auto" else named_format(display_uri(self.place))
        found = found or self._sniffed(stream.peek()) or ("txt" if self.place == "-" else None)
        if found is None:
            known = ", ".join(LIST_SUFFIXES)
            raise UsageError(
                reason=f"{self.shown} is neither audio nor a list known by name ({known}) or content: "
                "say --input-format."
            )
        return found

    def _sniffed(self, head: bytes) -> InputFormat | None:
        if head.startswith(b"PAR1"):
            return "parquet"
        first = head.decode(_encoding(head), "replace").lstrip().partition("\n")[0].strip()
        if first.startswith("{"):
            return "jsonl"
        for delimiter, table in (("\t", "tsv"), (",", "csv")):
            if (
                self._url_col in [name.strip('" ') for name in first.split(delimiter)[:1000]]
                and delimiter in first
            ):
                return cast("InputFormat", table)
        return "txt" if "://" in first else None

    def _text(self, stream: io.BufferedReader, input_format: InputFormat) -> Iterator[Row]:
        # A byte that does not belong to the encoding shows up as \xff: its row fails by itself and is not lost.
        text = io.TextIOWrapper(
            stream, encoding=_encoding(stream.peek()), errors="backslashreplace", newline=""
        )
        try:
            if input_format == "txt":
                yield from self._plain(self._lines(text))
            elif input_format == "jsonl":
                yield from self._jsonl(self._lines(text))
            else:
                yield from self._table(self._lines(text), "\t" if input_format == "tsv" else ",")
        finally:
            self._tally.lines += self.number
            text.detach()

    def _lines(self, text: io.TextIOWrapper) -> Iterator[str]:
        while line := self._next(text):
            self.number += 1
            if len(line) <= MAX_LINE_CHARS:
                yield line
                continue
            while line and not line.endswith(("\n", "\r")):
                line = text.readline(MAX_LINE_CHARS)
            self.refuse(f"it is longer than {MAX_LINE_CHARS} characters")

    def _next(self, text: io.TextIOWrapper) -> str:
        try:
            return text.readline(MAX_LINE_CHARS + 1)
        except Exception as error:
            self._break_off(str(error))
            return ""

    def _break_off(self, reason: str) -> None:
        self.number += 1
        self.refuse(f"the list breaks off here: {reason}")

    def _plain(self, lines: Iterator[str]) -> Iterator[Row]:
        for line in lines:
            text = line.strip()
            if not text or text[0] == "#":
                self._tally.blank += 1
            else:
                yield text, {}

    def _jsonl(self, lines: Iterator[str]) -> Iterator[Row]:
        for line in lines:
            if not line.strip():
                self._tally.blank += 1
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                self.refuse(f"it is not JSON: {error}")
                continue
            row = value if isinstance(value, dict) else {self._url_col: value}
            yield from self._usable(row.pop(self._url_col, None), row)

    def _table(self, lines: Iterator[str], delimiter: str) -> Iterator[Row]:
        records = self._records(lines, delimiter)
        names = next(records, (0, []))[1]
        at = self._url_column(names)
        self._tally.extra += 1
        names.pop(at)
        for line, cells in records:
            if not cells:
                self._tally.blank += 1
            elif len(cells) <= at:
                self.refuse(
                    f"it has {len(cells)} cells, and {self._url_col!r} is number {at + 1}", line
                )
            else:
                yield from self._usable(cells.pop(at), _meta(names, cells), line)

    def _records(self, lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
        csv.field_size_limit(MAX_LINE_CHARS)
        #: The lines of the record being read, and lines to be read a second time.
        held: list[str] = []
        again: deque[str] = deque()

        def give() -> Iterator[str]:
            while (line := again.popleft() if again else next(lines, None)) is not None:
                held.append(line)
                yield line

        while True:
            try:
                for cells in csv.reader(give(), delimiter=delimiter):
                    _check_quotes(held)
                    self._tally.extra += len(held) - 1
                    yield self.number - len(again) - len(held) + 1, cells
                    held.clear()
            except csv.Error as error:
                # A quote that is never closed swallows what follows: only its first line is given up.
                self.refuse(
                    f"it is no row of a table: {error}", self.number - len(again) - len(held) + 1
                )
                again.extendleft(reversed(held[1:]))
                held.clear()
            else:
                return

    def _parquet(self, stream: io.BufferedReader) -> Iterator[Row]:
        import polars as pl

        with _seekable(self.place, stream) as path:
            try:
                frame = pl.scan_parquet(path, glob=False)
                names = frame.collect_schema().names()
                at = self._url_column(names)
                names.pop(at)
                rows = frame.select(pl.len()).collect().item()
                # Slice by slice: polars' own batches hold several row groups at once, whatever their size.
                for start in range(0, rows, PARQUET_ROWS_AT_ONCE):
                    for cells in frame.slice(start, PARQUET_ROWS_AT_ONCE).collect().iter_rows():
                        self.number += 1
                        yield from self._usable(
                            cells[at], dict(zip(names, cells[:at] + cells[at + 1 :], strict=True))
                        )
            except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
                self._break_off(str(error).partition("\n")[0])
            finally:
                self._tally.lines += self.number

    def _usable(self, uri: Any, meta: Mapping[str, Any], line: int | None = None) -> Iterator[Row]:
        if isinstance(uri, str) and (uri := uri.strip()):
            yield uri, meta
        else:
            self.refuse(f"there is no text in {self._url_col!r}", line)

    def _url_column(self, names: list[str]) -> int:
        if self._url_col not in names:
            columns = ", ".join(names) or "none at all"
            raise UsageError(
                reason=f"{self.shown} has no column {self._url_col!r}; it has {columns[:500]}. Say --url-col."
            )
        return names.index(self._url_col)


def _meta(names: list[str], cells: list[str]) -> dict[str, str]:
    if len(cells) > len(names):
        return {**dict(zip(names, cells, strict=False)), "more": ",".join(cells[len(names) :])}
    return dict(zip(names, cells + [""] * (len(names) - len(cells)), strict=True))


def _check_quotes(lines: list[str]) -> None:
    if len(lines) > 1 and "".join(lines).count('"') % 2:
        raise csv.Error("a quote is never closed")


def _encoding(head: bytes) -> str:
    return "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"


@contextmanager
def _opened(place: str, shown: str) -> Iterator[io.BufferedReader]:
    with ExitStack() as files:
        try:
            raw = sys.stdin.buffer if place == "-" else files.enter_context(_raw(place))
            stream = _decompressed(cast("io.BufferedReader", raw))
            if stream is not raw:
                files.enter_context(stream)
        except Exception as error:
            # fsspec's file systems raise whatever their library does.
            raise UsageError(
                reason=f"The list {shown} cannot be read: {_reason(error)}."
            ) from error
        yield stream


def _raw(place: str) -> io.BufferedReader:
    if "://" not in place:
        return Path(place).open("rb")
    import fsspec

    return io.BufferedReader(fsspec.open(place, "rb").open())


def _decompressed(raw: io.BufferedReader) -> io.BufferedReader:
    head = raw.peek(4)
    if head.startswith(b"\x1f\x8b"):
        return io.BufferedReader(cast("io.RawIOBase", gzip.open(raw)))
    if head.startswith(b"BZh"):
        return io.BufferedReader(cast("io.RawIOBase", bz2.open(raw)))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return io.BufferedReader(_zstd().open(raw))
    return raw


def _zstd() -> Any:
    return import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


@contextmanager
def _seekable(place: str, stream: io.BufferedReader) -> Iterator[Path]:
    # A parquet is read from its end, so one that comes from elsewhere is copied first.
    if stream.seekable() and isinstance(stream.raw, io.FileIO) and place != "-":
        yield Path(place)
        return
    with tempfile.NamedTemporaryFile(suffix=".parquet") as copy:
        shutil.copyfileobj(cast("BinaryIO", stream), copy)
        copy.flush()
        yield Path(copy.name)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return (
        (error.strerror if isinstance(error, OSError) else None)
        or str(error)
        or type(error).__name__
    )
