"""What a decoder process is asked and answers on its socket: pieces of samples, then the facts."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from earmark.core.clips import MIX

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np

REQUEST = struct.Struct("<Ii?dd?")
#: What brings a block that a decoder wants.
BROUGHT = b"!"
#: The number of samples of a piece, their channel (0: the mix), and the bytes of the JSON in front
#: of them; 0: more will come.
HEAD = struct.Struct("<III")
#: Most clips are one piece, and a long recording takes this much memory: 33 s at 16 kHz.
PIECE_SAMPLES = 2**19
MAX_END_BYTES = 65536


class Request(NamedTuple):
    """What is wanted of a file: its waveform, or a stretch of it as the file has it."""

    sample_rate: int = 0
    #: As `RunOptions.decoded_channels` has them.
    channels: int = MIX
    is_stretch: bool = False
    #: In seconds.
    start_s: float = 0.0
    end_s: float = 0.0
    #: Whether it is a stretch of a `SparseFile`, whose blocks have to be asked for.
    is_sparse: bool = False


def head(samples: int, channel: int, end: dict[str, Any] | None) -> bytes:
    """Return what comes before the samples of a piece."""
    text = json.dumps(end).encode() if end else b""
    return HEAD.pack(samples, channel, len(text)) + text


def pieces(
    parts: Iterable[tuple[int, np.ndarray]],
) -> Iterator[tuple[int, list[np.ndarray], bool]]:
    """Yield blocks of a channel together, and whether they are the last of the clip.

    All channels together hold up to PIECE_SAMPLES.
    """
    held: dict[int, list[np.ndarray]] = defaultdict(list)
    count = 0
    for channel, block in parts:
        rest = block
        while count + len(rest) > PIECE_SAMPLES:
            fits = PIECE_SAMPLES - count
            held[channel].append(rest[:fits])
            for number, blocks in held.items():
                yield number, blocks, False
            held.clear()
            count, rest = 0, rest[fits:]
        held[channel].append(rest)
        count += len(rest)
    last = len(held) - 1
    for place, (number, blocks) in enumerate(held.items()):
        yield number, blocks, place == last
