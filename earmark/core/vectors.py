"""Embeddings as they are stored: a unit vector's scale (float32), then a signed byte a dimension.

In 768 dimensions that is 772 bytes, a quarter of float32, and finds the same neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SCALE_BYTES = 4
#: The largest value of a signed byte.
LEVELS = 127


def parts(stored: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the scales, shape (vectors, 1), and the bytes, shape (vectors, dimensions)."""
    rows = np.frombuffer(b"".join(stored), np.uint8).reshape(len(stored), -1)
    scales = rows[:, :SCALE_BYTES].copy().view("<f4")
    return scales, rows[:, SCALE_BYTES:].view(np.int8)


def unpack(stored: Sequence[bytes]) -> np.ndarray:
    """Return stored vectors as float32, shape (vectors, dimensions)."""
    scales, levels = parts(stored)
    unpacked: np.ndarray = scales * levels
    return unpacked
