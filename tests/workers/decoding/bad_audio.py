"""Two thousand files nobody should have to decode, made the same way each time from a seed.

`python -m tests.workers.decoding.bad_audio --seed 7` decodes them all and prints the outcomes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import random
import socket
import struct
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import av
import numpy as np
import psutil
import soundfile

from earmark.core import errors, settings
from workers.decoding import pool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.audio.frame import AudioFrame

#: Where playlists and references point: a server that must never hear from us.
CANARY = "http://127.0.0.1:{port}/secret"
LIMITS = settings.Audio(max_duration_s=3600, max_samples=700_000_000, decode_timeout_s=20)
#: Errors that mean a decoder had to be killed or died.
DEATHS = {"decoder_crashed", "decoder_timeout", "decoder_memory"}
#: No header says what they are, or half of them is another file: refused on purpose.
HEADERLESS = {"RAW", "SD2"}


@dataclass(frozen=True, slots=True)
class Case:
    """One file, and what is known about it."""

    name: str
    content: bytes
    #: It is whole and true: it has to decode.
    valid: bool = False
    #: It has lost its end.
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one file."""

    case: Case
    #: `ok`, `truncated` or the code of the error.
    outcome: str
    seconds: float


def cases(seed: int = 0, canary_port: int = 9, bomb_s: int = 7200) -> list[Case]:
    """Return all files; the seed decides which bits are flipped and which bytes are splattered."""
    rng = random.Random(seed)
    families = [
        valid_pairs(),
        through_ffmpeg(),
        truncations(),
        damage(rng),
        header_lies(),
        not_finite(),
        not_audio(rng),
        disguises(),
        references(canary_port),
        bombs(bomb_s),
    ]
    return list(itertools.chain.from_iterable(families))


# whole files --------------------------------------------------------------------------------------


@cache
def tone(sample_rate: int, seconds: float = 1.0, channels: int = 1) -> np.ndarray:
    time_s = np.arange(int(sample_rate * seconds)) / sample_rate
    noise = np.random.default_rng(0).standard_normal(len(time_s))
    mono = 0.4 * np.sin(2 * np.pi * 440 * time_s) + 0.05 * noise
    return np.repeat(mono[:, None], channels, axis=1).astype(np.float32)


@cache
def written(
    container: str, subtype: str, sample_rate: int = 16000, channels: int = 1, seconds: float = 1.0
) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        samples = tone(sample_rate, seconds, channels)
        soundfile.write(file.name, samples, sample_rate, format=container, subtype=subtype)
        return file.read()


def valid_pairs() -> Iterator[Case]:
    for container in sorted(set(soundfile.available_formats()) - HEADERLESS):
        for subtype, channels in itertools.product(soundfile.available_subtypes(container), (1, 2)):
            rate = 8000 if container in {"WVE", "SDS"} or "NMS" in subtype else 16000
            with contextlib.suppress(soundfile.LibsndfileError):
                content = written(container, subtype, rate, channels)
                yield Case(f"valid/{container}-{subtype}-{channels}", content, valid=True)


FFMPEG_PAIRS = [
    ("m4a", "mp4", "aac", 44100, "fltp"),
    ("alac", "mp4", "alac", 44100, "s16p"),
    ("adts", "adts", "aac", 44100, "fltp"),
    ("webm", "webm", "libopus", 48000, "flt"),
    ("mka", "matroska", "flac", 44100, "s16"),
    ("opus", "ogg", "libopus", 48000, "flt"),
    ("oga-flac", "ogg", "flac", 44100, "s16"),
    ("wma", "asf", "wmav2", 44100, "fltp"),
    ("amr", "amr", "libopencore_amrnb", 8000, "s16"),
    ("3gp", "3gp", "libopencore_amrnb", 8000, "s16"),
    ("ac3", "ac3", "ac3", 48000, "fltp"),
    ("flac32", "flac", "flac", 44100, "s32"),
    ("mp2", "mp2", "mp2", 44100, "s16"),
    ("ts", "mpegts", "mp2", 44100, "s16"),
    ("avi", "avi", "pcm_s16le", 44100, "s16"),
    ("flv", "flv", "aac", 44100, "fltp"),
    ("wv", "wv", "wavpack", 44100, "fltp"),
    ("tta", "tta", "tta", 44100, "s16"),
    ("caf-alac", "caf", "alac", 44100, "s16p"),
    ("wav-adpcm", "wav", "adpcm_ms", 44100, "s16"),
]


