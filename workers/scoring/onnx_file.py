"""An ONNX file in, the operator sets and the files that it names out; nothing of it is run."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: The fields of ONNX's protobuf messages, by number, that lead to the names.
_INNER: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
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


@dataclass(slots=True)
class Names:
    """The operator sets that a graph imports, those it defines itself, and its external files."""

    domains: set[str] = field(default_factory=set)
    own_domains: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)


def read(path: Path) -> Names:
    """Read the names in an ONNX file; raise ValueError or OSError if it is damaged."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _names(data)


def _names(data: mmap.mmap) -> Names:
    names = Names()
    waiting = [("model", 0, len(data))]
    fields = 0
    while waiting:
        message, begin, end = waiting.pop()
        texts: dict[str, str] = {}
        for number, start, stop in _fields(data, begin, end):
            fields += 1
            kind = _INNER[message].get(number, "")
            if kind in _INNER:
                waiting.append((kind, start, stop))
            elif kind:
                texts[kind] = data[start : min(stop, start + _MOST_NAME)].decode()
        if fields > _MOST_FIELDS:
            raise ValueError("it has too many parts")
        _note(names, message, texts)
    return names


def _note(names: Names, message: str, texts: dict[str, str]) -> None:
    if message == "opset":
        names.domains.add(texts.get("domain", ""))
    elif message == "function":
        names.own_domains.add(texts.get("own domain", ""))
    elif texts.get("key") == "location":
        names.files.add(texts.get("value", ""))


def _fields(data: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the number of each field of a message, and where its bytes begin and end."""
    while place < end:
        key, place = _varint(data, place, end)
        start = place
        match key & 7:
            case 0:
                _, place = _varint(data, place, end)
            case 1:
                place += 8
            case 2:
                size, start = _varint(data, place, end)
                place = start + size
            case 5:
                place += 4
            case _:
                raise ValueError("it is no ONNX file")
        if place > end:
            raise ValueError("it ends too early")
        yield key >> 3, start, place


def _varint(data: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    """Return the number at this place, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if place + shift // 7 >= end:
            break
        byte = data[place + shift // 7]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place + shift // 7 + 1
    raise ValueError("it is no ONNX file")
