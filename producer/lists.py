"""A list in, its rows out: txt, csv, tsv, jsonl or parquet, compressed or not, local or remote."""

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
#: A URL or path as the list has it, and the other columns of its row.
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
DELIMITERS: dict[InputFormat, str] = {"tsv": "\t", "csv": ","}
COMPRESSED_SUFFIXES = frozenset({".gz", ".zst", ".zstd", ".bz2"})
#: Far longer than any URL. A transcript in a cell may reach it.
MAX_LINE_CHARS = 1024**2
#: Refused lines shown one by one; the others are only counted.
EXAMPLES = 10
#: Columns looked through for the URL column while a format is guessed.
SNIFFED_COLUMNS = 1000
PARQUET_ROWS_AT_ONCE = 20_000


@dataclass(frozen=True, slots=True)
class Refused:
    """A line of a list that gave no clip, with the reason."""

    place: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.place}, line {self.line}: {self.reason}"


@dataclass(slots=True)
class Tally:
    """Counts of the lines read so far: clips + blank + refused + extra = lines."""

    #: Lines of text, rows of a parquet, files of a folder.
    lines: int = 0
    clips: int = 0
    #: Empty lines and comments.
    blank: int = 0
    #: A table's header, and the second and later lines of a cell.
    extra: int = 0
    refused: int = 0
    examples: list[Refused] = field(default_factory=list)

    def refuse(self, place: str, line: int, reason: str) -> None:
        self.refused += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(Refused(place, line, reason))


def named_format(name: str) -> InputFormat | None:
    """Return the format of a list by its name, if the name has a known suffix."""
    path = PurePosixPath(name)
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        path = path.with_suffix("")
    return LIST_SUFFIXES.get(path.suffix.lower())


