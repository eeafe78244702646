"""A list in, its rows out: txt, csv, tsv, JSON or parquet, compressed or not, local or remote."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from more_itertools import peekable

from earmark.core.clips import display_uri
from earmark.core.errors import UsageError
from earmark.core.options import InputFormat, Listing
from earmark.core.settings import Fetch
from producer import dialect, elsewhere, streams, tables
from producer.columns import Columns, Row, RowRefused
from producer.list_formats import format_of
from producer.tables import Line
from producer.tally import Tally

#: The usual delimiter of a table.
DELIMITERS: dict[InputFormat, str] = {"tsv": "\t", "csv": ","}
#: Far longer than any URL. A transcript in a cell may reach it.
MAX_LINE_CHARS = 1024**2
PARQUET_ROWS_AT_ONCE = 20_000
#: Characters of a JSON array read at once.
JSON_BLOCK = 64 * 1024
#: Sets of names that the objects of one JSON list may have before they are looked up anew.
KINDS_KEPT = 100
_BETWEEN_ELEMENTS = re.compile(r"[\s,]*")
#: The values of a row by their columns.
Values = tuple[Columns, dict[str, Any]]


class ListReader:
    """Reads one list, row by row, of any format, compression and place.

    Use one per list, and iterate `rows()` once. A line that cannot be used goes into the tally
    with its number and the reason; reading goes on with the next line.
    """

    def __init__(self, place: str, tally: Tally, listing: Listing, fetch: Fetch) -> None:
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
            input_format = format_of(self.place, self.shown, stream.peek(), self._listing)
            try:
                for columns, values in self._values(stream, input_format):
                    try:
                        row = columns.row(values)
                    except RowRefused as refused:
                        self.refuse(str(refused))
                    else:
                        yield row
            finally:
                self._tally.lines += self.number

    def refuse(self, reason: str, line: int | None = None) -> None:
        """Refuse the current row, or another line."""
        self._tally.refuse(self.shown, line or self.line, reason)

    def _columns(self, names: Sequence[str]) -> Columns:
        return Columns(names, self._listing, self.shown)

    def _values(self, stream: io.BufferedReader, input_format: InputFormat) -> Iterator[Values]:
        if input_format == "parquet":
            yield from self._parquet(stream)
            return
        encoding = dialect.encoding_of(stream.peek(), self._listing.encoding)
        # A byte that is no text in this encoding must not end the list.
        odd_bytes = "surrogateescape" if encoding.startswith("utf-8") else "backslashreplace"
        text = io.TextIOWrapper(stream, encoding=encoding, errors=odd_bytes, newline="")
        try:
            if input_format == "txt":
                yield from self._plain(text)
            elif input_format == "jsonl":
                yield from self._json(stream, text)
            else:
                yield from self._table(self._lines(text), DELIMITERS[input_format])
        finally:
            text.detach()

    def _lines(self, text: io.TextIOWrapper) -> Iterator[Line]:
        while line := self._next(text.readline, MAX_LINE_CHARS + 1):
            self.number += 1
            if len(line) <= MAX_LINE_CHARS:
                yield self.number, line
                continue
            while line and not line.endswith(("\n", "\r")):
                line = self._next(text.readline, MAX_LINE_CHARS)
            self.refuse(f"it is longer than {MAX_LINE_CHARS} characters", self.number)

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
        self.refuse(f"the list breaks off here: {reason}", self.number)

    def _texts(self, text: io.TextIOWrapper, comment: tuple[str, ...] = ()) -> Iterator[str]:
        """Yield the lines that are neither blank nor a comment."""
        for number, line in self._lines(text):
            self.line = number
            bare = line.strip()
            if not bare or bare.startswith(comment):
                self._tally.blank += 1
            elif reason := dialect.not_utf8(line):
                self.refuse(reason)
            else:
                yield bare

    def _plain(self, text: io.TextIOWrapper) -> Iterator[Values]:
        columns = self._columns(["url"])
        for line in self._texts(text, comment=("#",)):
            yield columns, {"url": _unquoted(line)}

    def _json(self, stream: io.BufferedReader, text: io.TextIOWrapper) -> Iterator[Values]:
        head = stream.peek().lstrip(b"\xef\xbb\xbf \t\r\n")
        # An array, or objects of several lines each.
        if head.startswith(b"[") or re.match(rb"\{\s*\n", head):
            values = self._elements(text)
        else:
            values = self._json_lines(text)
        columns_of = lru_cache(KINDS_KEPT)(self._columns)
        for value in values:
            fields = value if isinstance(value, dict) else {"url": value}
            try:
                columns = columns_of(tuple(fields))
            except UsageError as error:
                self.refuse(str(error).removeprefix(f"{self.shown} has ").rstrip("."))
            else:
                yield columns, fields

    def _json_lines(self, text: io.TextIOWrapper) -> Iterator[Any]:
        for line in self._texts(text):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                self.refuse(f"it is not JSON: {error}")
            else:
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

    def _table(self, lines: Iterator[Line], usual: str) -> Iterator[Values]:
        csv.field_size_limit(MAX_LINE_CHARS)
        source = peekable(lines)
        header = tables.header(source, usual, self._listing, self.shown, self._tally)
        records = tables.records(source, header, self._tally, self.refuse)
        names = header.names
        if names is None:
            names = [name.strip() for name in next(records, (0, []))[1]]
            self._tally.extra += 1
        columns = Columns(names, header.listing, self.shown)
        least = names.index(columns.url) + 1 if columns.url in names else 1
        for number, cells in records:
            self.line = number
            if not any(cells):
                self._tally.blank += 1
            elif len(cells) < least:
                self.refuse(f"it has {len(cells)} cells, and {columns.url!r} is number {least}")
            else:
                yield columns, tables.values(names, cells)

    def _parquet(self, stream: io.BufferedReader) -> Iterator[Values]:
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
                        yield columns, values
        except UsageError:
            raise
        except (Exception, pl.exceptions.PanicException) as error:
            self._break_off(str(error).partition("\n")[0])


def _unquoted(text: str) -> str:
    quoted = len(text) > 2 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1].strip() if quoted else text
