"""Memory that a worker and one of its loaders share, and the extents taken of it."""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from bisect import bisect

import numpy as np

#: A sample's bytes.
SAMPLE = 4


def new_memory(samples: int) -> int:
    """Return the descriptor of memory for so many samples; the caller closes it.

    Linux seals its size, so that no process can shrink it under the other. Elsewhere it is a file
    without a name.
    """
    if not hasattr(os, "memfd_create"):
        return _unnamed_file(samples)
    descriptor = os.memfd_create("arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(descriptor, samples * SAMPLE)
    fcntl.fcntl(
        descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    )
    return descriptor


def _unnamed_file(samples: int) -> int:
    with tempfile.TemporaryFile(buffering=0) as file:
        file.truncate(samples * SAMPLE)
        return os.dup(file.fileno())


def mapped(descriptor: int) -> np.ndarray:
    """Return the memory as an array of float32, which stays valid while anything refers to it."""
    return np.frombuffer(mmap.mmap(descriptor, 0), np.float32)


class Extents:
    """The free and the taken parts of an arena, in samples; the lowest that fits is taken."""

    def __init__(self, samples: int) -> None:
        self._free = [(0, samples)]
        self._taken: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._taken)

    def take(self, samples: int) -> int | None:
        """Return the beginning of a part of so many samples, or None if none is free."""
        for place, (start, end) in enumerate(self._free):
            if end - start >= samples:
                self._free[place] = (start + samples, end)
                if end - start == samples:
                    del self._free[place]
                self._taken[start] = samples
                return start
        return None

    def give_back(self, start: int) -> None:
        """Free a part by its beginning."""
        end = start + self._taken.pop(start)
        place = bisect(self._free, (start, end))
        if place < len(self._free) and self._free[place][0] == end:
            end = self._free.pop(place)[1]
        if place and self._free[place - 1][1] == start:
            place -= 1
            start = self._free.pop(place)[0]
        self._free.insert(place, (start, end))
