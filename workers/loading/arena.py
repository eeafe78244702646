"""Memory that a worker and one of its loaders share, and the extents taken of it."""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import tempfile
from bisect import bisect
from typing import Any

import numpy as np

#: A sample's bytes.
SAMPLE = 4
#: Memory that nobody used for so many beats goes back to the system.
IDLE_BEATS = 20
#: A worker that has so many windows to score is in no hurry for more: two batches of a CPU's lanes.
FED_WINDOWS = 32


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


def clear(samples: np.ndarray) -> None:
    """Give the pages of mapped memory back to the system, with what is in them."""
    # Linux alone can do this; elsewhere the system may write them to the file.
    if sys.platform == "linux":
        view: Any = samples.base
        view.obj.madvise(mmap.MADV_REMOVE)


class Extents:
    """The free and the taken parts of an arena, in samples; the lowest that fits is taken."""

    def __init__(self, samples: int) -> None:
        self._free = [(0, samples)]
        self._taken: dict[int, int] = {}
        self.used = 0

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
                self.used += samples
                return start
        return None

    def give_back(self, start: int) -> None:
        """Free a part by its beginning."""
        samples = self._taken.pop(start)
        self.used -= samples
        end = start + samples
        place = bisect(self._free, (start, end))
        if place < len(self._free) and self._free[place][0] == end:
            end = self._free.pop(place)[1]
        if place and self._free[place - 1][1] == start:
            place -= 1
            start = self._free.pop(place)[0]
        self._free.insert(place, (start, end))


class Room:
    """A loader's view of the arena, with its extents; those of sent windows the worker frees."""

    def __init__(self, descriptor: int) -> None:
        self.samples = mapped(descriptor)
        #: Whether the worker has freed something since this was reset.
        self.freed = False
        self._extents = Extents(len(self.samples))
        self._sent = 0
        self._idle_beats = 0

    @property
    def is_fed(self) -> bool:
        """Whether the worker has many windows to score."""
        return self._sent >= FED_WINDOWS

    def take(self, samples: int, most: int) -> int | None:
        """Return the beginning of an extent of so many samples, or None if none is free.

        If `most` are in use by then, it is as if none were free.
        """
        if self._extents.used and self._extents.used + samples > most:
            return None
        return self._extents.take(samples)

    def give_back(self, offset: int) -> None:
        """Free an extent that was not sent."""
        self._extents.give_back(offset)
        self.freed = True

    def send(self, offset: int, heard: int, samples: int) -> None:
        """Pad a window from `heard` samples to `samples`. From now on it is the worker's."""
        self.samples[offset + heard : offset + samples] = 0
        self._sent += 1

    def free(self, offsets: list[int]) -> None:
        """Take back extents from the worker."""
        for offset in offsets:
            self._extents.give_back(offset)
        self._sent -= len(offsets)
        self.freed = True

    def beat(self, filling: int) -> None:
        """Give idle memory back; `filling` extents are taken and not sent."""
        self._idle_beats = 0 if self._extents else self._idle_beats + 1
        if self._idle_beats == IDLE_BEATS:
            clear(self.samples)
        if len(self._extents) != self._sent + filling:
            raise AssertionError(f"{len(self._extents)} extents, {self._sent} sent, {filling} here")
