"""A list in, its rows out: txt, csv, tsv, JSON or parquet, compressed or not, local or remote."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from earmark.core import options
from earmark.core.clips import display_uri
from earmark.core.errors import UsageError
from earmark.core.settings import Fetch
from producer import dialect, elsewhere, streams
from producer.columns import Columns, Row, RowRefused
from producer.places import names_a_clip
from producer.tally import Tally

InputFormat = options.InputFormat

LIST_SUFFIXES: dict[str, InputFormat] = {
    ".txt": "txt",
    ".lst": "txt",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
#: The usual delimiter of a table.
DELIMITERS: dict[InputFormat, str] = {"tsv": "\t", "csv": ","}
COMPRESSED_SUFFIXES = frozenset({".gz", ".zst", ".zstd", ".bz2"})
#: Far longer than any URL. A transcript in a cell may reach it.
MAX_LINE_CHARS = 1024**2
PARQUET_ROWS_AT_ONCE = 20_000
#: Characters of a JSON array read at once.
JSON_BLOCK = 64 * 1024
#: Sets of names that the objects of one JSON list may have before they are looked up anew.
KINDS_KEPT = 100
_BETWEEN_ELEMENTS = re.compile(r"[\s,]*")


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

    def __init__(self, place: str, tally: Tally, listing: options.Listing, fetch: Fetch) -> None:
        self.place = place
        self.shown = "standard input" if place == "-" else display_uri(place)
        #: The lines or rows read so far.
        self.number = 0
        #: The line at which the current row begins, from 1.
        self.line = 0
        self._broken = False
        self._tally = tally
        self._listing = listing
        self._fetch = fetch

    def rows(self) -> Iterator[Row]:
        """Yield the list's rows as they are read.

        Raises:
            UsageError: the list cannot be opened, is of no known format, or lacks a column.
        """
        with streams.opened(self.place, self.shown, self._fetch) as stream:
            input_format = self._format_of(stream)
            if input_format == "parquet":
                yield from self._parquet(stream)
            else:
                yield from self._text(stream, input_format)

    def refuse(self, reason: str) -> None:
        """Refuse the current row."""
        self._tally.refuse(self.shown, self.line, reason)

    def _format_of(self, stream: io.BufferedReader) -> InputFormat:
        if self._listing.input_format != "auto":
            return self._listing.input_format
        head = stream.peek()
        _check_head(head, self.shown)
        named = named_format(display_uri(self.place))
        if named and named != "txt":
            return named
        known = self._sniffed(head) or named
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
        encoding = dialect.encoding_of(head, self._listing.encoding)
        lines = head.decode(encoding, "replace").lstrip().splitlines() or [""]
        first = lines[0].strip()
        if first.startswith(("{", "[{", '["')) or first == "[":
            return "jsonl"
        for each in dialect.DELIMITERS:
            if each in first and self._has_columns(dialect.cells(first, each)):
                return "tsv" if each == "\t" else "csv"
        if "://" in first or self._has_columns([first]):
            return "txt" if "://" in first else "csv"
        return None

    def _has_columns(self, names: list[str]) -> bool:
        try:
            self._columns(names)
        except UsageError:
            return False
        return True

    def _columns(self, names: Sequence[str]) -> Columns:
        return Columns(names, self._listing, self.shown)

    def _text(self, stream: io.BufferedReader, input_format: InputFormat) -> Iterator[Row]:
        encoding = dialect.encoding_of(stream.peek(), self._listing.encoding)
        # A byte that is no text in this encoding must not end the list.
        odd_bytes = "surrogateescape" if encoding.startswith("utf-8") else "backslashreplace"
        text = io.TextIOWrapper(stream, encoding=encoding, errors=odd_bytes, newline="")
        try:
            if input_format == "txt":
                yield from self._plain(self._lines(text))
            elif input_format == "jsonl":
                yield from self._json(stream, text)
            else:
                yield from self._table(self._lines(text), DELIMITERS[input_format])
        finally:
            self._tally.lines += self.number
            text.detach()

    def _lines(self, text: io.TextIOWrapper) -> Iterator[str]:
        while line := self._next(text.readline, MAX_LINE_CHARS + 1):
            self.number += 1
            if len(line) <= MAX_LINE_CHARS:
                yield line
                continue
            while line and not line.endswith(("\n", "\r")):
                line = self._next(text.readline, MAX_LINE_CHARS)
            self._refuse_line(self.number, f"it is longer than {MAX_LINE_CHARS} characters")

    def _next(self, read: Callable[[int], str], chars: int) -> str:
        """Return what is read next; nothing if that fails."""
        try:
            return read(chars)
        except Exception as error:
            self._break_off(elsewhere.why(self.place, error))
            return ""

    def _break_off(self, reason: str) -> None:
        if self._broken:
            return
        self._broken = True
        self.number += 1
        self._refuse_line(self.number, f"the list breaks off here: {reason}")

    def _refuse_line(self, line: int, reason: str) -> None:
        self._tally.refuse(self.shown, line, reason)

    def _plain(self, lines: Iterator[str]) -> Iterator[Row]:
        columns = self._columns(["url"])
        for line in lines:
            self.line = self.number
            text = _unquoted(line.strip())
            if not text or text[0] == "#":
                self._tally.blank += 1
            elif reason := dialect.not_utf8(line):
                self.refuse(reason)
            elif row := self._row(columns, {"url": text}):
                yield row

    def _json(self, stream: io.BufferedReader, text: io.TextIOWrapper) -> Iterator[Row]:
        head = stream.peek().lstrip(b"\xef\xbb\xbf \t\r\n")
        # An array, or objects of several lines each.
        if head.startswith(b"[") or re.match(rb"\{\s*\n", head):
            values = self._elements(text)
        else:
            values = self._json_lines(self._lines(text))
        columns_of = lru_cache(KINDS_KEPT)(self._columns)
        for value in values:
            fields = value if isinstance(value, dict) else {"url": value}
            try:
                columns = columns_of(tuple(fields))
            except UsageError as error:
                self.refuse(str(error).removeprefix(f"{self.shown} has ").rstrip("."))
                continue
            if row := self._row(columns, fields):
                yield row

    def _json_lines(self, lines: Iterator[str]) -> Iterator[Any]:
        for line in lines:
            self.line = self.number
            if not line.strip():
                self._tally.blank += 1
            elif reason := dialect.not_utf8(line):
                self.refuse(reason)
            else:
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    self.refuse(f"it is not JSON: {error}")
                    continue
                yield value

    def _elements(self, text: io.TextIOWrapper) -> Iterator[Any]:
        """Yield the elements of a JSON array, or JSON values one after the other."""
        decode = json.JSONDecoder().raw_decode
        buffer = self._next(text.read, JSON_BLOCK).lstrip("\ufeff \t\r\n").removeprefix("[")
        at = 0
        while True:
            at += len(_BETWEEN_ELEMENTS.match(buffer, at)[0])  # type: ignore[index]
            try:
                value, end = decode(buffer, at)
            except (ValueError, RecursionError) as error:
                more = self._next(text.read, JSON_BLOCK)
                if more and len(buffer) - at <= MAX_LINE_CHARS:
                    buffer, at = buffer[at:] + more, 0
                    continue
                if buffer[at:].strip() not in ("", "]"):
                    self._break_off(str(error))
                return
            self.number += 1
            self.line = self.number
            yield value
            at = end

    def _table(self, lines: Iterator[str], usual: str) -> Iterator[Row]:
        source = _RecordLines(lines)
        header = self._header(source, usual)
        records = self._records(source, header)
        names = header.names
        if names is None:
            names = [name.strip() for name in next(records, (0, []))[1]]
            self._tally.extra += 1
        columns = Columns(names, header.listing, self.shown)
        least = names.index(columns.url) + 1 if columns.url in names else 1
        for line, cells in records:
            self.line = line
            if not any(cells):
                self._tally.blank += 1
            elif len(cells) < least:
                self.refuse(f"it has {len(cells)} cells, and {columns.url!r} is number {least}")
            elif row := self._row(columns, _values(names, cells)):
                yield row

    def _header(self, source: _RecordLines, usual: str) -> _Header:
        """Skip what stands before a table's header, and find its delimiter and its names."""
        listing = self._listing
        declared, comment = self._skip_comments(source)
        lines = source.peek(2) or [""]
        if reason := dialect.not_utf8(lines[0]):
            raise UsageError(reason=f"The first line of {self.shown} cannot be read: {reason}.")
        if listing.delimiter:
            declared = dialect.named_delimiter(listing.delimiter)
        delimiter = declared or dialect.find_delimiter(lines, usual, self._has_columns)
        first = dialect.cells(lines[0], delimiter)
        if listing.no_header:
            return _numbered(listing, delimiter, len(first))
        if self._has_columns(first):
            return _Header(listing, delimiter, spaced=_spaced(lines[0], delimiter))
        if comment:
            delimiter = declared or dialect.find_delimiter([comment], usual, self._has_columns)
            names = dialect.cells(comment, delimiter)
            if self._has_columns(names) or 1 < len(names) == len(first):
                return _Header(listing, delimiter, names, _spaced(comment, delimiter))
        clips = [number for number, cell in enumerate(first) if names_a_clip(cell)]
        if clips and not (listing.url_col or listing.template):
            column = str(clips[0] + 1)
            self._tally.notes.append(
                f"{self.shown} has no header line: column {column} was taken for the URL."
            )
            return _numbered(replace(listing, url_col=column), delimiter, len(first))
        self._check_not_quoted(first)
        return _Header(listing, delimiter)

    def _skip_comments(self, source: _RecordLines) -> tuple[str | None, str]:
        """Return the delimiter of a line like `sep=;`, and the last comment before the header."""
        declared, comment = None, ""
        while ahead := source.peek(1):
            line = ahead[0].rstrip("\r\n")
            if found := dialect.declared_delimiter(line):
                declared = found
                self._tally.extra += 1
            elif not line.strip() or line[0] == "#":
                comment = line.lstrip("# ") or comment
                self._tally.blank += 1
            else:
                break
            source.skip()
        return declared, comment

    def _check_not_quoted(self, first: list[str]) -> None:
        for each in dialect.DELIMITERS:
            if len(first) == 1 and each in first[0] and self._has_columns(first[0].split(each)):
                raise UsageError(
                    reason=f"Each line of {self.shown} is in quotes as a whole, so that it is one"
                    " cell: take off the quotes at both ends of each line."
                )

    def _records(self, source: _RecordLines, header: _Header) -> Iterator[tuple[int, list[str]]]:
        """Yield the records of a table, each with the number of its first line."""
        csv.field_size_limit(MAX_LINE_CHARS)
        form: dict[str, Any] = {
            "delimiter": header.delimiter,
            "skipinitialspace": header.spaced,
        }
        while True:
            try:
                for cells in csv.reader(source.read(), **form):
                    _check_quotes(source.record)
                    self._tally.extra += len(source.record) - 1
                    line = self._first_line(source)
                    if reason := _first_reason(source.record):
                        self._refuse_line(line, reason)
                    else:
                        yield line, cells
                    source.record.clear()
            except csv.Error as error:
                # An unclosed quote swallows the rows after it. Only its first line is refused.
                self._refuse_line(self._first_line(source), f"it is no row of a table: {error}")
                source.read_again()
            else:
                return

    def _first_line(self, source: _RecordLines) -> int:
        """Return the number of the line at which the current record begins."""
        return self.number - len(source.again) - len(source.record) + 1

    def _parquet(self, stream: io.BufferedReader) -> Iterator[Row]:
        import polars as pl

        try:
            with streams.seekable(self.place, stream) as path:
                frame = pl.scan_parquet(path, glob=False)
                columns = self._columns(frame.collect_schema().names())
                rows = frame.select(pl.len()).collect().item()
                # Slice by slice: polars' own batches hold several row groups, however large.
                for start in range(0, rows, PARQUET_ROWS_AT_ONCE):
                    piece = frame.slice(start, PARQUET_ROWS_AT_ONCE).collect()
                    for values in piece.iter_rows(named=True):
                        self.number += 1
                        self.line = self.number
                        if row := self._row(columns, values):
                            yield row
        except UsageError:
            raise
        except (Exception, pl.exceptions.PanicException) as error:
            self._break_off(str(error).partition("\n")[0])
        finally:
            self._tally.lines += self.number

    def _row(self, columns: Columns, values: dict[str, Any]) -> Row | None:
        """Return a row, or refuse its line and return None."""
        try:
            return columns.row(values)
        except RowRefused as refused:
            self.refuse(str(refused))
            return None