class ListReader:
    """Reads one list, row by row, of any format, compression and place.

    Use one per list, and iterate `rows()` once. A line that cannot be used goes into the tally
    with its number and the reason; reading goes on with the next line.
    """

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
            UsageError: the list cannot be opened, is of no known format, or lacks the URL column.
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
        if self._format != "auto":
            return self._format
        known = named_format(display_uri(self.place)) or self._sniffed(stream.peek())
        if known:
            return known
        if self.place == "-":
            return "txt"
        suffixes = ", ".join(LIST_SUFFIXES)
        raise UsageError(
            reason=f"{self.shown} is neither audio nor a list known by name ({suffixes}) or"
            " content: say --input-format."
        )

    def _sniffed(self, head: bytes) -> InputFormat | None:
        """Guess the format from the first bytes of a list."""
        if head.startswith(b"PAR1"):
            return "parquet"
        first_line = head.decode(_encoding(head), "replace").lstrip().partition("\n")[0].strip()
        if first_line.startswith("{"):
            return "jsonl"
        for table_format, delimiter in DELIMITERS.items():
            if delimiter in first_line and self._heads_table(first_line, delimiter):
                return table_format
        if "://" in first_line:
            return "txt"
        return None

    def _heads_table(self, line: str, delimiter: str) -> bool:
        names = line.split(delimiter)[:SNIFFED_COLUMNS]
        return any(name.strip('" ') == self._url_col for name in names)

    def _text(self, stream: io.BufferedReader, input_format: InputFormat) -> Iterator[Row]:
        # A byte that is no text in this encoding is read as \xff, so that its row alone fails.
        text = io.TextIOWrapper(
            stream, encoding=_encoding(stream.peek()), errors="backslashreplace", newline=""
        )
        try:
            if input_format == "txt":
                yield from self._plain(self._lines(text))
            elif input_format == "jsonl":
                yield from self._jsonl(self._lines(text))
            else:
                yield from self._table(self._lines(text), DELIMITERS[input_format])
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
            if isinstance(value, dict):
                uri, meta = value.pop(self._url_col, None), value
            else:
                uri, meta = value, {}
            if row := self._row(uri, meta):
                yield row

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
            elif row := self._row(cells.pop(at), _meta(names, cells), line):
                yield row

    def _records(self, lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
        """Yield the records of a table, each with the number of its first line."""
        csv.field_size_limit(MAX_LINE_CHARS)
        source = _RecordLines(lines)
        while True:
            try:
                for cells in csv.reader(source.read(), delimiter=delimiter):
                    _check_quotes(source.record)
                    self._tally.extra += len(source.record) - 1
                    yield self._first_line(source), cells
                    source.record.clear()
            except csv.Error as error:
                # An unclosed quote swallows the rows after it. Only its first line is refused.
                self.refuse(f"it is no row of a table: {error}", self._first_line(source))
                source.read_again()
            else:
                return

    def _first_line(self, source: _RecordLines) -> int:
        """Return the number of the line at which the current record begins."""
        return self.number - len(source.again) - len(source.record) + 1

    def _parquet(self, stream: io.BufferedReader) -> Iterator[Row]:
        import polars as pl

        with _seekable(self.place, stream) as path:
            try:
                frame = pl.scan_parquet(path, glob=False)
                self._url_column(frame.collect_schema().names())
                rows = frame.select(pl.len()).collect().item()
                # Slice by slice: polars' own batches hold several row groups, however large.
                for start in range(0, rows, PARQUET_ROWS_AT_ONCE):
                    piece = frame.slice(start, PARQUET_ROWS_AT_ONCE).collect()
                    for meta in piece.iter_rows(named=True):
                        self.number += 1
                        if row := self._row(meta.pop(self._url_col), meta):
                            yield row
            except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
                self._break_off(str(error).partition("\n")[0])
            finally:
                self._tally.lines += self.number

    def _row(self, uri: Any, meta: Mapping[str, Any], line: int | None = None) -> Row | None:
        """Return a row, or refuse its line and return None."""
        if isinstance(uri, str) and (text := uri.strip()):
            return text, meta
        self.refuse(f"there is no text in {self._url_col!r}", line)
        return None

    def _url_column(self, names: list[str]) -> int:
        if self._url_col not in names:
            columns = ", ".join(names) or "none at all"
            raise UsageError(
                reason=f"{self.shown} has no column {self._url_col!r}; it has {columns[:500]}."
                " Say --url-col."
            )
        return names.index(self._url_col)


class _RecordLines:
    """The lines of a table. All lines of a record but its first can be read a second time."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        #: The lines of the current record.
        self.record: list[str] = []
        #: Lines to be read a second time.
        self.again: deque[str] = deque()

    def read(self) -> Iterator[str]:
        while self.again:
            line = self.again.popleft()
            self.record.append(line)
            yield line
        for line in self._lines:
            self.record.append(line)
            yield line

    def read_again(self) -> None:
        """Drop the current record's first line, and have `read` yield its other lines again."""
        self.again.extendleft(reversed(self.record[1:]))
        self.record.clear()


def _meta(names: list[str], cells: list[str]) -> dict[str, str]:
    if len(cells) == len(names):
        return dict(zip(names, cells, strict=True))
    meta = dict(zip(names, cells, strict=False))
    if len(cells) > len(names):
        meta["more"] = ",".join(cells[len(names) :])
    for name in names[len(cells) :]:
        meta[name] = ""
    return meta


def _check_quotes(lines: list[str]) -> None:
    if len(lines) > 1 and "".join(lines).count('"') % 2:
        raise csv.Error("a quote is never closed")


def _encoding(head: bytes) -> str:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    return "utf-8-sig"


@contextmanager
def _opened(place: str, shown: str) -> Iterator[io.BufferedReader]:
    with ExitStack() as files:
        try:
            raw = sys.stdin.buffer if place == "-" else files.enter_context(_raw(place))
            stream = _decompressed(cast("io.BufferedReader", raw))
            if stream is not raw:
                files.enter_context(stream)
        except Exception as error:
            # fsspec's file systems raise any exception of their libraries.
            reason = f"The list {shown} cannot be read: {_reason(error)}."
            raise UsageError(reason=reason) from error
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
    # A parquet is read from its end, so a remote one is copied first.
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
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
