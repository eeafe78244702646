"""A file elsewhere as an open file here, whose blocks come as they are read."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from io import FileIO

from earmark.core import errors

BLOCK_BYTES = 256 * 1024


class SparseFile(FileIO):
    """An open file of a known size, without its content but for the blocks that were brought.

    `fetch` returns the bytes from one place up to another. Threads may share it.
    """

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        with tempfile.TemporaryFile(buffering=0) as file:
            super().__init__(os.dup(file.fileno()), "r+")
        self.truncate(size)
        self._size, self._fetch = size, fetch
        self._here: set[int] = set()
        self._lock = threading.Lock()

    def bring(self, block: int) -> None:
        """Fetch a block, by its number, unless it is here.

        Raises:
            DownloadError: it cannot be fetched, or the disk is full.
        """
        with self._lock:
            first = block * BLOCK_BYTES
            if block in self._here or not 0 <= first < self._size:
                return
            self.keep(block, self._fetch(first, min(first + BLOCK_BYTES, self._size)))

    def keep(self, block: int, content: bytes) -> None:
        """Take the content of a block; raise NoSpace if the disk is full."""
        try:
            written = os.pwrite(self.fileno(), content, block * BLOCK_BYTES)
        except OSError:
            written = 0
        if written < len(content):
            raise errors.NoSpace
        self._here.add(block)