@dataclass(frozen=True, slots=True)
class _Header:
    """How a table is written, and its columns where no line of its own names them."""

    listing: options.Listing
    delimiter: str
    names: list[str] | None = None
    #: A space follows each delimiter.
    spaced: bool = False


def _numbered(listing: options.Listing, delimiter: str, width: int) -> _Header:
    names = [str(number) for number in range(1, width + 1)]
    return _Header(replace(listing, url_col=listing.url_col or "1"), delimiter, names)


def _spaced(line: str, delimiter: str) -> bool:
    return 0 < line.count(delimiter) == line.count(f"{delimiter} ")


class _RecordLines:
    """The lines of a table. All lines of a record but its first can be read a second time."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        #: The lines of the current record.
        self.record: list[str] = []
        #: Lines that were read, and are still to be read by `read`.
        self.again: deque[str] = deque()

    def peek(self, count: int) -> list[str]:
        """Return the next lines without taking them; fewer at the end."""
        while len(self.again) < count and (line := next(self._lines, None)) is not None:
            self.again.append(line)
        return list(self.again)[:count]

    def skip(self) -> None:
        """Take the line that `peek` has shown."""
        self.again.popleft()

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


def _values(names: list[str], cells: list[str]) -> dict[str, Any]:
    values = dict(zip(names, cells, strict=False))
    # Excel writes columns without a name.
    values.pop("", None)
    if len(cells) == len(names):
        return values
    if len(cells) > len(names):
        values["more"] = ",".join(cells[len(names) :])
    for name in names[len(cells) :]:
        values[name] = ""
    return values


def _first_reason(lines: list[str]) -> str | None:
    for line in lines:
        if reason := dialect.not_utf8(line):
            return reason
    return None


def _unquoted(text: str) -> str:
    quoted = len(text) > 2 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1].strip() if quoted else text


def _check_quotes(lines: list[str]) -> None:
    if len(lines) > 1 and "".join(lines).count('"') % 2:
        raise csv.Error("a quote is never closed")


def _check_head(head: bytes, shown: str) -> None:
    if head.startswith(b"PK\x03\x04"):
        raise UsageError(
            reason=f"{shown} is an Excel workbook or another ZIP: save the sheet as CSV (UTF-8)."
        )
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise UsageError(
            reason=f"{shown} is a web page, not a list: download the list itself; a link for"
            " sharing often leads to a page."
        )
