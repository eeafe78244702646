"""A clip's URI in; an open file with its size and SHA-256 out."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from earmark.core import addresses, answers, clips, errors, formats, guard, settings
from earmark.core.answers import BLOCK_BYTES
from workers.fetching import object_stores, ranges, robots
from workers.fetching.whole_containers import WholeContainers, read_slice, unusable

#: Larger bodies, and those of unknown length, go to disk: 32 clips in flight hold at most 256 MB.
IN_MEMORY_BYTES = 8 * 1024**2
#: Unpacked at once: gzip grows to 1 MB at most.
PACKED_BYTES = 1024
GZIP_BITS = zlib.MAX_WBITS | 16
# O_PATH (Linux) opens folders that may be entered but not listed.
FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | getattr(os, "O_PATH", os.O_RDONLY)
# Without O_NONBLOCK, opening a pipe would wait for its writer.
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


@dataclass(frozen=True, slots=True)
class Fetched:
    """A clip's bytes, in an open file at position 0 that the caller closes."""

    file: BinaryIO
    source: clips.Source


class Fetcher:
    """Fetches clips from HTTP(S), object stores and allowed folders, within the settings' limits.

    Use one per process, shared by its threads, and close it. It knows neither rates nor other
    workers: `PoliteFetcher` adds these. Pass an `opener` to replace the SSRF guard.
    """

    def __init__(self, fetch_settings: settings.Fetch, opener: guard.Guard | None = None) -> None:
        self._settings = fetch_settings
        self._max_bytes = fetch_settings.max_bytes
        self._guard = opener or guard.Guard(fetch_settings)
        self._robots = None
        if fetch_settings.robots:
            self._robots = robots.RobotsRules(lambda url: self._download(url).file)
        whole = fetch_settings.model_copy(update={"max_bytes": fetch_settings.max_container_bytes})
        self._whole_guard = guard.Guard(whole)
        self._wholes = WholeContainers(self._container, fetch_settings.max_container_bytes)
        roots = [os.path.realpath(root) for root in fetch_settings.file_roots]
        self._roots = tuple(f"{root.rstrip('/')}/" for root in roots)

    def close(self) -> None:
        self._guard.close()
        self._whole_guard.close()
        self._wholes.close()

    def fetch(self, uri: str, part: clips.Part | None = None) -> Fetched:
        """Return the clip's bytes in an open file; of a container, those of a member.

        Raises:
            DownloadError: the clip cannot be fetched.
            NotAudio: it is a file of this machine that is not sound.
        """
        if part and part.member_offset is not None:
            return self._member(uri, part)
        if addresses.is_http(uri):
            self._check_robots(uri)
            return self._download(uri)
        if self._is_stored(uri):
            return self._kept(object_stores.read(uri, self._settings.timeout_s), None)
        return self._open(_path(uri))

    def open(self, uri: str, part: clips.Part | None = None) -> BinaryIO:
        """Return a clip in an open file, to read parts of it.

        One of this machine is not read for its digest. One elsewhere has only its first bytes, if
        others can be fetched as they are read.

        Raises the same errors as `fetch`.
        """
        if part is not None and part.member_offset is not None:
            return self.fetch(uri, part).file
        if addresses.is_http(uri):
            self._check_robots(uri)
            sparse = ranges.open_url(self._guard, uri, self._max_bytes)
            return sparse or self._download(uri).file
        if self._is_stored(uri):
            return self.fetch(uri, part).file
        path = _path(uri)
        real = self._allowed(path)
        file = _open_regular(real)
        try:
            # The first bytes are looked at.
            next(_read(file, linked=real != os.path.normpath(path)), b"")
        except errors.ClipError:
            file.close()
            raise
        return file

    def _check_robots(self, url: str) -> None:
        if self._robots:
            self._robots.check(addresses.check_url(url, self._settings))

    def _download(self, url: str) -> Fetched:
        with self._guard.open(url) as answer:
            answers.check_status(answer)
            declared = answers.declared_bytes(answer)
            if declared is not None and declared > self._max_bytes:
                raise errors.TooLarge(max_bytes=self._max_bytes)
            blocks = answers.received(answer, declared)
            if answers.is_gzip(answer):
                declared, blocks = None, _unpacked(blocks, GZIP_BITS)
            return self._kept(blocks, declared)

    def _is_stored(self, uri: str) -> bool:
        scheme, separator, _ = uri.partition("://")
        return bool(separator) and scheme.lower() in self._settings.stores

    def _open(self, path: str) -> Fetched:
        real = self._allowed(path)
        file = _open_regular(real)
        return self._fetched(file, _read(file, linked=real != os.path.normpath(path)), None)

    def _allowed(self, path: str) -> str:
        """Return where a file really lies, if that is under a root."""
        real = _real(path)
        if not f"{real}/".startswith(self._roots):
            folder = os.fsencode(Path(real).parent).decode("utf-8", "backslashreplace")
            raise errors.FileNotAllowed(folder=folder)
        return real

    def _member(self, uri: str, part: clips.Part) -> Fetched:
        packing = part.packing or ""
        if packing not in ("", "deflate"):
            return self._sliced(self._wholes.read(uri, packing, part), part)
        if addresses.is_http(uri):
            return self._ranged(uri, part)
        if self._is_stored(uri):
            return self._sliced(object_stores.read(uri, self._settings.timeout_s, part), part)
        with _open_regular(self._allowed(_path(uri))) as container:
            return self._sliced(read_slice(container, part), part)

    def _ranged(self, url: str, part: clips.Part) -> Fetched:
        """Fetch a member alone, or the container once if the server knows no ranges."""
        self._check_robots(url)
        if not self._wholes.has(url):
            first = part.member_offset or 0
            last = first + (part.member_bytes or 0) - 1
            with self._guard.open(url, byte_range=f"{first}-{last}") as answer:
                if answer.status != 200:
                    answers.check_range(answer, first, last)
                    return self._sliced(answers.received(answer, part.member_bytes), part)
        return self._sliced(self._wholes.read(url, "", part), part)

    def _sliced(self, blocks: Iterable[bytes], part: clips.Part) -> Fetched:
        assert part.member_bytes is not None
        if not part.member_bytes:
            raise errors.Empty
        blocks = answers.exactly(blocks, part.member_bytes)
        if part.packing == "deflate":
            return self._kept(_unpacked(blocks, -zlib.MAX_WBITS), None)
        return self._kept(blocks, part.member_bytes)

    def _container(self, uri: str) -> FileIO:
        """Return a container as an open file."""
        if addresses.is_http(uri):
            with self._whole_guard.open(uri) as answer:
                answers.check_status(answer)
                blocks = answers.received(answer, answers.declared_bytes(answer))
                return self._spooled(blocks)
        if self._is_stored(uri):
            return self._spooled(object_stores.read(uri, self._settings.timeout_s))
        return _open_regular(self._allowed(_path(uri)))

    def _spooled(self, blocks: Iterable[bytes]) -> FileIO:
        file = _new_file(None)
        left = int(self._settings.max_container_bytes)
        for block in _saved(blocks, file):
            left -= len(block)
            if left < 0:
                file.close()
                raise unusable()
        file.seek(0)
        return file

    def _kept(self, blocks: Iterable[bytes], declared: int | None) -> Fetched:
        """Return blocks in a file of their own; how many bytes they have may be known."""
        file = _new_file(declared)
        return self._fetched(file, _saved(blocks, file), self._max_bytes)

    def _fetched(self, file: FileIO, blocks: Iterable[bytes], most: int | None) -> Fetched:
        try:
            source = _source(blocks, most)
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return Fetched(file, source)


