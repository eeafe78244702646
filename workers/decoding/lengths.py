"""How much sound a file holds: by its own header, and by what lies behind the last sample."""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from earmark.core.formats import MAX_CHUNKS, after_id3

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LAST_PAGE = 4
#: A tag at the end of a file, such as ID3v1, is not longer. Nor is sound that anybody would miss.
TAG_BYTES = 128
SEARCH_BYTES = 2**20
#: Writers to a pipe cannot go back to fill in a size. They leave one of these (sox's, arecord's,
#: FFmpeg's), or that less the bytes of a header.
PIPE_SIZES = (0x7FFFF000, 2**31, 2**32)
MAX_HEADER = 128
#: No file is larger; W64 and CAF have 64 bits for a size.
MAX_SIZE = 2**62


@dataclass(frozen=True, slots=True)
class Length:
    """The length of the audio as a file declares it, and where."""

    #: Where the bytes of the audio begin.
    content: int
    size: int
    #: Where the size is written, and how.
    at: int
    form: str
    #: The bytes of a header that the written size includes.
    included: int = 0

    @property
    def end(self) -> int:
        return self.content + self.size

    @property
    def is_from_pipe(self) -> bool:
        """Whether the size only fills the place of one that its writer did not know."""
        near = any(size - MAX_HEADER <= self.size <= size for size in PIPE_SIZES)
        return near or not 0 <= self.size < MAX_SIZE

    def corrected(self, file_size: int) -> tuple[int, bytes]:
        """Return where to write which bytes, so that the audio ends with the file."""
        size = file_size - self.content + self.included
        return self.at, struct.pack(self.form, min(size, 2 ** (8 * struct.calcsize(self.form)) - 1))


def declared_length(clip: int, name: str, chunks: Iterable[Chunk]) -> Length | None:
    """Return the length that a file of this format declares in bytes; None if it does not."""
    if name == "au":
        return _au_length(clip)
    for chunk in chunks:
        if chunk.name.startswith(_LAYOUTS[name].audio):
            return _LAYOUTS[name].length(clip, chunk)
    return None


def is_unfinished(clip: int, name: str, length: Length | None) -> bool:
    """Return whether the audio's size is still 0 with sound behind it: its recorder lost power."""
    return length is not None and not length.size and sound_behind(clip, name, length.content)


def is_cut_short(clip: int, name: str, length: Length | None) -> bool:
    """Return whether the file ends before the audio that its own structure declares."""
    size = os.fstat(clip).st_size
    if name == "ogg":
        return not _ogg_ends(clip, size)
    if name == "asf":
        return _asf_bytes(clip) > size
    if length is None:
        return False
    cut = length.end > size and not length.is_from_pipe
    return cut or is_unfinished(clip, name, length)


def sound_behind(clip: int, name: str, end: int) -> bool:
    """Return whether bytes that can be sound lie behind `end`, where a reader stopped."""
    if os.fstat(clip).st_size - end <= TAG_BYTES:
        return False
    if name in _LAYOUTS:
        return _more_than_chunks(clip, name, end)
    if name in ("au", "unknown"):
        return not is_padding(clip, end)
    return name in _MORE and find(clip, _MORE[name], end) is not None


def ogg_streams(clip: int) -> list[int]:
    """Return where the streams of an Ogg file begin that follow each other, as on the radio."""
    starts = []
    start: int | None = 0
    while start is not None:
        starts.append(start)
        sound = find(clip, _SOUND_PAGE, start)
        start = None if sound is None else find(clip, _FIRST_PAGE, sound)
    return starts


def is_padding(clip: int, start: int) -> bool:
    """Return whether only zeros, a tag or a web page follow."""
    tail = os.pread(clip, SEARCH_BYTES, start)
    return not tail.strip(b"\0") or re.match(_TAGS, tail) is not None


def ends_in_padding(clip: int) -> bool:
    """Return whether a file ends with zeros or a tag."""
    return is_padding(clip, max(0, os.fstat(clip).st_size - TAG_BYTES))


def find(clip: int, pattern: bytes, start: int) -> int | None:
    """Return where a pattern of at most MAX_HEADER bytes is found first, from `start` on."""
    while block := os.pread(clip, SEARCH_BYTES, start):
        if found := re.search(pattern, block, re.DOTALL):
            return start + found.start()
        start += max(len(block) - MAX_HEADER, 1) if len(block) == SEARCH_BYTES else len(block)
    return None


def mp3_frames(clip: int) -> int:
    """Return how many frames the Xing, Info or LAME header of an MP3 counts; 0 without one."""
    head = os.pread(clip, 256, after_id3(clip))
    found = re.match(rb"\xff[\xe2-\xff].{2,220}?(?:Xing|Info)(.{4})(.{4})", head, re.DOTALL)
    if not found or not found[1][3] & 1:
        return 0
    return int.from_bytes(found[2], "big")


