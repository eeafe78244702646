"""When a sound was recorded: by the tags of its file, or by the file's name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime

#: The source of a time that a file's name tells.
NAME = "name"
#: Tags that tell a time, the most trustworthy first, and where they come from.
_TAGS = (
    ("guano.Timestamp", "guano"),
    ("wamd.timestamp", "song meter"),
    ("bext.origination", "bext"),
    ("RECORDINGSTART", "vorbis"),
    ("creation_time", "container"),
    ("info.ICRD", "info"),
    ("date", "date"),
    ("DATE", "vorbis"),
)
_TIME = re.compile(
    r"(?<!\d)((?:19|20)\d\d)([-:/_.]?)([01]\d)\2([0-3]\d)"
    r"[T _-]([0-2]\d)([-:._]?)([0-5]\d)\6([0-5]\d)"
    r"(?:[.,]\d+)?(?: ?(Z|UTC|[+-]\d\d:?\d\d))?(?![\d:])"
)
_AUDIOMOTH = re.compile(
    r"(\d\d):(\d\d):(\d\d) (\d\d)/(\d\d)/(\d{4})"
    r" \(UTC(?:([+-])(\d\d?)(?::?(\d\d))?)?\) by AudioMoth"
)
_COMMENTS = ("info.ICMT", "comment", "COMMENT")


def by_tags(tags: Mapping[str, str]) -> tuple[str, str]:
    """Return when a sound was recorded, and which tag says so; two empty texts if none does.

    The time is ISO 8601: in UTC with a Z where the tag tells its zone, else local without one.
    """
    for name in _COMMENTS:
        if found := _AUDIOMOTH.search(tags.get(name, "")):
            hour, minute, second, day, month, year, sign, hours, minutes = found.groups()
            zone = f"{sign or '+'}{int(hours or 0):02}:{minutes or '00'}"
            time = _iso(f"{year}-{month}-{day}T{hour}:{minute}:{second}{zone}")
            return (time, "audiomoth") if time else ("", "")
    for name, source in _TAGS:
        if name in tags and (time := _time_in(tags[name])):
            return time, source
    return "", ""


def by_name(uri: str) -> str:
    """Return the time in a file's name, such as S4A01234_20260501_040000.wav; empty without."""
    return _time_in(re.split(r"[?#]", uri)[0].rpartition("/")[2])


def _time_in(text: str) -> str:
    found = _TIME.search(text)
    if not found:
        return ""
    year, _, month, day, hour, _, minute, second, zone = found.groups()
    if zone in ("Z", "UTC"):
        zone = "+00:00"
    return _iso(f"{year}-{month}-{day}T{hour}:{minute}:{second}{zone or ''}")


def _iso(text: str) -> str:
    try:
        time = datetime.fromisoformat(text)
        if time.tzinfo is not None:
            return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError):
        return ""
    return time.isoformat()
