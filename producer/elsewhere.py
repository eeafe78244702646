"""A list or container on another machine in; its bytes out: all of them, or by ranges.

Over HTTP it is fetched as workers fetch clips: through the guard, with logins by host and the
proxy. Object stores are read with fsspec.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, cast

from earmark.core import answers
from earmark.core.addresses import is_http
from earmark.core.errors import DownloadError, UsageError
from earmark.core.settings import Fetch

if TYPE_CHECKING:
    from earmark.core.guard import Guard

#: A list is read as fast as it is submitted: 200 million rows in this time.
WHOLE_S = 3600.0
#: The first bytes, which tell a compression.
HEAD_BYTES = 6


@dataclass(frozen=True, slots=True)
class Ranged:
    """A remote file that is read by ranges."""

    size: int
    head: bytes
    #: Returns the bytes from a place on, as many as asked for.
    read: Callable[[int, int], bytes]


@contextmanager
def stream(url: str, fetch: Fetch) -> Iterator[io.BufferedReader]:
    """Yield a remote file from its beginning."""
    if not is_http(url):
        import fsspec

        with fsspec.open(url, "rb") as file:
            yield io.BufferedReader(file)
        return
    limits = {"max_bytes": fetch.max_container_bytes, "timeout_s": WHOLE_S}
    with _guard(fetch.model_copy(update=limits)) as guard, guard.open(url) as answer:
        answers.check_status(answer)
        body = _Body(answers.received(answer, answers.declared_bytes(answer)))
        yield io.BufferedReader(body)


@contextmanager
def ranges(url: str, fetch: Fetch) -> Iterator[Ranged | None]:
    """Yield a remote file to read by ranges; None if its server sends none."""
    if not is_http(url):
        import fsspec

        # Without a cache no byte is read that nobody asks for.
        with fsspec.open(url, "rb", cache_type="none") as file:

            def read(start: int, size: int) -> bytes:
                file.seek(start)
                return bytes(file.read(size))

            yield Ranged(file.size, read(0, HEAD_BYTES), read)
        return
    with _guard(fetch) as guard:
        yield _ranged(guard, url)


@contextmanager
def copied(url: str, fetch: Fetch) -> Iterator[BinaryIO]:
    """Yield a copy of a remote file."""
    with tempfile.TemporaryFile() as copy:
        with stream(url, fetch) as file:
            shutil.copyfileobj(file, copy)
        copy.seek(0)
        yield cast("BinaryIO", copy)


def matches(pattern: str) -> list[str]:
    """Return the URLs in an object store that match a glob."""
    import fsspec

    filesystem, path = fsspec.url_to_fs(pattern)
    found = sorted(filesystem.glob(path))
    if not found:
        raise UsageError(reason=f"No file matches {pattern!r}.")
    return [str(filesystem.unstrip_protocol(match)) for match in found]


def why(place: str, error: Exception) -> str:
    """Return why a file here or elsewhere cannot be read, for a sentence."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, DownloadError) or "://" not in place:
        return str(error).partition("\n")[0].removesuffix(".") or type(error).__name__
    return type(error).__name__  # its text may quote the URL with its signature


def _guard(fetch: Fetch) -> closing[Guard]:
    # Imported here because most lists are files.
    from earmark.core.guard import Guard

    return closing(Guard(fetch))


def _ranged(guard: Guard, url: str) -> Ranged | None:
    def read(start: int, size: int) -> bytes:
        last = start + size - 1
        with guard.open(url, byte_range=f"{start}-{last}") as answer:
            answers.check_range(answer, start, last)
            return answers.body(answer, size)

    with guard.open(url, byte_range=f"0-{HEAD_BYTES - 1}") as answer:
        size = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if answer.status != 206 or not size.isdecimal():
            return None
        head = b"".join(answers.received(answer, HEAD_BYTES))
    return Ranged(int(size), head, read)


class _Body(io.RawIOBase):
    """Blocks of bytes as a stream."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        block = self._left or next(self._blocks, b"")
        count = min(len(block), len(buffer))
        buffer[:count] = block[:count]
        self._left = block[count:]
        return count
