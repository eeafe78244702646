"""A stretch of an open file that reads as a file of its own."""

from __future__ import annotations

import io
import os


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
