"""The answers of a decoder process on its socket: pieces of samples, the last with the facts."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np

#: A clip's sample rate. Or the start and the end of a stretch in seconds, whose samples are wanted
#: as the file has them.
REQUEST = struct.Struct("<Idd")
#: The number of samples of a piece, and the bytes of the JSON in front of them; 0: more will come.
HEAD = struct.Struct("<II")
#: Most clips are one piece, and a long recording takes this much memory: 33 s at 16 kHz.
PIECE_SAMPLES = 2**19
MAX_END_BYTES = 65536


def head(samples: int, end: dict[str, Any] | None) -> bytes:
    """Return what comes before the samples of a piece."""
    text = json.dumps(end).encode() if end else b""
    return HEAD.pack(samples, len(text)) + text


def pieces(blocks: Iterable[np.ndarray]) -> Iterator[tuple[list[np.ndarray], bool]]:
    """Yield blocks of samples together, up to PIECE_SAMPLES, and whether they are the last."""
    held: list[np.ndarray] = []
    count = 0
    for block in blocks:
        rest = block
        while count + len(rest) > PIECE_SAMPLES:
            fits = PIECE_SAMPLES - count
            yield [*held, rest[:fits]], False
            held, count, rest = [], 0, rest[fits:]
        held.append(rest)
        count += len(rest)
    yield held, True
