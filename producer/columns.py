"""A row's columns in; the name of its clip, its span, its key and its meta out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from string import Formatter
from typing import Any

from earmark.core.clips import Part
from earmark.core.errors import UsageError
from earmark.core.options import Listing
from earmark.core.spelling import did_you_mean

#: Names of the column with the URL or path, where none is given: NeMo, Hugging Face, ESC-50,
#: UrbanSound8K and Common Voice use some of them.
URL_NAMES = (
    "url", "uri", "audio_filepath", "audio_url", "audio_path", "file_name", "filename",
    "file_path", "filepath", "slice_file_name", "path", "file",
)  # fmt: skip
#: Names of the columns of a span: AudioSet and NeMo use the last two. `start` and `end` are not
#: among them: in UrbanSound8K they are times of another file.
SPAN_NAMES = (("start_s", "end_s"), ("start_seconds", "end_seconds"), ("offset", "duration"))
#: A span's end is counted from its start if its column is called so.
LENGTH_NAME = "duration"
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d*)?)")


#: A URL or path as the list has it, the other columns, the part of the file, and the key.
Row = tuple[str, "Mapping[str, Any]", "Part | None", "str | None"]


class RowRefused(ValueError):
    """A row gives no clip; the text is the reason."""


class Columns:
    """Finds the columns of a list once, and turns each of its rows, a dictionary, into a row.

    Raises:
        UsageError: a column that is needed is not there; the sentence names the nearest.
    """

    def __init__(self, names: Sequence[str], listing: Listing, shown: str) -> None:
        self._names = names
        self._shown = shown
        self._template = _template(listing.template)
        for _, column in self._template:
            if column is not None:
                self._find(column, "--template")
        #: The column that a reason names: that of the URL, or the template.
        self.url = "--template" if self._template else self._url(listing.url_col)
        self._start, self._end = self._span(listing)
        self._spans = bool(self._start or self._end)
        self._key = listing.key_col and self._find(listing.key_col, "--key-col")

    def row(self, values: dict[str, Any]) -> Row:
        """Return the row; the columns of its URL and its span leave its meta.

        Raises:
            RowRefused: it gives no clip.
        """
        key = str(values[self._key]) if self._key else None
        text = self._filled(values) if self._template else values.pop(self.url, None)
        if not isinstance(text, str) or not (text := text.strip()):
            raise RowRefused(f"there is no text in {self.url!r}")
        part = self._part(values) if self._spans else None
        return text, values, part, key

    def _url(self, column: str | None) -> str:
        if column is not None:
            return self._find(column, "--url-col")
        known = _first_known(self._names, URL_NAMES)
        return known or self._find("url", "--url-col")

    def _span(self, listing: Listing) -> tuple[str | None, str | None]:
        if listing.start_col is None and listing.end_col is None:
            for pair in SPAN_NAMES:
                start, end = (_first_known(self._names, [name]) for name in pair)
                if start and end:
                    return start, end
        start = listing.start_col and self._find(listing.start_col, "--start-col")
        end = listing.end_col and self._find(listing.end_col, "--end-col")
        return start or None, end or None

    def _find(self, column: str, option: str) -> str:
        known = _first_known(self._names, [column])
        if known is not None:
            return known
        columns = ", ".join(self._names) or "none at all"
        raise UsageError(
            reason=f"{self._shown} has no column {column!r}; it has {columns[:500]}."
            f"{did_you_mean(column, self._names)} Say {option}."
        )

    def _filled(self, values: dict[str, Any]) -> str:
        parts = []
        for literal, column in self._template:
            parts.append(literal)
            if column is None:
                continue
            value = values.get(column)
            if value is None or value == "":
                raise RowRefused(f"there is nothing in {column!r}, which the template needs")
            parts.append(str(value))
        return "".join(parts)

    def _part(self, values: dict[str, Any]) -> Part | None:
        start_s = _seconds(values, self._start)
        end_s = _seconds(values, self._end)
        if end_s is not None and self._end and self._end.lower().startswith(LENGTH_NAME):
            end_s = round((start_s or 0.0) + end_s, 6)
        return span(start_s, end_s)


def suffice(names: Sequence[str], listing: Listing) -> bool:
    """Return whether a list with these columns has what is needed."""
    try:
        Columns(names, listing, "")
    except UsageError:
        return False
    return True


def span(start_s: float | None, end_s: float | None) -> Part | None:
    """Return the part of a file between two times; None for all of it.

    Raises:
        RowRefused: it ends before it begins.
    """
    if end_s is not None and end_s <= (start_s or 0.0):
        raise RowRefused(f"its span ends at {end_s:g} s, which is not after its start")
    if end_s is None:
        return Part(start_s) if start_s else None
    return Part(start_s or 0.0, end_s)


def seconds(value: Any) -> float | None:
    """Return a time of a list in seconds: `12.5`, `12,5` or `1:02:03.5`; None if there is none.

    Raises:
        RowRefused: it is no time.
    """
    if value is None or value == "":
        return None
    text = str(value).strip().replace(",", ".")
    try:
        if clock := _CLOCK.fullmatch(text):
            hours, minutes, rest = clock.groups(default="0")
            number = int(hours) * 3600 + int(minutes) * 60 + float(rest)
        else:
            number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise RowRefused(f"{text[:40]!r} is no number of seconds")
    return number


def _seconds(values: dict[str, Any], column: str | None) -> float | None:
    return seconds(values.pop(column, None)) if column else None


def _first_known(names: Iterable[str], wanted: Iterable[str]) -> str | None:
    """Return the first of the wanted names that is there, in any case of letters."""
    there = {name.casefold(): name for name in names}
    there.update({name: name for name in names})
    for name in wanted:
        known = there.get(name) or there.get(name.strip().casefold())
        if known is not None:
            return known
    return None


def _template(text: str | None) -> list[tuple[str, str | None]]:
    """Return a template as pairs of a literal and the column behind it.

    Raises:
        UsageError: its braces do not match.
    """
    if text is None:
        return []
    try:
        return [(literal, column) for literal, column, _, _ in Formatter().parse(text)]
    except ValueError as error:
        raise UsageError(reason=f"The template {text!r} cannot be read: {error}.") from error