def _source(blocks: Iterable[bytes], max_bytes: int | None) -> clips.Source:
    digest, size = hashlib.sha256(), 0
    for block in blocks:
        size += len(block)
        if max_bytes is not None and size > max_bytes:
            raise errors.TooLarge(max_bytes=max_bytes)
        digest.update(block)
    if not size:
        raise errors.Empty
    return clips.Source(digest.hexdigest(), size)


def _unpacked(blocks: Iterable[bytes], bits: int) -> Iterator[bytes]:
    """Unpack gzip in small pieces, so that a bomb ends at the limit of bytes."""
    member = zlib.decompressobj(bits)
    for block in blocks:
        for start in range(0, len(block), PACKED_BYTES):
            packed = block[start : start + PACKED_BYTES]
            while packed:
                if member.eof:
                    member = zlib.decompressobj(bits)
                try:
                    yield member.decompress(packed)
                except zlib.error:
                    raise errors.HttpError(reason="its gzip is damaged") from None
                packed = member.unused_data
    if not member.eof:
        raise errors.HttpError(reason="its gzip ends early")


def _new_file(declared: int | None) -> FileIO:
    if declared is None or declared > IN_MEMORY_BYTES or not hasattr(os, "memfd_create"):
        return tempfile.TemporaryFile(buffering=0)
    return FileIO(os.memfd_create("clip"), "w+")


def _saved(blocks: Iterable[bytes], file: FileIO) -> Iterator[bytes]:
    for block in blocks:
        yield block
        try:
            written = file.write(block)
        except OSError:
            written = 0
        if written < len(block):
            raise errors.NoSpace


def _path(uri: str) -> str:
    path = uri
    if uri[:7].lower() == "file://":
        with suppress(ValueError):
            parts = urlsplit(uri)
            here = parts.netloc.lower() in ("", "localhost")
            plain = here and not (parts.query or parts.fragment)
            path = unquote(parts.path) if plain else ""
    if addresses.CONTROL.search(uri + path) or not path.startswith("/"):
        raise errors.BadUrl(
            reason="it starts with neither http://, https:// nor /, or holds control characters"
        )
    return path


def _real(path: str) -> str:
    try:
        return os.path.realpath(path)
    except OSError:
        # A link was removed while it was resolved.
        raise errors.FileNotFound from None


def _open_regular(path: str) -> FileIO:
    """Open a file folder by folder, following no link.

    The path is resolved already, so any link in it was put there afterwards.
    """
    *folders, name = path[1:].split("/")
    parent = os.open("/", FOLDER)
    try:
        for folder in folders:
            child = os.open(folder, FOLDER, dir_fd=parent)
            os.close(parent)
            parent = child
        file = FileIO(os.open(name, FILE, dir_fd=parent))
    except OSError:
        raise errors.FileNotFound from None
    finally:
        os.close(parent)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise errors.FileNotFound
    return file


def _read(file: FileIO, *, linked: bool) -> Iterator[bytes]:
    """Yield as many bytes as the file's size says: none for files in /proc, which may not end.

    Raises:
        NotAudio: the first bytes are not sound, and no others were read. A link in a folder of
            somebody else may lead to any file, so behind a link the format must be a known one.
    """
    left = os.fstat(file.fileno()).st_size
    try:
        if left and formats.recognise(file.fileno()) is formats.UNKNOWN and linked:
            raise errors.NotAudio(kind=formats.describe(file.fileno()))
        while block := file.read(min(left, BLOCK_BYTES)):
            left -= len(block)
            yield block
    except OSError:
        raise errors.FileNotFound from None