@cache
def encoded(
    container: str, codec: str, sample_rate: int, sample_format: str, with_picture: bool = False
) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        picture = output.add_stream("mpeg4", rate=5) if with_picture else None
        sound = output.add_stream(codec, rate=sample_rate, options={"strict": "experimental"})
        sound.layout, sound.format, sound.bit_rate = "mono", sample_format, 64000
        if picture:
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuv420p"
            for _ in range(5):
                output.mux(picture.encode(av.VideoFrame(64, 64, "yuv420p")))
        sound.codec_context.open(strict=False)
        for frame in _frames(sample_rate, sample_format, sound.codec_context.frame_size or 1024):
            output.mux(sound.encode(frame))
        for stream in filter(None, (picture, sound)):
            output.mux(stream.encode(None))
    return file.getvalue()


def _frames(sample_rate: int, sample_format: str, frame_size: int) -> Iterator[AudioFrame]:
    whole = av.AudioFrame.from_ndarray(tone(sample_rate).T.copy(), format="fltp", layout="mono")
    whole.sample_rate = sample_rate
    queue = av.AudioFifo()
    for frame in av.AudioResampler(format=sample_format, layout="mono", rate=sample_rate).resample(
        whole
    ):
        queue.write(frame)
    while frame := queue.read(frame_size):
        yield frame
    if frame := queue.read(0):
        yield frame


def through_ffmpeg() -> Iterator[Case]:
    for name, *arguments in FFMPEG_PAIRS:
        yield Case(f"valid/{name}", encoded(*arguments), valid=True)
    yield Case(
        "valid/video.mp4", encoded("mp4", "aac", 44100, "fltp", with_picture=True), valid=True
    )
    yield Case(
        "valid/video.mkv",
        encoded("matroska", "libopus", 48000, "flt", with_picture=True),
        valid=True,
    )
    for rate in (100, 8000, 11025, 22050, 44101, 96000, 384000, 500_000, 1_000_000):
        yield Case(f"valid/wav-{rate}", written("WAV", "PCM_16", rate), valid=True)
    for channels in (3, 6, 8, 32):
        yield Case(
            f"valid/wav-{channels}-channels", written("WAV", "PCM_16", 16000, channels), valid=True
        )


# files that lost or changed something -------------------------------------------------------------


def breakable() -> dict[str, bytes]:
    """One file of each of the formats people have."""
    pairs = {
        "wav": "PCM_16",
        "flac": "PCM_16",
        "aiff": "PCM_16",
        "ogg": "VORBIS",
        "mp3": "MPEG_LAYER_III",
    }
    pairs |= {"rf64": "PCM_16", "w64": "PCM_16", "caf": "PCM_16"}
    whole = {
        name: written(name.upper(), subtype, 22050, seconds=1.5) for name, subtype in pairs.items()
    }
    names = {"m4a", "adts", "webm", "opus", "wma", "amr"}
    return whole | {name: encoded(*arguments) for name, *arguments in FFMPEG_PAIRS if name in names}


