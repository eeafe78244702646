"""The way in which a list of text is written: its encoding, its delimiter, its header."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Callable

from earmark.core.errors import UsageError

#: The likeliest first.
DELIMITERS = (",", ";", "\t", "|")
_DELIMITER_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}
#: Bytes that are not UTF-8, as `surrogateescape` decodes them.
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
#: A line for Excel that names the delimiter.
_SEP = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)


def encoding_of(head: bytes, given: str | None) -> str:
    """Return the encoding of a text by its first bytes, or the one that is given.

    Raises:
        UsageError: Python has no such encoding.
    """
    if given is not None:
        return _checked(given, head)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    # Lists begin with ASCII: in UTF-16, every other byte of it is zero.
    if head[1:4:2] == b"\0\0" and head[0]:
        return "utf-16-le"
    if head[0:3:2] == b"\0\0" and head[1]:
        return "utf-16-be"
    return "utf-8-sig"


def _checked(name: str, head: bytes) -> str:
    try:
        codec = codecs.lookup(name)
        "".encode(name)
    except LookupError:
        raise UsageError(
            reason=f"There is no text encoding {name!r}; Excel writes cp1252 in Western Europe."
        ) from None
    if codec.name == "utf-8" and head.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    return codec.name


def not_utf8(line: str) -> str | None:
    """Return why a line is not UTF-8 and the cure; None if it is."""
    if line.isascii() or not (bad := _NOT_UTF8.search(line)):
        return None
    raw = line.encode("utf-8", "surrogateescape")
    start = max(0, len(line[: bad.start()].encode("utf-8", "surrogateescape")) - 20)
    guess = raw[start : start + 40].decode("cp1252", "replace").strip()
    # A URL's user and query may be secrets.
    guess = guess.partition("?")[0].rpartition("@")[2]
    return (
        "it is not UTF-8: say its --encoding; with --encoding cp1252 (Excel in Western Europe) it"
        f" has {guess!r}"
    )


def named_delimiter(text: str) -> str:
    """Return a delimiter that a person names.

    Raises:
        UsageError: it is not one character.
    """
    delimiter = _DELIMITER_NAMES.get(text.lower(), text)
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise UsageError(reason=f"A delimiter is one character, or tab; {text!r} is none.")
    return delimiter


def declared_delimiter(line: str) -> str | None:
    """Return the delimiter of a line like `sep=;`, which Excel reads."""
    declared = _SEP.fullmatch(line)
    return declared[1] if declared else None


def find_delimiter(lines: list[str], usual: str, has_columns: Callable[[list[str]], bool]) -> str:
    """Return the delimiter of a table by its first lines.

    It is the one with which the first line names the columns; else the one that stands as often
    in each line, most often.
    """
    candidates = [usual, *(each for each in DELIMITERS if each != usual)]
    for delimiter in candidates:
        if has_columns(cells(lines[0], delimiter)):
            return delimiter
    widths = {}
    for delimiter in candidates:
        counts = {len(cells(line, delimiter)) for line in lines}
        widths[delimiter] = counts.pop() if len(counts) == 1 else 0
    return max(candidates, key=lambda delimiter: widths[delimiter])


def cells(line: str, delimiter: str) -> list[str]:
    """Return the cells of one line, without space around them."""
    try:
        row = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:
        row = line.split(delimiter)
    return [cell.strip() for cell in row]
