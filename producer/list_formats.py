"""The name of a list and its first bytes in, its format out."""

from __future__ import annotations

from pathlib import PurePosixPath

from earmark.core.clips import display_uri
from earmark.core.errors import UsageError
from earmark.core.options import InputFormat, Listing
from producer import columns, dialect
from producer.streams import COMPRESSED

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


def named_format(name: str) -> InputFormat | None:
    """Return the format of a list by its name, if the name has a known suffix."""
    path = PurePosixPath(name)
    if path.suffix.lower() in COMPRESSED:
        path = path.with_suffix("")
    return LIST_SUFFIXES.get(path.suffix.lower())


def format_of(place: str, shown: str, head: bytes, listing: Listing) -> InputFormat:
    """Return the format of a list: as the options say, or by its name and its first bytes.

    Raises:
        UsageError: it is no list, or cannot be told.
    """
    if listing.input_format != "auto":
        return listing.input_format
    _check_head(head, shown)
    named = named_format(display_uri(place))
    if named and named != "txt":
        return named
    known = _sniffed(head, listing) or named
    if known:
        return known
    if place == "-":
        return "txt"
    suffixes = ", ".join(LIST_SUFFIXES)
    raise UsageError(
        reason=f"{shown} is neither audio nor a list known by name ({suffixes}) or content: say"
        " --input-format."
    )


def _sniffed(head: bytes, listing: Listing) -> InputFormat | None:
    """Guess the format from the first bytes of a list."""
    if head.startswith(b"PAR1"):
        return "parquet"
    encoding = dialect.encoding_of(head, listing.encoding)
    lines = head.decode(encoding, "replace").lstrip().splitlines() or [""]
    first = lines[0].strip()
    if first.startswith(("{", "[{", '["')) or first == "[":
        return "jsonl"
    for each in dialect.DELIMITERS:
        if each in first and columns.suffice(dialect.cells(first, each), listing):
            return "tsv" if each == "\t" else "csv"
    if "://" in first:
        return "txt"
    return "csv" if columns.suffice([first], listing) else None


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
