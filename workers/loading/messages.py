"""Messages between a worker and a loader: a letter, then rows of a fixed form, or JSON."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from earmark.core.clips import AudioFacts

if TYPE_CHECKING:
    from collections.abc import Sequence

# To a loader.
DEAL, FREE, RELEASE, CANCEL, DRAIN = b"D", b"F", b"G", b"C", b"S"
# From a loader. A beat says that it lives, and whether its network is down; a step of a clip that
# was seen is sent to observers alone.
READY, REFUSED, ROWS, ENDED, BEAT, SEEN = b"R", b"N", b"W", b"E", b"B", b"O"

#: A clip's number each time it is dealt. Rows of an older deal are dropped by it.
_DEAL = ("deal", "<u8")
#: The parts of the arena that a worker frees, by their beginnings.
OFFSET = np.dtype("<u8")

#: A window in the arena. `heard` is less than `samples` if it is padded. The mix is channel 0.
WINDOW = np.dtype(
    [
        _DEAL,
        ("offset", "<u8"),
        ("samples", "<u4"),
        ("start", "<u8"),
        ("heard", "<u4"),
        ("channel", "<u2"),
    ]
)
_KINDS = {"float": "<f8", "int": "<u4", "str": "S32", "bool": "?"}
#: Tags are too long for a row: it has their length, and they follow the rows of the message.
_LONG = "tags"
_FACTS = []
for _name, _kind in AudioFacts.__annotations__.items():
    _FACTS.append((_name, "<u4" if _name == _LONG else _KINDS[_kind]))
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
#: How many rows of clips and of windows a message has.
COUNTS = struct.Struct("<II")
_FIRST_FACT = -len(_FACTS)
_TAGS = AudioFacts.__slots__.index(_LONG) - len(_FACTS)


def clip_row(facts: AudioFacts, *values: Any) -> tuple[Any, ...]:
    """Return the row of a clip: its values in the order of `CLIP`, and the facts of its file."""
    names = facts.__slots__
    return (*values, *(getattr(facts, name) for name in names))


def facts_of(row: Sequence[Any]) -> AudioFacts:
    """Return the facts of a file from its clip's row."""
    facts: list[Any] = []
    for value in row[_FIRST_FACT:]:
        facts.append(value.decode() if isinstance(value, bytes) else value)  # noqa: PERF401
    return AudioFacts(*facts)


def rows(clips: Sequence[Any], windows: Sequence[Any]) -> bytes:
    """Return the message of clips that are decoded, and of windows that wait in the arena."""
    fixed, texts = [], []
    for row in clips:
        text = row[_TAGS].encode()
        fixed.append((*row[:_TAGS], len(text), *row[_TAGS + 1 :]))
        texts.append(text)
    parts = [
        ROWS,
        COUNTS.pack(len(clips), len(windows)),
        np.array(fixed, CLIP).tobytes(),
        np.array(windows, WINDOW).tobytes(),
        *texts,
    ]
    return b"".join(parts)


def read_rows(message: bytes) -> tuple[list[Any], list[Any]]:
    """Return the rows of such a message: clips, and windows."""
    clips_count, windows_count = COUNTS.unpack_from(message, 1)
    place = 1 + COUNTS.size
    fixed = np.frombuffer(message, CLIP, clips_count, place)
    place += fixed.nbytes
    windows = np.frombuffer(message, WINDOW, windows_count, place)
    place += windows.nbytes
    clips = []
    for row in fixed.tolist():
        end = place + row[_TAGS]
        clips.append((*row[:_TAGS], message[place:end], *row[_TAGS + 1 :]))
        place = end
    return clips, windows.tolist()
