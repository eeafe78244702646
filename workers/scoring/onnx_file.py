"""An ONNX file in, the operator sets and the files that it names out; nothing of it is run."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: The fields of ONNX's protobuf messages, by number, that lead to the names.
_INNER: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "opset", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 9: "opset", 10: "own domain", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
    "opset": {1: "domain"},
    "external": {1: "key", 2: "value"},
}
#: Large graphs have some 100,000 fields; more only keep the reader busy.
_MOST_FIELDS = 5_000_000
_MOST_NAME = 4096
#: Kinds of fields: a number, bytes behind their length, and those of a fixed size.
_NUMBER, _BYTES, _FIXED = 0, 2, {1: 8, 5: 4}


def read(path: Path) -> tuple[set[str], set[str]]:
    """Return the operator sets that a graph needs and does not define, and its external files.

    Raises:
        ValueError, OSError: it is damaged.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _names(data)


def _names(data: mmap.mmap) -> tuple[set[str], set[str]]:
    needed, own, files = set(), set(), set()
    waiting = [("model", 0, len(data))]
    fields = 0
    while waiting and fields < _MOST_FIELDS:
        message, begin, end = waiting.pop()
        texts: dict[str, str] = {}
        for number, start, stop in _fields(data, begin, end):
            fields += 1
            kind = _INNER[message].get(number)
            if kind in _INNER:
                waiting.append((kind, start, stop))
            elif kind:
                texts[kind] = data[start : min(stop, start + _MOST_NAME)].decode()
        if message == "opset":
            needed.add(texts.get("domain", ""))
        elif message == "function":
            own.add(texts.get("own domain", ""))
        elif texts.get("key") == "location":
            files.add(texts.get("value", ""))
    if waiting:
        raise ValueError("it has too many parts")
    return needed - own, files


def _fields(data: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the number of each field of a message, and where its bytes begin and end."""
    while place < end:
        key, start = _varint(data, place, end)
        kind = key & 7
        if kind == _NUMBER:
            _, place = _varint(data, start, end)
        elif kind == _BYTES:
            size, start = _varint(data, start, end)
            place = start + size
        elif kind in _FIXED:
            place = start + _FIXED[kind]
        else:
            raise ValueError("it is no ONNX file")
        if place > end:
            raise ValueError("it ends too early")
        yield key >> 3, start, place


def _varint(data: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    """Return the number at this place, and the place behind it."""
    value = 0
    for shift, byte in enumerate(data[place : min(end, place + 10)]):
        value |= (byte & 127) << 7 * shift
        if byte < 128:
            return value, place + shift + 1
    raise ValueError("it is no ONNX file")
