"""A table as lines of text: its header, its delimiter, its records."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from earmark.core.errors import UsageError
from earmark.core.options import Listing
from producer import columns, dialect
from producer.clip_uris import names_a_clip
from producer.tally import Tally

if TYPE_CHECKING:
    from more_itertools import peekable

#: A line of a list with its number, from 1.
Line = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Header:
    """How a table is written, and its columns where no line of its own names them."""

    listing: Listing
    delimiter: str
    names: list[str] | None = None
    #: A space follows each delimiter.
    spaced: bool = False


def header(lines: peekable[Line], usual: str, listing: Listing, shown: str, tally: Tally) -> Header:
    """Skip what stands before a table's header, and find its delimiter and its names.

    Args:
        usual: the delimiter of most tables of this kind.

    Raises:
        UsageError: the first line is not text, or each line is in quotes as a whole.
    """
    has_columns = partial(columns.suffice, listing=listing)
    declared, comment = _skip_comments(lines, tally)
    ahead = [line for _, line in lines[:2]] or [""]
    if reason := dialect.not_utf8(ahead[0]):
        raise UsageError(reason=f"The first line of {shown} cannot be read: {reason}.")
    if listing.delimiter:
        declared = dialect.named_delimiter(listing.delimiter)
    delimiter = declared or dialect.find_delimiter(ahead, usual, has_columns)
    first = dialect.cells(ahead[0], delimiter)
    if listing.no_header:
        return _numbered(listing, delimiter, len(first))
    if has_columns(first):
        return Header(listing, delimiter, spaced=_spaced(ahead[0], delimiter))
    if comment:
        delimiter = declared or dialect.find_delimiter([comment], usual, has_columns)
        names = dialect.cells(comment, delimiter)
        if has_columns(names) or 1 < len(names) == len(first):
            return Header(listing, delimiter, names, _spaced(comment, delimiter))
    clips = [number for number, cell in enumerate(first) if names_a_clip(cell)]
    if clips and not (listing.url_col or listing.template):
        column = str(clips[0] + 1)
        tally.notes.append(f"{shown} has no header line: column {column} was taken for the URL.")
        return _numbered(replace(listing, url_col=column), delimiter, len(first))
    if len(first) == 1 and any(has_columns(first[0].split(each)) for each in dialect.DELIMITERS):
        raise UsageError(
            reason=f"Each line of {shown} is in quotes as a whole, so that it is one cell: take off"
            " the quotes at both ends of each line."
        )
    return Header(listing, delimiter)


def _skip_comments(lines: peekable[Line], tally: Tally) -> tuple[str | None, str]:
    """Return the delimiter of a line like `sep=;`, and the last comment before the header."""
    declared, comment = None, ""
    for number, text in lines:
        line = text.rstrip("\r\n")
        if found := dialect.declared_delimiter(line):
            declared = found
            tally.extra += 1
        elif not line.strip() or line[0] == "#":
            comment = line.lstrip("# ") or comment
            tally.blank += 1
        else:
            lines.prepend((number, text))
            break
    return declared, comment


def _numbered(listing: Listing, delimiter: str, width: int) -> Header:
    names = [str(number) for number in range(1, width + 1)]
    return Header(replace(listing, url_col=listing.url_col or "1"), delimiter, names)


def _spaced(line: str, delimiter: str) -> bool:
    return 0 < line.count(delimiter) == line.count(f"{delimiter} ")


def records(
    lines: peekable[Line], header: Header, tally: Tally, refuse: Callable[[str, int], None]
) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a table, each with the number of its first line."""
    form: dict[str, Any] = {"delimiter": header.delimiter, "skipinitialspace": header.spaced}
    #: The lines of the current record, by their numbers.
    record: dict[int, str] = {}
    while True:
        try:
            for cells in csv.reader(_noted(lines, record), **form):
                number, text = next(iter(record)), "".join(record.values())
                _check_quotes(text, len(record))
                tally.extra += len(record) - 1
                if reason := dialect.not_utf8(text):
                    refuse(reason, number)
                else:
                    yield number, cells
                record.clear()
        except csv.Error as error:
            # An unclosed quote swallows the rows after it. Only its first line is refused.
            (number, _), *others = record.items()
            refuse(f"it is no row of a table: {error}", number)
            lines.prepend(*others)
            record.clear()
        else:
            return


def _noted(lines: Iterator[Line], record: dict[int, str]) -> Iterator[str]:
    for number, line in lines:
        record[number] = line
        yield line


def _check_quotes(text: str, lines: int) -> None:
    if lines > 1 and text.count('"') % 2:
        raise csv.Error("a quote is never closed")


def values(names: list[str], cells: list[str]) -> dict[str, Any]:
    """Return the cells of a record by the names of their columns."""
    values = dict(zip(names, cells, strict=False))
    # Excel writes columns without a name.
    values.pop("", None)
    if len(cells) > len(names):
        values["more"] = ",".join(cells[len(names) :])
    for name in names[len(cells) :]:
        values[name] = ""
    return values