FLAC = rb"fLaC\0\0\0\x22"
_FIRST_PAGE, _SOUND_PAGE = rb"OggS\0[\2\6]", rb"OggS\0[\0\1\4\5]"
#: The beginning of another file of the format, or a frame, where only one reader of two stops.
_MORE = {
    "mp3": rb"\xff[\xe2-\xef\xf2-\xf7\xfa-\xff][\x10-\xef]",
    "flac": rb"\xff[\xf8\xf9]",
    "mp4": rb"\0\0\0[\x08-\xff]ftyp",
    "matroska": rb"\x1a\x45\xdf\xa3.{1,8}\x42\x86\x81",
    "asf": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
    "avi": rb"RIFF....AVI ",
    "flv": rb"FLV\x01[\1\4\5]\0\0\0\x09",
    "wavpack": rb"wvpk",
    "ape": rb"MAC [\x00-\xff]\x0f",
    "tta": rb"TTA1[\1\2]\0",
    "voc": rb"Creative Voice File\x1a",
}
_TAGS = rb"TAG|ID3|APETAGEX|LYRICSBEGIN|\s*<(?i:!doctype|html|\?xml)"
_CHUNK_NAME = re.compile(rb"[\x20-\x7e]{4}")
_OTHER_FILE = re.compile(rb"RIFF|RF64|BW64|FORM|caff|riff\x2e\x91")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A named part of a file: where its header and its content begin, and its content's size."""

    name: bytes
    at: int
    content: int
    size: int

    @property
    def end(self) -> int:
        return self.content + self.size


def chunks(clip: int, name: str) -> list[Chunk]:
    """Return the chunks of a file of this format, none if it has no such parts."""
    if name not in _LAYOUTS:
        return []
    return list(_LAYOUTS[name].chunks(clip, _LAYOUTS[name].first))


def _more_than_chunks(clip: int, name: str, start: int) -> bool:
    """Return whether something else than whole chunks, a tag or zeros lies here."""
    size = os.fstat(clip).st_size
    start += os.pread(clip, 1, start) == b"\0"
    for chunk in _LAYOUTS[name].chunks(clip, start):
        if is_padding(clip, chunk.at):
            return False
        strange = not _CHUNK_NAME.match(chunk.name) or _OTHER_FILE.match(chunk.name)
        if strange or chunk.end > size:
            return True
    return False


@dataclass(frozen=True, slots=True)
class _Layout:
    """The layout of a container of named, sized chunks."""

    header: str
    first: int
    audio: bytes
    align: int = 2
    size_includes: int = 0

    def chunks(self, clip: int, at: int) -> Iterator[Chunk]:
        length = struct.calcsize(self.header)
        for _ in range(MAX_CHUNKS):
            head = os.pread(clip, length, at)
            if len(head) < length:
                break
            name, size = struct.unpack(self.header, head)
            chunk = Chunk(name, at, at + length, size - self.size_includes)
            yield chunk
            at = chunk.end + -chunk.size % self.align
            if not chunk.at < at < MAX_SIZE:
                break
            # Some recorders leave out the byte of padding.
            if at > chunk.end and self.align == 2 and os.pread(clip, 1, chunk.end) > b"\x20":
                at = chunk.end

    def length(self, clip: int, chunk: Chunk) -> Length:
        """Return the length that the chunk of the audio declares."""
        if chunk.size == 0xFFFFFFFF and os.pread(clip, 4, 0) in (b"RF64", b"BW64"):
            (size,) = struct.unpack("<Q", os.pread(clip, 8, 28))
            return Length(chunk.content, size, 28, "<Q")
        form = self.header[0] + self.header[-1]
        size = chunk.size
        if size == -self.size_includes:  # written as 0
            size = 0
        return Length(
            chunk.content, size, chunk.content - struct.calcsize(form), form, self.size_includes
        )


_LAYOUTS = {
    "wav": _Layout("<4sI", 12, b"data"),
    "rifx": _Layout(">4sI", 12, b"data"),
    "aiff": _Layout(">4sI", 12, b"SSND"),
    "caf": _Layout(">4sq", 8, b"data", align=1),
    "w64": _Layout("<16sQ", 40, b"data", align=8, size_includes=24),
}


def _au_length(clip: int) -> Length | None:
    head = os.pread(clip, 12, 0)
    if len(head) < 12:
        return None
    order = ">" if head[:4] == b".snd" else "<"
    content, size = struct.unpack(f"{order}4x2I", head)
    return Length(content, size, 8, f"{order}I")


def _asf_bytes(clip: int) -> int:
    """Return the size of an ASF file as its file properties tell it; 0 if they do not."""
    at = find(clip, rb"\xa1\xdc\xab\x8c\x47\xa9\xcf\x11\x8e\xe4", 0)
    return 0 if at is None else int.from_bytes(os.pread(clip, 8, at + 40), "little")


def _ogg_ends(clip: int, size: int) -> bool:
    """Return whether the last page of an Ogg file is whole and marked as the last."""
    start = max(0, size - 2 * 65536)  # a page is at most 65,307 bytes
    tail = os.pread(clip, size - start, start)
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27:
        return False
    segments = page[26]
    end = 27 + segments + sum(page[27 : 27 + segments])
    return end <= len(page) and bool(page[5] & LAST_PAGE)
