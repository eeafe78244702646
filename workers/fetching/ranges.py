"""A URL in, an open file out whose blocks are fetched as they are read, each through the guard."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass

from urllib3 import BaseHTTPResponse

from earmark.core import answers, errors, formats
from earmark.core.guard import Guard
from earmark.core.sparse_file import BLOCK_BYTES, SparseFile

#: Smaller files are fetched as a whole.
LEAST_BYTES = 16 * BLOCK_BYTES
#: Those that libsndfile reads from anywhere, with a few looks at other places.
FORMATS = ("flac", "wav")
_RANGE = re.compile(r"bytes 0-\d+/(\d{1,12})")


def open_url(guard: Guard, url: str, max_bytes: int) -> SparseFile | None:
    """Return a file of a server that answers with ranges; None if it has to be fetched whole.

    Raises:
        DownloadError: the URL is refused, or its server gives no usable answer.
    """
    with guard.open(url, byte_range=f"0-{BLOCK_BYTES - 1}") as answer:
        found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status != 206 or not found or int(found[1]) < LEAST_BYTES:
            return None
        size, version = int(found[1]), _version(answer)
        answers.check_range(answer, 0, BLOCK_BYTES - 1)
        head = answers.body(answer, BLOCK_BYTES)
    left = max_bytes - BLOCK_BYTES
    file = SparseFile(size, _Ranges(guard, url, version, max_bytes, left).fetch)
    with ExitStack() as stack:
        stack.enter_context(file)
        file.keep(0, head)
        if formats.recognise(file.fileno()).name in FORMATS:
            stack.pop_all()
            return file
    return None


def _version(answer: BaseHTTPResponse) -> tuple[str | None, ...]:
    size = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return size, answer.headers.get("ETag"), answer.headers.get("Last-Modified")


@dataclass(slots=True)
class _Ranges:
    """Fetches parts of one file, as long as it stays the same one, within a limit of bytes."""

    guard: Guard
    url: str
    version: tuple[str | None, ...]
    max_bytes: int
    left: int

    def fetch(self, start: int, stop: int) -> bytes:
        self.left -= stop - start
        if self.left < 0:
            raise errors.TooLarge(max_bytes=self.max_bytes)
        with self.guard.open(self.url, byte_range=f"{start}-{stop - 1}") as answer:
            answers.check_range(answer, start, stop - 1)
            if _version(answer) != self.version:
                raise errors.HttpError(reason="it became another file")
            return answers.body(answer, stop - start)
