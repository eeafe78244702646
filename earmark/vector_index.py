"""Nearest vectors: an index in files that are mapped into memory.

Few vectors are all compared. Of many, sketches (a bit for the side of each of some planes) find
candidates, and these are compared. The database has the truth: an index may always be deleted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

#: Up to so many vectors all are compared.
EXACT = 200_000
#: Bits of a sketch, and vectors compared of those with the most like sketches: recall of 0.99
#: among a million clustered vectors.
BITS, CANDIDATES = 512, 4096
#: Vectors in memory at once, as float32: 30 MB in 768 dimensions.
BLOCK = 10_000
#: Sketches compared at once: their intermediates stay in a core's cache.
SKETCHES = 16_384
WINDOW = np.dtype([("clip_id", "<i8"), ("channel", "<i2"), ("start_s", "<f8"), ("end_s", "<f8")])

#: Windows with the scales and levels of their vectors.
Block = tuple[np.ndarray, np.ndarray, np.ndarray]


def write(folder: Path, blocks: Iterable[Block]) -> None:
    """Write an index of vectors into a folder."""
    for block in blocks:
        for name, array in zip(("windows", "scales", "levels"), block, strict=True):
            with (folder / name).open("ab") as file:
                array.tofile(file)
    index = Index.mapped(folder)
    if len(index.windows) > EXACT:
        write_sketches(folder, index)


def write_sketches(folder: Path, index: Index) -> None:
    count = len(index.windows)
    sample = np.linspace(0, count - 1, min(count, BLOCK)).astype(int)
    mean = index.vectors(sample).mean(axis=0)
    mean.tofile(folder / "mean")
    shape = BITS // 64, count
    sketches = np.memmap(folder / "sketches", np.uint64, "w+", shape=shape)
    for start in range(0, count, BLOCK):
        places = slice(start, start + BLOCK)
        sketches[:, places] = sketch(index.vectors(places), mean).T
    sketches.flush()


def sketch(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return the sketches of vectors, shape (vectors, words)."""
    planes = np.random.default_rng(0).normal(size=(len(mean), BITS)).astype(np.float32)
    bits = (vectors - mean) @ planes > 0
    return np.packbits(bits, axis=1).view(np.uint64)


@dataclass(frozen=True, slots=True)
class Index:
    """The vectors of some windows, and where these are."""

    #: Of the type WINDOW.
    windows: np.ndarray
    scales: np.ndarray
    levels: np.ndarray
    mean: np.ndarray
    sketches: np.ndarray

    @classmethod
    def mapped(cls, folder: Path) -> Index:
        """Return the index that `write` wrote into a folder."""
        windows = _mapped(folder / "windows", WINDOW)
        count = len(windows)
        levels = _mapped(folder / "levels", np.int8)
        sketches = _mapped(folder / "sketches", np.uint64)
        return cls(
            windows,
            _mapped(folder / "scales", np.float32),
            levels.reshape(count, levels.size // max(1, count)),
            _mapped(folder / "mean", np.float32),
            sketches.reshape(sketches.size // max(1, count), count),
        )

    def vectors(self, places: slice | np.ndarray) -> np.ndarray:
        """Return some of the vectors as float32, shape (places, dimensions)."""
        vectors: np.ndarray = self.scales[places, None] * self.levels[places]
        return vectors

    def nearest(
        self, query: np.ndarray, count: int, allowed: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the places of the windows most like a query, and their cosines, best first.

        Args:
            query: a unit vector.
            allowed: whether each window may be among them.
        """
        places = np.flatnonzero(allowed)
        if len(places) > EXACT:
            places = self._candidates(query, places)
        blocks = [places[start : start + BLOCK] for start in range(0, len(places), BLOCK)]
        cosines = np.concatenate([self.vectors(block) @ query for block in blocks] or [places])
        best = np.argsort(-cosines, kind="stable")[:count]
        return places[best], cosines[best]

    def _candidates(self, query: np.ndarray, places: np.ndarray) -> np.ndarray:
        every = len(places) == len(self.windows)
        sketches = self.sketches if every else self.sketches[:, places]
        different = _different_bits(sketches, sketch(query[None], self.mean)[0])
        up_to = np.cumsum(np.bincount(different))
        most = np.searchsorted(up_to, CANDIDATES)
        candidates: np.ndarray = places[different <= most]
        return candidates


def _different_bits(sketches: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return how many bits of each sketch, shape (words, sketches), differ from the query's."""
    total = np.zeros(sketches.shape[1], np.uint16)
    for start in range(0, len(total), SKETCHES):
        places = slice(start, start + SKETCHES)
        changed = np.empty(len(total[places]), np.uint64)
        for word, wanted in zip(sketches[:, places], query, strict=True):
            np.bitwise_xor(word, wanted, out=changed)
            total[places] += np.bitwise_count(changed)
    return total


def _mapped(file: Path, dtype: np.dtype | type) -> np.ndarray:
    # An empty file cannot be mapped.
    if not file.exists() or not file.stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(file, dtype, "r")
