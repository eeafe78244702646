"""Folders that grow: the files in them that are complete."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from earmark.core.errors import UsageError
from producer import walk
from producer.sources import is_audio

#: A file is complete when it has not changed for this long: recorders write every second or so.
SETTLED_S = 5.0
#: Between two looks, and at least so many times as long as a look takes.
LOOK_EVERY_S, REST = 1.0, 10.0


class GrowingFolders:
    """Finds the new files of some folders once they are complete, each once.

    Use one per run, and ask it again and again.
    """

    def __init__(self, sources: Iterable[str], settled_s: float = SETTLED_S) -> None:
        self._folders = [Path(source).expanduser() for source in sources]
        for folder in self._folders:
            if not folder.is_dir():
                raise UsageError(reason=f"--watch needs folders, and {str(folder)!r} is none.")
        self._settled_s = settled_s
        #: By path, the size and time of a file, and since when it has had these.
        self._growing: dict[Path, tuple[tuple[int, int], float]] = {}
        self._taken: set[Path] = set()
        self._next_look = 0.0

    def complete(self) -> list[str]:
        """Return the sound files that are complete and were not returned before."""
        began = time.monotonic()
        if began < self._next_look:
            return []
        growing, complete = {}, []
        for path, state in self._new():
            since = began
            if path in self._growing and self._growing[path][0] == state:
                since = self._growing[path][1]
            if began - since < self._settled_s:
                growing[path] = state, since
                continue
            self._taken.add(path)
            if is_audio(path):
                complete.append(str(path))
        self._growing = growing
        now = time.monotonic()
        self._next_look = now + max(LOOK_EVERY_S, REST * (now - began))
        return complete

    def _new(self) -> Iterator[tuple[Path, tuple[int, int]]]:
        for folder in self._folders:
            for path in walk.files(folder, lambda _: None):
                if path in self._taken:
                    continue
                try:
                    status = path.stat()
                except OSError:  # it is gone, or a link to nothing yet
                    continue
                if status.st_size:
                    yield path, (status.st_size, status.st_mtime_ns)
