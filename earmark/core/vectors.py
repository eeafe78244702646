"""Embeddings as they are stored: a signed byte for each dimension of a unit vector.

The vector's scale is not stored, since its length is known. In 768 dimensions a vector is a quarter
of float32, and finds the same neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: The largest value of a signed byte.
LEVELS = 127


def parts(stored: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the scales, shape (vectors, 1), and the bytes, shape (vectors, dimensions)."""
    levels = np.frombuffer(b"".join(stored), np.int8).reshape(len(stored), -1)
    lengths = np.linalg.norm(levels.astype(np.float32), axis=1, keepdims=True)
    return 1 / np.maximum(lengths, 1), levels


def unpack(stored: Sequence[bytes]) -> np.ndarray:
    """Return stored vectors as float32, shape (vectors, dimensions)."""
    scales, levels = parts(stored)
    unpacked: np.ndarray = scales * levels
    return unpacked
