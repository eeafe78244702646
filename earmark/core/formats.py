"""A file's format by its first bytes, never by its name, and whether the file was cut short."""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass

from earmark.core import errors

HEAD_BYTES = 4096
#: More chunks than any writer makes. A file of empty chunks must not keep us counting.
MAX_CHUNKS = 10_000
LAST_PAGE = 4
_ANY_CASE = re.DOTALL | re.IGNORECASE
UNKNOWN_SIZES = (0, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Format:
    """A container format, and the readers for it."""

    name: str
    #: FFmpeg's name for it; the only reader FFmpeg may use on such a file.
    demuxer: str
    ffmpeg_first: bool = False


#: A file of unknown beginning may be an MP3 that starts with rubbish.
UNKNOWN = Format("unknown", "mp3")
_MP3 = Format("mp3", "mp3")
_OGG_NOT_VORBIS = rb"OggS.{24,512}(OpusHead|Speex   |\x80theora|fishead)"
_FORMATS = [
    (rb"(RIFF|RF64|BW64)....WAVE", Format("wav", "wav")),
    (rb"RIFX....WAVE", Format("rifx", "wav")),
    (rb"fLaC", Format("flac", "flac")),
    # libsndfile takes 2.4 times as long for Opus, and reads neither Speex nor video.
    (_OGG_NOT_VORBIS, Format("ogg", "ogg", ffmpeg_first=True)),
    (rb"OggS", Format("ogg", "ogg")),
    (rb"\xff[\xf0\xf1\xf8\xf9]", Format("aac", "aac", ffmpeg_first=True)),
    (rb"\xff[\xe2-\xff]", _MP3),
    (rb"FORM....AIF[FC]", Format("aiff", "aiff")),
    (rb"caff\x00\x01", Format("caf", "caf")),
    (rb"riff\x2e\x91\xcf\x11", Format("w64", "w64")),
    (rb"\.snd|dns\.", Format("au", "au")),
    (rb"....(ftyp|moov|mdat|wide|free|skip|pnot)", Format("mp4", "mov", ffmpeg_first=True)),
    (rb"\x1a\x45\xdf\xa3", Format("matroska", "matroska", ffmpeg_first=True)),
    (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", Format("asf", "asf", ffmpeg_first=True)),
    (rb"#!AMR", Format("amr", "amr", ffmpeg_first=True)),
    (rb"RIFF....AVI ", Format("avi", "avi", ffmpeg_first=True)),
    (rb"FLV\x01", Format("flv", "flv", ffmpeg_first=True)),
    (rb"\x00\x00\x01\xba", Format("mpeg", "mpeg", ffmpeg_first=True)),
    (rb"\x47.{187}\x47", Format("mpegts", "mpegts", ffmpeg_first=True)),
    (rb"\x0b\x77", Format("ac3", "ac3", ffmpeg_first=True)),
    (rb"wvpk", Format("wavpack", "wv", ffmpeg_first=True)),
    (rb"MAC ", Format("ape", "ape", ffmpeg_first=True)),
    (rb"TTA1", Format("tta", "tta", ffmpeg_first=True)),
]
_NOT_AUDIO = [
    (rb"\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body)", "an HTML page"),
    (rb"\s*<[?!a-z]", "an XML document"),
    (rb"\s*(\{\s*[\"}]|\[\s*[\"{\[\]])", "JSON text"),
    (rb"#EXTM3U|\[playlist\]|ffconcat|https?://", "a playlist"),
    (rb"v=0\r?\no=", "a session description (SDP)"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (rb"%PDF", "a PDF document"),
    (rb"PK[\x03\x05]", "a ZIP archive"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "a compressed archive"),
    (rb"\x7fELF|MZ.{60}|\xca\xfe\xba\xbe|\xcf\xfa\xed\xfe", "a program"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM.{4}\0{4}|II\*\0|MM\0\*", "an image"),
    (rb"MThd|RIFF....RMID", "a MIDI file, which holds notes and no sound"),
]


def recognise(clip: int) -> Format:
    """Return the format of an open file, given by its descriptor.

    Raises:
        NotAudio: the file is clearly something else.
    """
    start = after_id3(clip)
    head = os.pread(clip, HEAD_BYTES, start)
    if not head:
        raise errors.NotAudio(kind="an empty file")
    for pattern, kind in _NOT_AUDIO:
        if re.match(pattern, head, _ANY_CASE):
            raise errors.NotAudio(kind=kind)
    for pattern, known in _FORMATS:
        if re.match(pattern, head, re.DOTALL):
            return known
    return _MP3 if start else UNKNOWN


def describe(clip: int) -> str:
    """Return what a file looks like that no decoder knows."""
    head = os.pread(clip, HEAD_BYTES, 0)
    if not head.strip(b"\0"):
        return "nothing but zeros"
    return "text" if re.fullmatch(rb"[\t\r\n\x20-\x7e\x80-\xff]+", head) else "unknown data"


def after_id3(clip: int) -> int:
    """Return where the audio begins, behind any ID3 tags."""
    start = 0
    for _ in range(MAX_CHUNKS):
        tag = os.pread(clip, 10, start)
        if len(tag) < 10 or tag[:3] != b"ID3":
            break
        size = 0
        for byte in tag[6:]:
            size = size << 7 | byte & 0x7F
        start += 10 + size
    return start


# truncation ---------------------------------------------------------------------------------------


def is_cut_short(clip: int, name: str) -> bool:
    """Return whether the file ends before the audio that its own structure declares."""
    size = os.fstat(clip).st_size
    if name == "ogg":
        return not _ogg_ends(clip, size)
    return name in _LAYOUTS and _LAYOUTS[name].audio_end(clip) > size


def counts_mp3_frames(clip: int) -> bool:
    """Return whether an MP3 begins with a Xing, Info or LAME header, which counts its frames."""
    head = os.pread(clip, 256, after_id3(clip))
    return re.match(rb"\xff[\xe2-\xff].{2,220}?(Xing|Info)", head, re.DOTALL) is not None


@dataclass(frozen=True, slots=True)
class _Layout:
    """The layout of a container of named, sized chunks."""

    header: str
    first: int
    audio: bytes
    align: int = 2
    size_includes: int = 0

    def audio_end(self, clip: int) -> int:
        """Return where the audio chunk should end; 0 if there is none, or of unknown size."""
        at = self.first
        for _ in range(MAX_CHUNKS):
            head = os.pread(clip, struct.calcsize(self.header), at)
            if len(head) < struct.calcsize(self.header):
                break
            name, size = struct.unpack(self.header, head)
            content = at + len(head) - self.size_includes
            if name.startswith(self.audio):
                return _end(clip, content, size)
            at = content + size + -size % self.align
            if at < content:
                break
        return 0


def _end(clip: int, content: int, size: int) -> int:
    if size == 0xFFFFFFFF and os.pread(clip, 4, 0) in (b"RF64", b"BW64"):
        (size,) = struct.unpack("<Q", os.pread(clip, 8, 28))
    if size < 0 or size in UNKNOWN_SIZES:
        return 0
    return content + size


_LAYOUTS = {
    "wav": _Layout("<4sI", 12, b"data"),
    "rifx": _Layout(">4sI", 12, b"data"),
    "aiff": _Layout(">4sI", 12, b"SSND"),
    "caf": _Layout(">4sq", 8, b"data", align=1),
    "w64": _Layout("<16sQ", 40, b"data", align=8, size_includes=24),
}


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
