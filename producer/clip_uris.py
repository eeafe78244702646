"""The name in a row in, the URI of its clip out: relative names, and names that can be none."""

from __future__ import annotations

import os
import re
from pathlib import Path

from earmark.core import spelling
from earmark.core.clips import Part, display_uri
from producer.columns import RowRefused, seconds, span
from producer.tally import Tally

_AUDIO = (
    "wav flac ogg oga opus mp3 mp2 m4a aac mp4 webm mka wma amr aif aiff aifc au snd caf w64 rf64"
)
AUDIO_SUFFIXES = frozenset(f".{name}" for name in _AUDIO.split())
#: Twice the longest URL that a worker fetches by default (EARMARK_FETCH__MAX_URL_CHARS).
MAX_URI_CHARS = 8192
#: Limits of Linux, in bytes.
MAX_NAME, MAX_PATH = 255, 4095
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
#: A URL without its slashes, or without its scheme.
_NEARLY_URL = re.compile(r"(?:https?|s3|gs|hf|file):|www\.", re.IGNORECASE)
_FILE_NAME = re.compile(r"[^\n]*\.\w{1,8}")
#: A media fragment: a span in seconds.
_TIMES = re.compile(r"(.+)#t=(?:npt:)?([\d:.]*)(?:,([\d:.]+))?")


class ClipUris:
    """Resolves the names of one list against its folder or URL."""

    def __init__(self, folder: str, tally: Tally) -> None:
        self._folder = folder
        self._tally = tally
        self._remote = "://" in folder
        # A folder of another machine's disk tells nothing about its files.
        self._here = not self._remote and Path(folder).is_dir()

    def resolve(self, text: str) -> tuple[str, Part | None]:
        """Return a URI, and the span of a media fragment (`#t=4,8`).

        A file that is not there is a clip all the same, and is counted.

        Raises:
            RowRefused: the text can be neither a URL nor the path of a file.
        """
        if len(text) > MAX_URI_CHARS:
            raise RowRefused(f"a URL of {len(text)} characters is too long")
        part = None
        if "#t=" in text:
            text, part = self._without_times(text)
        if not text.isprintable():
            text = spelling.storable(text)
        if "://" in text:
            return text, part
        return self._path(text), part

    def finds(self, text: str) -> bool:
        """Return whether the text is the path of a file that is there."""
        return self._here and os.path.exists(os.path.join(self._folder, text))  # noqa: PTH110, PTH118

    def _path(self, text: str) -> str:
        _check_no_url(text)
        if self._remote:
            return text if text.startswith("/") else f"{self._folder}/{text}"
        path = Path(self._folder, os.path.expanduser(text))  # noqa: PTH111 - keeps a user name nobody has
        if text[0] in "/~":
            _check_lengths(path)
            return storable(path)
        if self._here and not os.path.exists(path):  # noqa: PTH110 - never raises
            path = self._missing(text, path)
        return storable(path)

    def _missing(self, text: str, path: Path) -> Path:
        _check_lengths(path)
        if "\\" in text:
            other = Path(self._folder, text.replace("\\", "/"))
            if other.exists():
                return other
        if not _FILE_NAME.fullmatch(text):
            raise RowRefused(f"there is no file {path}, and {short(text)} is no URL")
        self._tally.missing += 1
        self._tally.tried = self._tally.tried or str(path)
        return path

    def _without_times(self, text: str) -> tuple[str, Part | None]:
        times = _TIMES.fullmatch(text)
        if times is None:
            return text, None
        if "://" not in text and Path(self._folder, text).exists():
            return text, None
        place, start, end = times.groups()
        return place, span(seconds(start), seconds(end))


def storable(path: Path) -> str:
    """Return an absolute path as text that a database can store."""
    absolute = str(path.absolute())
    return absolute if absolute.isprintable() else path.absolute().as_uri()


def names_a_clip(value: object) -> bool:
    """Return whether a cell seems to hold a URL or the name of an audio file."""
    if not isinstance(value, str) or len(value) > MAX_URI_CHARS:
        return False
    _, dot, suffix = value.strip().rpartition(".")
    return "://" in value or f"{dot}{suffix.lower()}" in AUDIO_SUFFIXES


def _check_no_url(text: str) -> None:
    if text[:5].lower() == "data:":
        raise RowRefused("it is a data: URI; write the sound into a file and name that")
    if _WINDOWS.match(text):
        raise RowRefused(
            f"{short(text)} is a path of Windows: write it as this machine sees it, or relative"
            " to the folder that --base names"
        )
    if _NEARLY_URL.match(text):
        raise RowRefused(f"{short(text)} is no URL: a URL begins like https://")


def _check_lengths(path: Path) -> None:
    text = str(path)
    longest = max(text.split("/"), key=len)
    if len(longest) * 4 <= MAX_NAME and len(text) * 4 <= MAX_PATH:
        return
    if len(os.fsencode(longest)) > MAX_NAME or len(os.fsencode(text)) > MAX_PATH:
        raise RowRefused(f"{short(path.name)} is neither a URL nor the name of a file")


def short(text: str) -> str:
    """Return a cell for people: its start, without a query, which may hold a secret."""
    text = display_uri(text).partition("?")[0].strip()
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
