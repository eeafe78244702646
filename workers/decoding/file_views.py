"""Open files that read as others: a stretch as a file of its own, a sparse file as a whole one."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from earmark.core.sparse_file import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable


class View(io.FileIO):
    """A stretch of a file as a file of its own, with some bytes in place of its own."""

    def __init__(self, clip: int, start: int, stop: int, at: int, content: bytes) -> None:
        super().__init__(clip, closefd=False)
        self._start, self._stop, self._at, self._content = start, stop, at, content

    def tell(self) -> int:
        return super().tell() - self._start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET:
            offset += self._start
        elif whence == os.SEEK_END:
            offset, whence = offset + self._stop, os.SEEK_SET
        return super().seek(offset, whence) - self._start

    def read(self, size: int | None = -1) -> bytes:
        start, left = self.tell(), self._stop - super().tell()
        wanted = left if size is None or size < 0 else min(size, left)
        content = super().read(max(0, wanted)) or b""
        place = self._at - start
        if not self._content or not 0 <= place < len(content):
            return content
        return content[:place] + self._content + content[place + len(self._content) :]


class Blocks(io.RawIOBase):
    """A sparse file as a whole one: `want` brings a block before it is read."""

    def __init__(self, clip: int, want: Callable[[int], None]) -> None:
        self._clip, self._want = clip, want
        self._size, self._at = os.fstat(clip).st_size, 0
        self._here: set[int] = set()

    def bring_end(self) -> None:
        """Have its last block here, in which chunks may lie."""
        self._bring(max(0, self._size - 1), 1)

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        self._bring(self._at, len(wanted))
        count = os.preadv(self._clip, [wanted], self._at)
        self._at += count
        return count

    def _bring(self, start: int, size: int) -> None:
        for block in range(start // BLOCK_BYTES, -(-(start + size) // BLOCK_BYTES)):
            if block not in self._here:
                self._want(block)
                self._here.add(block)