def truncations() -> Iterator[Case]:
    for name, whole in breakable().items():
        for part in range(64):
            yield Case(f"truncated/{name}-{part}", whole[: len(whole) * part // 64], truncated=True)


def damage(rng: random.Random) -> Iterator[Case]:
    for name, whole in breakable().items():
        for number in range(50):
            content = bytearray(whole)
            for _ in range(1 + number % 8):
                # half of the flips into the header, where they do most
                at = rng.randrange(len(content) if number % 2 else min(len(content), 512))
                content[at] ^= 1 << rng.randrange(8)
            yield Case(f"flipped/{name}-{number}", bytes(content))
        for number in range(10):
            content = bytearray(whole)
            at, length = rng.randrange(len(content)), rng.randrange(1, 4096)
            content[at : at + length] = rng.randbytes(length)
            yield Case(f"splattered/{name}-{number}", bytes(content))


# headers that lie ---------------------------------------------------------------------------------


def wav(
    data: bytes = bytes(range(256)) * 128,
    *,
    code: int = 1,
    channels: int = 1,
    rate: int = 16000,
    bits: int = 16,
    align: int | None = None,
    data_size: int | None = None,
    before: bytes = b"",
) -> bytes:
    align = channels * bits // 8 if align is None else align
    form = struct.pack("<HHIIHH", code, channels, rate, rate * align % 2**32, align % 2**16, bits)
    size = len(data) if data_size is None else data_size
    body = (
        b"WAVE"
        + before
        + b"fmt "
        + struct.pack("<I", len(form))
        + form
        + b"data"
        + struct.pack("<I", size)
        + data
    )
    return b"RIFF" + struct.pack("<I", len(body) % 2**32) + body


def header_lies() -> Iterator[Case]:
    for channels in (0, 33, 255, 1024, 65535):
        yield Case(f"lie/channels-{channels}", wav(channels=channels))
    for rate in (0, 1, 7, 99, 1_000_001, 2**31, 2**32 - 1):
        yield Case(f"lie/rate-{rate}", wav(rate=rate))
    for bits in (0, 1, 12, 64, 65535):
        yield Case(f"lie/bits-{bits}", wav(bits=bits))
    for align in (0, 1, 3, 65535):
        yield Case(f"lie/align-{align}", wav(align=align))
    for size in (0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1):
        yield Case(f"lie/data-size-{size}", wav(data_size=size))
        chunk = b"LIST" + struct.pack("<I", size)
        yield Case(f"lie/chunk-size-{size}", wav(before=chunk))
        yield Case(f"lie/riff-size-{size}", wav()[:4] + struct.pack("<I", size) + wav()[8:])
    for code in (0, 2, 3, 6, 7, 0x11, 0x31, 0x50, 0x55, 0x161, 0xFFFE, 0xFFFF):
        yield Case(f"lie/codec-{code}", wav(code=code))
    yield Case("lie/empty-chunks", wav(before=(b"junk" + bytes(4)) * 200_000))
    yield Case("lie/odd-data", wav(b"x" * 33333))
    yield Case("lie/no-data", wav(b""))
    yield Case("lie/short", wav(bytes(100)))
    yield from _lies_in_other_headers()


def _lies_in_other_headers() -> Iterator[Case]:
    rf64, aiff, caf, w64 = (written(name, "PCM_16") for name in ("RF64", "AIFF", "CAF", "W64"))
    flac, au = written("FLAC", "PCM_16"), written("AU", "PCM_16")
    for size in (0, 2**32, 2**62, 2**63, 2**64 - 1):
        packed = struct.pack("<Q", size)
        yield Case(f"lie/rf64-data-{size}", rf64[:28] + packed + rf64[36:])
        yield Case(f"lie/rf64-frames-{size}", rf64[:36] + packed + rf64[44:])
        yield Case(f"lie/w64-riff-{size}", w64[:16] + packed + w64[24:])
        at = caf.index(b"data") + 4
        yield Case(f"lie/caf-data-{size}", caf[:at] + struct.pack(">Q", size) + caf[at + 8 :])
    for name, rate in (
        ("zero", 0.0),
        ("one", 1.0),
        ("negative", -44100.0),
        ("nan", np.nan),
        ("huge", 1e300),
    ):
        yield Case(f"lie/caf-rate-{name}", caf[:20] + struct.pack(">d", rate) + caf[28:])
    at = aiff.index(b"COMM") + 16
    for rate_80 in (bytes(10), b"\xff" * 10, b"\x7f\xff" + bytes(8), b"\x3f\xff\x80" + bytes(7)):
        yield Case(f"lie/aiff-rate-{rate_80.hex()}", aiff[:at] + rate_80 + aiff[at + 10 :])
    for total in (0, 1, 2**36 - 1):
        yield Case(f"lie/flac-total-{total}", with_total(flac, total))
    for rate in (0, 1, 2**20 - 1):
        field = (int.from_bytes(flac[18:26], "big") & (2**44 - 1)) | rate << 44
        yield Case(f"lie/flac-rate-{rate}", flac[:18] + field.to_bytes(8, "big") + flac[26:])
    yield Case("lie/flac-picture", flac[:4] + b"\x06\xff\xff\xff" + flac[4:])
    for table, offset in itertools.product((b"stts", b"stsz", b"stsc", b"stco"), (8, 12, 16)):
        for value in (2**24, 2**30 - 1, 2**31 - 1):
            yield Case(
                f"lie/m4a-{table.decode()}-{offset}-{value}", with_entry(table, offset, value)
            )
    for offset, value in itertools.product((4, 8, 12, 16, 20), (0, 1, 2**31, 2**32 - 1)):
        yield Case(
            f"lie/au-{offset}-{value}", au[:offset] + struct.pack(">I", value) + au[offset + 4 :]
        )


def with_total(flac: bytes, total: int) -> bytes:
    field = (int.from_bytes(flac[18:26], "big") >> 36 << 36) | total
    return flac[:18] + field.to_bytes(8, "big") + flac[26:]


def with_entry(table: bytes, offset: int, value: int) -> bytes:
    """Make an M4A in one of whose tables this is counted or measured."""
    whole = encoded("mp4", "aac", 44100, "fltp")
    at = whole.index(table) + offset
    return whole[:at] + struct.pack(">I", value) + whole[at + 4 :]


def not_finite() -> Iterator[Case]:
    values = {
        "nan": np.nan,
        "inf": np.inf,
        "minus-inf": -np.inf,
        "huge": 1.7e308,
        "loud": 1e6,
        "denormal": 5e-324,
    }
    for (name, value), kind, count in itertools.product(values.items(), ("f4", "f8"), (1, 16000)):
        with np.errstate(over="ignore"):
            samples = np.zeros(16000, np.float64)
            samples[:count] = value
            data = samples.astype(kind).tobytes()
        yield Case(
            f"float/{name}-{kind}-{count}", wav(data, code=3, bits=8 * np.dtype(kind).itemsize)
        )


# what is no audio, or does not look it ------------------------------------------------------------

NOT_AUDIO = {
    "html": b"<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>"
    * 20,
    "html-comment": b"\n <!-- a proxy says --> <html><body>Log in</body></html>",
    "json": json.dumps({"error": {"code": 403, "message": "quota"}}).encode(),
    "json-list": b'[{"id": 1}]',
    "s3": b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code></Error>',
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "text": b"the quick brown fox\n" * 500,
    "csv": b"url,label\nhttp://example.org/a.wav,dog\n" * 99,
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "pdf": b"%PDF-1.7\n" + bytes(500),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(500),
    "jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(500),
    "elf": b"\x7fELF\x02\x01\x01" + bytes(500),
    "midi": b"MThd\0\0\0\x06\0\0\0\x01\0\x60MTrk\0\0\0\x04\0\xff\x2f\0",
    "empty": b"",
    "one-byte": b"R",
    "zeros": bytes(100_000),
    "gzip": zlib.compress(bytes(10**7), wbits=31),
    "id3-only": b"ID3\x04\0\0\0\0\0\0",
    "id3-loop": b"ID3\x04\0\0\0\0\0\0" * 20_000,
    "id3-huge": b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + bytes(5000),
    "sync-bytes": b"\xff\xfb\x90\xc4" * 20_000,
}


def not_audio(rng: random.Random) -> Iterator[Case]:
    for name, content in NOT_AUDIO.items():
        yield Case(f"not-audio/{name}", content)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.wav", bytes(50_000_000))
    yield Case("not-audio/zip-bomb", bomb.getvalue())
    for number in range(30):
        yield Case(f"not-audio/random-{number}", rng.randbytes(rng.randrange(1, 100_000)))


def disguises() -> Iterator[Case]:
    """Files of two kinds at once, and sound formats that need the sound of another."""
    ogg, mp3, flac = (
        written("OGG", "VORBIS"),
        written("MP3", "MPEG_LAYER_III"),
        written("FLAC", "PCM_16"),
    )
    other = written("MP3", "MPEG_LAYER_III", 44100)
    tag = b"ID3\x04\0\0\0\0\x01\0" + bytes(128)
    yield Case("valid/mp3-tagged", tag + mp3, valid=True)
    yield Case("valid/mp3-rubbish-first", b"rubbish\0" * 20 + mp3, valid=True)
    yield Case("valid/flac-tagged", tag + flac, valid=True)
    yield Case("valid/adts-tagged", tag + encoded("adts", "aac", 44100, "fltp"), valid=True)
    yield Case("valid/wav-zip", wav() + b"PK\x03\x04" + bytes(100), valid=True)
    yield Case("valid/wav-html", wav() + NOT_AUDIO["html"], valid=True)
    yield Case("disguise/html-wav", NOT_AUDIO["html"] + wav())
    yield Case("disguise/ogg-chained", ogg + ogg)
    yield Case("disguise/ogg-chained-rates", ogg + written("OGG", "VORBIS", 44100))
    yield Case("disguise/mp3-mixed-rates", mp3 + other)
    yield Case("disguise/riff-webp", b"RIFF\x00\x10\0\0WEBPVP8 " + bytes(4096))
    yield Case("disguise/wav-of-mp3", wav(mp3, code=0x55))
    yield Case("disguise/video-only", _without_sound())


def _without_sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(5):
            output.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        output.mux(stream.encode(None))
    return file.getvalue()


def references(canary_port: int) -> Iterator[Case]:
    """Files that ask to be completed from elsewhere."""
    url = CANARY.format(port=canary_port)
    texts = {
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{url}.ts\n#EXT-X-ENDLIST\n",
        "m3u8-file": "#EXTM3U\n#EXTINF:5,\nfile:///etc/passwd\n",
        "m3u": f"{url}.mp3\n",
        "pls": f"[playlist]\nFile1={url}.mp3\n",
        "xspf": '<?xml version="1.0"?><playlist><track>'
        f"<location>{url}</location></track></playlist>",
        "asx": f'<asx version="3.0"><entry><ref href="{url}"/></entry></asx>',
        "dash": f'<?xml version="1.0"?><MPD><Period><BaseURL>{url}</BaseURL></Period></MPD>',
        "concat": f"ffconcat version 1.0\nfile {url}.wav\n",
        "concat-file": "ffconcat version 1.0\nfile /etc/passwd\n",
        "sdp": "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
        f"m=audio {canary_port} RTP/AVP 0\r\n",
        "rtsp-text": f"RTSPtext\nrtsp://127.0.0.1:{canary_port}/x\n",
        "smil": f'<smil><body><audio src="{url}"/></body></smil>',
    }
    for name, text in texts.items():
        yield Case(f"reference/{name}", text.encode())
        yield Case(f"reference/{name}-after-zeros", bytes(16) + text.encode())
    yield Case("reference/mov", _mov_with_reference(url.encode()))
    yield Case(
        "reference/mov-redirect",
        _box(b"moov", _box(b"rmra", _box(b"rmda", _box(b"rdrf", b"url " + url.encode())))),
    )


def _box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + name + content


def _mov_with_reference(url: bytes) -> bytes:
    """An MP4 whose track says that its samples lie at a URL."""
    whole = encoded("mp4", "alac", 44100, "s16p")
    own, foreign = _box(b"url ", b"\0\0\0\x01"), _box(b"url ", bytes(4) + url + b"\0")
    at = whole.index(own)
    grown = bytearray(whole[:at] + foreign + whole[at + len(own) :])
    for name in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        box = grown.index(name) - 4
        (size,) = struct.unpack_from(">I", grown, box)
        struct.pack_into(">I", grown, box, size + len(foreign) - len(own))
    return bytes(grown)


# bombs --------------------------------------------------------------------------------------------


@cache
def silence(container: str, subtype: str, sample_rate: int, channels: int, seconds: int) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        with soundfile.SoundFile(
            file.name, "w", sample_rate, channels, subtype, format=container
        ) as sound:
            # Vorbis written in one go overflows libsndfile's stack
            for _ in range(seconds // 20):
                sound.write(np.zeros((20 * sample_rate, channels), np.float32))
        return file.read()


def without_tag(mp3: bytes) -> bytes:
    """Take away the frame that says how many there are."""
    return mp3[mp3.index(mp3[:2], 40) :]


def bombs(seconds: int) -> Iterator[Case]:
    """Far more sound than the limits allow in far fewer bytes."""
    declared = {
        "flac": silence("FLAC", "PCM_16", 8000, 1, seconds),
        "ogg": silence("OGG", "VORBIS", 8000, 1, seconds),
        "opus": silence("OGG", "OPUS", 8000, 1, seconds),
        "mp3": silence("MP3", "MPEG_LAYER_III", 8000, 1, seconds),
        "flac-8-channels": silence("FLAC", "PCM_16", 192_000, 8, seconds // 15),
    }
    undeclared = {
        "flac": with_total(declared["flac"], 0),
        "opus": declared["opus"] + bytes(300_000),  # the last page is not found
        "mp3": without_tag(declared["mp3"]),
        "flac-8-channels": with_total(declared["flac-8-channels"], 0),
    }
    for name, content in declared.items():
        yield Case(f"bomb/{name}", content)
    for name, content in undeclared.items():
        yield Case(f"bomb/{name}-undeclared", content)
    yield Case("bomb/wav-1-hz", wav(rate=1))
    yield Case("bomb/wav-1-khz", wav(bytes(40_000), rate=1000, bits=8))


# what becomes of them -----------------------------------------------------------------------------


class Canary:
    """A server that only counts who calls."""

    def __enter__(self) -> Canary:
        self.hits = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._thread.start()
        return self

    def _count(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._server.accept()[0].close()
                self.hits += 1

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join()


def judge(decoders: pool.Decoders, case: Case) -> Verdict:
    started = time.monotonic()
    with tempfile.TemporaryFile() as file:
        file.write(case.content)
        file.seek(0)
        outcome = outcome_of(decoders, file)
    return Verdict(case, outcome, time.monotonic() - started)


def outcome_of(decoders: pool.Decoders, file: BinaryIO) -> str:
    try:
        decoded = decoders.decode(file, 16000)
    except errors.DecodeError as error:
        return error.code
    assert np.isfinite(decoded.waveform.samples).all()
    return "truncated" if decoded.facts.truncated else "ok"


def peak_mb(pid: int) -> float:
    """Return the most memory that a process has had so far, by Linux's count."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def judge_all(files: list[Case], limits: settings.Audio = LIMITS) -> list[Verdict]:
    decoders = pool.Decoders(limits, 2)
    try:
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(lambda case: judge(decoders, case), files))
    finally:
        decoders.close()


def false_refusals(verdicts: list[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.case.valid and verdict.outcome != "ok"]


def deaths(verdicts: list[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.outcome in DEATHS]


def seen(verdicts: list[Verdict], format_name: str) -> float:
    """Return the share of the files of this format without an end for which that was noticed."""
    cut = [
        v
        for v in verdicts
        if v.case.truncated and v.case.name.startswith(f"truncated/{format_name}-")
    ]
    return sum(verdict.outcome != "ok" for verdict in cut) / len(cut)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    seed = parser.parse_args().seed
    with Canary() as canary:
        files = cases(seed, canary.port)
        started = time.monotonic()
        verdicts = judge_all(files)
        took = time.monotonic() - started
    header = (
        f"seed {seed}: {len(verdicts)} files in {took:.0f} s, {canary.hits} calls to the canary"
    )
    bombs_here = [
        file for file in files if file.name.startswith("bomb/") and sys.platform == "linux"
    ]
    sys.stdout.write("\n".join([header, *_summary(verdicts), *map(defuse, bombs_here)]) + "\n")
    left = psutil.Process().children(recursive=True)
    return bool(deaths(verdicts) or false_refusals(verdicts) or canary.hits or left)


def defuse(bomb: Case) -> str:
    """Say what a bomb costs a decoder that has done nothing else."""
    decoders = pool.Decoders(LIMITS, 1)
    try:
        (child,) = psutil.Process().children()
        verdict = judge(decoders, bomb)
        took = f"{verdict.seconds:.3f} s in {peak_mb(child.pid):.0f} MB"
        return f"{bomb.name}: {verdict.outcome} after {took}"
    finally:
        decoders.close()


def _summary(verdicts: list[Verdict]) -> Iterator[str]:
    for outcome, count in Counter(verdict.outcome for verdict in verdicts).most_common():
        yield f"{count:6} {outcome}"
    for name in breakable():
        yield f"{seen(verdicts, name):6.0%} of the {name} files without an end were noticed"
    for title, found in (
        ("died", deaths(verdicts)),
        ("refused though valid", false_refusals(verdicts)),
    ):
        yield from (f"{title}: {verdict.case.name}: {verdict.outcome}" for verdict in found)
    for verdict in sorted(verdicts, key=lambda verdict: verdict.seconds)[-5:]:
        yield f"slowest: {verdict.case.name}: {verdict.outcome} after {verdict.seconds:.2f} s"


if __name__ == "__main__":
    sys.exit(main())
