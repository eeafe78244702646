"""Messages between a worker and a loader: a letter, then rows of a fixed form, or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from earmark.core.clips import AudioFacts

if TYPE_CHECKING:
    from collections.abc import Sequence

# To a loader.
DEAL, FREE, CANCEL, DRAIN = b"D", b"F", b"C", b"S"
# From a loader. A beat says that it lives, and whether its network is down.
READY, REFUSED, ROWS, ENDED, BEAT = b"R", b"N", b"W", b"E", b"B"

#: A clip's number each time it is dealt. Rows of an older deal are dropped by it.
_DEAL = ("deal", "<u8")
#: The parts of the arena that a worker frees, by their beginnings.
OFFSET = np.dtype("<u8")

#: A window in the arena. `heard` is less than `samples` if it is padded.
WINDOW = np.dtype(
    [
        _DEAL,
        ("offset", "<u8"),
        ("samples", "<u4"),
        ("start", "<u8"),
        ("heard", "<u4"),
    ]
)
_KINDS = {"float": "<f8", "int": "<u4", "str": "S32", "bool": "?"}
_FACTS = [(name, _KINDS[kind]) for name, kind in AudioFacts.__annotations__.items()]
#: A clip whose last window has been sent. `wait_ms` is the part of `decode_ms` before a decoder was
#: free, and `room_ms` the time that samples waited for memory.
CLIP = np.dtype(
    [
        _DEAL,
        ("windows", "<u4"),
        ("bytes", "<u8"),
        ("sha256", "S64"),
        ("fetch_ms", "<f4"),
        ("wait_ms", "<f4"),
        ("decode_ms", "<f4"),
        ("room_ms", "<f4"),
        *_FACTS,
    ]
)
COUNT_BYTES = 4
_FIRST_FACT = -len(_FACTS)


def clip_row(facts: AudioFacts, *values: Any) -> tuple[Any, ...]:
    """Return the row of a clip: its values in the order of `CLIP`, and the facts of its file."""
    names = facts.__slots__
    return (*values, *(getattr(facts, name) for name in names))


def facts_of(row: Sequence[Any]) -> AudioFacts:
    """Return the facts of a file from its clip's row."""
    facts = dict(zip(AudioFacts.__slots__, row[_FIRST_FACT:], strict=True))
    facts["codec"] = facts["codec"].decode()
    return AudioFacts(**facts)


def rows(clips: Sequence[Any], windows: Sequence[Any]) -> bytes:
    """Return the message of clips that are decoded, and of windows that wait in the arena."""
    count = len(clips).to_bytes(COUNT_BYTES, "little")
    return ROWS + count + np.array(clips, CLIP).tobytes() + np.array(windows, WINDOW).tobytes()


def read_rows(message: bytes) -> tuple[list[Any], list[Any]]:
    """Return the rows of such a message: clips, and windows."""
    first = 1 + COUNT_BYTES
    count = int.from_bytes(message[1:first], "little")
    clips = np.frombuffer(message, CLIP, count, first)
    windows = np.frombuffer(message, WINDOW, offset=first + clips.nbytes)
    return clips.tolist(), windows.tolist()
