"""Sources in (lists, folders, globs, audio files, standard input), a stream of clips out."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from earmark.core.clips import Clip, display_uri
from earmark.core.errors import UsageError
from producer import walk
from producer.lists import InputFormat, ListReader, Tally, named_format

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_AUDIO = "wav flac ogg oga opus mp3 m4a aac mp4 webm mka wma amr aif aiff aifc au snd caf w64 rf64"
AUDIO_SUFFIXES = frozenset(f".{name}" for name in _AUDIO.split())
#: Twice the longest URL that a worker fetches by default (EARMARK_FETCH__MAX_URL_CHARS).
MAX_URI_CHARS = 8192


def read_clips(
    sources: Iterable[str],
    *,
    input_format: InputFormat = "auto",
    url_col: str = "url",
    tally: Tally | None = None,
) -> Iterator[Clip]:
    """Yield the clips of each source in turn, reading as it goes.

    A source is a URL, an audio file, a folder (all files in it but hidden ones), a glob, `-`
    (standard input), or a list. A URL is a list if its path has the suffix of one, or if
    `input_format` is given.

    Raises:
        UsageError: a source does not exist, its format is not known, or it lacks the URL column.
    """
    reading = _Reading(input_format, url_col, tally or Tally())
    for source in sources:
        yield from reading.source(source)


@dataclass(frozen=True, slots=True)
class _Reading:
    input_format: InputFormat
    url_col: str
    tally: Tally

    def source(self, source: str) -> Iterator[Clip]:
        path = Path(source).expanduser()
        if source == "-":
            yield from self.lines(source, str(Path.cwd()))
        elif "://" in source:
            yield from self.elsewhere(source)
        elif path.is_dir():
            yield from self.walk(path)
        elif path.is_file():
            yield from self.file(path)
        elif glob.has_magic(source):
            yield from self.matches(str(path))
        else:
            raise UsageError(reason=f"There is no file or folder {source!r}.")

    def elsewhere(self, url: str) -> Iterator[Clip]:
        if self.input_format == "auto" and named_format(display_uri(url)) is None:
            yield self.single(_resolved(url, ""))
        elif "*" in url and not url.startswith("http"):
            for match in _remote_matches(url):
                yield from self.lines(match, match.rpartition("/")[0])
        else:
            yield from self.lines(url, display_uri(url).rpartition("/")[0])

    def matches(self, pattern: str) -> Iterator[Clip]:
        matches = sorted(glob.iglob(pattern, recursive=True))  # noqa: PTH207 - the pattern may be absolute
        if not matches:
            raise UsageError(reason=f"No file matches {pattern!r}.")
        for match in matches:
            if Path(match).is_file():
                yield from self.file(Path(match))

    def file(self, path: Path) -> Iterator[Clip]:
        if self.input_format == "auto" and path.suffix.lower() in AUDIO_SUFFIXES:
            yield self.single(_storable(path))
        else:
            yield from self.lines(str(path), str(path.parent.absolute()))

    def walk(self, folder: Path) -> Iterator[Clip]:
        def refuse(error: OSError) -> None:
            self.tally.lines += 1
            reason = f"the folder cannot be read: {error.strerror}"
            self.tally.refuse(str(error.filename), 0, reason)

        for path in walk.files(folder, refuse):
            yield self.single(_storable(path))

    def single(self, uri: str) -> Clip:
        self.tally.lines += 1
        self.tally.clips += 1
        return Clip(uri)

    def lines(self, place: str, folder: str) -> Iterator[Clip]:
        tally = self.tally
        reader = ListReader(place, tally, input_format=self.input_format, url_col=self.url_col)
        for text, meta in reader.rows():
            if len(text) > MAX_URI_CHARS:
                reader.refuse(f"a URL of {len(text)} characters is too long")
            else:
                tally.clips += 1
                yield Clip(_resolved(text, folder), meta)


def _remote_matches(pattern: str) -> list[str]:
    import fsspec

    filesystem, path = fsspec.url_to_fs(pattern)
    matches = sorted(filesystem.glob(path))
    if not matches:
        raise UsageError(reason=f"No file matches {pattern!r}.")
    return [str(filesystem.unstrip_protocol(match)) for match in matches]


def _resolved(text: str, folder: str) -> str:
    if not text.isprintable():
        # Databases store neither NUL nor half a surrogate pair as text.
        text = text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()
    if "://" in text:
        return text
    if "://" in folder:
        return text if text.startswith("/") else f"{folder}/{text}"
    path = Path(folder, os.path.expanduser(text))  # noqa: PTH111 - keeps a user name nobody has
    if text[0] in "/~" or path.exists():
        return _storable(path)
    # Neither a URL nor a file here: the clip fails with `bad_url`, and its row shows this text.
    return text


def _storable(path: Path) -> str:
    absolute = str(path.absolute())
    return absolute if absolute.isprintable() else path.absolute().as_uri()
