"""Sources in (lists, folders, globs, audio files, standard input), a stream of clips out."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from earmark.core import formats
from earmark.core.clips import Clip, Part, display_uri
from earmark.core.errors import NotAudio, UsageError
from earmark.core.options import Listing
from earmark.core.settings import Fetch
from producer import elsewhere, walk
from producer.clip_uris import AUDIO_SUFFIXES, ClipUris, names_a_clip, short, storable
from producer.columns import RowRefused
from producer.containers import Container, kind_of
from producer.list_formats import named_format
from producer.lists import ListReader
from producer.tally import Tally

#: Rows of a file in which a clip must be named, if the file may be a list.
ROWS_TRIED = 10
#: Opens a file without waiting for the other end of a pipe.
_PEEK = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def read_clips(
    sources: Iterable[str | Clip],
    listing: Listing | None = None,
    tally: Tally | None = None,
    fetch: Fetch | None = None,
) -> Iterator[Clip]:
    """Yield the clips of each source in turn, reading as it goes.

    A source is a URL, an audio file, a folder (all files in it but hidden ones), a glob, `-`
    (standard input), a list, or a clip that was read before. A URL is a list if its path has the
    suffix of one, or if an input format is given. Among several files, one that is neither audio
    nor a list is passed over. Settings for fetching hold for lists and containers elsewhere.

    Raises:
        UsageError: a source does not exist, its format is not known, or it lacks a column.
    """
    sources = list(sources)
    reading = _Reading(
        listing or Listing(), tally or Tally(), fetch or Fetch(), one_of_many=len(sources) > 1
    )
    for source in sources:
        if isinstance(source, Clip):
            yield reading.counted(source)
        else:
            yield from reading.source(source)


@dataclass(frozen=True, slots=True)
class _Reading:
    listing: Listing
    tally: Tally
    fetch: Fetch
    one_of_many: bool

    def source(self, source: str) -> Iterator[Clip]:
        path = Path(source).expanduser()
        if source == "-":
            yield from self.lines(source, str(Path.cwd()))
        elif "://" in source:
            yield from self.elsewhere(source)
        elif os.path.isdir(path):  # noqa: PTH112 - never raises
            yield from self.walk(path)
        elif os.path.isfile(path):  # noqa: PTH113
            yield from self.file(path, one_of_many=self.one_of_many)
        elif glob.has_magic(source):
            yield from self.matches(str(path))
        else:
            raise UsageError(reason=f"There is no file or folder {source!r}.")

    def elsewhere(self, url: str) -> Iterator[Clip]:
        if kind := kind_of(url, self.fetch, self.listing.url_col):
            yield from Container(url, kind, self.tally, self.fetch).clips(url)
        elif self.listing.input_format == "auto" and named_format(display_uri(url)) is None:
            yield self.single(*ClipUris("", self.tally).resolve(url))
        elif "*" in url and not url.startswith("http"):
            for match in elsewhere.matches(url):
                yield from self.lines(match, match.rpartition("/")[0])
        else:
            yield from self.lines(url, display_uri(url).rpartition("/")[0])

    def matches(self, pattern: str) -> Iterator[Clip]:
        matches = sorted(glob.iglob(pattern, recursive=True))  # noqa: PTH207 - the pattern may be absolute
        if not matches:
            raise UsageError(reason=f"No file matches {pattern!r}.")
        for match in matches:
            if Path(match).is_file():
                yield from self.file(Path(match), one_of_many=True)

    def file(self, path: Path, *, one_of_many: bool) -> Iterator[Clip]:
        if self.listing.input_format == "auto" and is_audio(path):
            yield self.single(storable(path))
            return
        if kind := kind_of(str(path), self.fetch, self.listing.url_col):
            container = Container(str(path), kind, self.tally, self.fetch)
            yield from container.clips(storable(path))
            return
        folder = str(path.parent.absolute())
        if not one_of_many or self.reads_as_list(path, self.base or folder):
            yield from self.lines(str(path), folder)
        else:
            self.tally.pass_over(str(path), "neither audio nor a list")

    def reads_as_list(self, path: Path, folder: str) -> bool:
        """Return whether one of a file's first rows names a clip."""
        places = ClipUris(folder, Tally())
        reader = ListReader(str(path), Tally(), self.listing, self.fetch)
        try:
            rows = list(islice(reader.rows(), ROWS_TRIED))
        except UsageError:
            return False
        return any(names_a_clip(text) or places.finds(text) for text, *_ in rows)

    def walk(self, folder: Path) -> Iterator[Clip]:
        def refuse(error: OSError) -> None:
            self.tally.lines += 1
            reason = f"the folder cannot be read: {error.strerror}"
            self.tally.refuse(str(error.filename), 0, reason)

        for path in walk.files(folder, refuse):
            if self.listing.strict or is_audio(path):
                yield self.single(storable(path))
            else:
                self.tally.lines += 1
                self.tally.not_audio += 1

    def single(self, uri: str, part: Part | None = None) -> Clip:
        return self.counted(Clip(uri, part=part))

    def counted(self, clip: Clip) -> Clip:
        self.tally.lines += 1
        self.tally.clips += 1
        return clip

    def lines(self, place: str, folder: str) -> Iterator[Clip]:
        tally = self.tally
        reader = ListReader(place, tally, self.listing, self.fetch)
        places = ClipUris(self.base or folder, tally)
        for text, meta, part, key in reader.rows():
            try:
                uri, times = places.resolve(text)
            except RowRefused as refused:
                reader.refuse(f"{refused}{_shifted(meta)}")
                continue
            tally.clips += 1
            yield Clip(uri, meta, part or times, key)

    @property
    def base(self) -> str | None:
        base = self.listing.base
        if base is None or "://" in base:
            return base and base.rstrip("/")
        return str(Path(base).expanduser().absolute())


def is_audio(path: Path) -> bool:
    """Return whether a file is called like sound, or begins like it and is not called a list."""
    if path.suffix.lower() in AUDIO_SUFFIXES:
        return True
    return named_format(path.name) is None and _holds_audio(path)


def _holds_audio(path: Path) -> bool:
    try:
        file = os.open(path, _PEEK)
    except (OSError, ValueError):
        return False
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return False
        return formats.recognise(file) is not formats.UNKNOWN
    except (NotAudio, OSError):
        return False
    finally:
        os.close(file)


def _shifted(meta: Mapping[str, object]) -> str:
    """Return the hint that a row seems to be shifted; empty if it does not."""
    for name, value in meta.items():
        if names_a_clip(value):
            return (
                f"; the row looks shifted, for {name!r} holds {short(str(value))}: put"
                " cells with a delimiter into quotes"
            )
    return ""
