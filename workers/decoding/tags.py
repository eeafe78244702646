"""What a file says of itself: the texts of its header, bounded and without control characters."""

from __future__ import annotations

import itertools
import json
import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from workers.decoding.readers import Audio

MAX_TAGS, MAX_NAME, MAX_VALUE = 100, 64, 1000
#: JSON of all tags of a file; those that do not fit are left out.
MAX_BYTES = 16_384
#: Of a chunk or block of texts. Pictures are larger.
MAX_CHUNK = 65_536
#: Blocks of a FLAC before its sound.
MAX_BLOCKS = 64
VORBIS_COMMENTS = 4
#: The fields of a bext chunk, one after the other: their names and bytes.
_BEXT = (("description", 256), ("originator", 32), ("reference", 32), ("origination", 18))
_SONG_METER = {1: "model", 2: "serial", 3: "firmware", 4: "prefix", 5: "timestamp", 6: "position"}
_SONG_METER |= {10: "notes", 12: "temperature"}


def read(audio: Audio) -> dict[str, str]:
    """Return the tags of an open file, those that its reader knows first."""
    tags: dict[str, str] = {}
    size = 2
    for raw_name, raw_value in itertools.chain(audio.tags().items(), _own(audio)):
        name, value = _plain(raw_name)[:MAX_NAME], _plain(raw_value)[:MAX_VALUE]
        size += len(json.dumps({name: value}))
        if len(tags) == MAX_TAGS or size > MAX_BYTES:
            break
        if name and value:
            tags[name] = value
    return tags


def _plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text[:MAX_CHUNK]).strip()


def _own(audio: Audio) -> Iterator[tuple[str, str]]:
    if audio.format.name == "flac":
        yield from _vorbis_comments(audio.clip)
    if audio.format.name != "wav":
        return
    for chunk in audio.chunks:
        if chunk.name in _CHUNKS:
            content = os.pread(audio.clip, min(max(chunk.size, 0), MAX_CHUNK), chunk.content)
            yield from _CHUNKS[chunk.name](content)


def _info(content: bytes) -> Iterator[tuple[str, str]]:
    if content[:4] != b"INFO":
        return
    for name, value in _records(content[4:], "<4sI", align=2):
        yield f"info.{_text(name)}", _text(value)


def _guano(content: bytes) -> Iterator[tuple[str, str]]:
    for line in _text(content).splitlines():
        name, _, value = line.partition(":")
        yield f"guano.{name.strip()}", value


def _bext(content: bytes) -> Iterator[tuple[str, str]]:
    for name, size in _BEXT:
        field, content = content[:size], content[size:]
        if name == "origination":  # a date and a time, side by side
            field = field[:10] + b" " + field[10:]
        yield f"bext.{name}", _text(field)


def _song_meter(content: bytes) -> Iterator[tuple[str, str]]:
    for number, value in _records(content, "<HI"):
        if number in _SONG_METER:
            yield f"wamd.{_SONG_METER[number]}", _text(value)


_CHUNKS = {b"LIST": _info, b"guan": _guano, b"bext": _bext, b"wamd": _song_meter}


def _records(content: bytes, form: str, align: int = 1) -> Iterator[tuple[bytes | int, bytes]]:
    at, length = 0, struct.calcsize(form)
    while at + length <= len(content):
        name, size = struct.unpack_from(form, content, at)
        at += length
        yield name, content[at : at + size]
        at += size + size % align


def _vorbis_comments(clip: int) -> Iterator[tuple[str, str]]:
    at = 4
    for _ in range(MAX_BLOCKS):
        head = os.pread(clip, 4, at)
        if len(head) < 4 or head[0] & 0x7F == VORBIS_COMMENTS:
            break
        at += 4 + int.from_bytes(head[1:], "big")
    content = os.pread(clip, MAX_CHUNK, at + 4)
    # The maker's name and the number of comments come before them.
    vendor = int.from_bytes(content[:4], "little")
    for comment in _strings(content[8 + vendor :]):
        name, _, value = comment.partition("=")
        yield name, value


def _strings(content: bytes) -> Iterable[str]:
    at = 0
    while at + 4 <= len(content):
        size = int.from_bytes(content[at : at + 4], "little")
        if size > len(content) - at - 4:
            break
        yield _text(content[at + 4 : at + 4 + size])
        at += 4 + size


def _text(content: bytes | int) -> str:
    return bytes(content).split(b"\0")[0].decode("utf-8", "replace")
