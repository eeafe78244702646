"""A file's format by its first bytes, never by its name."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from earmark.core import errors

HEAD_BYTES = 4096
#: More chunks than any writer makes. A file of empty chunks must not keep us counting.
MAX_CHUNKS = 10_000
_ANY_CASE = re.DOTALL | re.IGNORECASE


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
    # libsndfile reads the headers of its blocks as sound.
    (rb"Creative Voice File\x1a", Format("voc", "voc", ffmpeg_first=True)),
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
# Every clip is looked at, and compiling, even from the cache, takes longer than matching.
_COMPILED = [(re.compile(pattern, re.DOTALL), known) for pattern, known in _FORMATS]
_ANY_NOT_AUDIO = re.compile(b"|".join(b"(?:%b)" % pattern for pattern, _ in _NOT_AUDIO), _ANY_CASE)


def recognise(clip: int) -> Format:
    """Return the format of an open file, given by its descriptor.

    Raises:
        NotAudio: the file is clearly something else.
    """
    start = after_id3(clip)
    head = os.pread(clip, HEAD_BYTES, start)
    if not head:
        raise errors.NotAudio(kind="an empty file")
    if _ANY_NOT_AUDIO.match(head):
        for pattern, kind in _NOT_AUDIO:
            if re.match(pattern, head, _ANY_CASE):
                raise errors.NotAudio(kind=kind)
    for compiled, known in _COMPILED:
        if compiled.match(head):
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
