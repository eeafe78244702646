"""Files whose header does not tell how much sound they hold, compared with what FFmpeg decodes.

`python -m tests.workers.decoding.odd_lengths` decodes them all beside Debian's `ffmpeg` and prints
what is lost.
"""

from __future__ import annotations

import dataclasses
import io
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import av
import numpy as np
import scipy.signal
import soundfile

from earmark.core import errors, settings
from tests.workers.decoding import bad_audio
from workers.decoding import pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PART_S = 1.6
#: The notes are made at this rate, so that they are the same at every other.
FINE_RATE = 400_000
#: Two decodings of the same sound differ by less.
CLOSE_S, ALIKE = 0.05, 0.999
#: What the coarsest codec leaves of its source.
CODED = 0.9
#: Samples at 16 kHz: what is compared at once, and how far it may lie elsewhere, since decoders
#: begin a few milliseconds sooner or later.
PIECE, MOVE = 800, 2400
#: What a cut leaves of a file.
CUTS = (0.35, 0.7, 0.97)
FFMPEG = ["ffmpeg", "-v", "quiet", "-i", "{file}", "-map", "0:a:0", "-ac", "1", "-ar", "16000"]


@dataclass(frozen=True, slots=True)
class Encoding:
    """A container with a codec, and what writes it."""

    name: str
    container: str
    codec: str
    sample_rate: int = 44100
    sample_format: str = ""

    @property
    def by_ffmpeg(self) -> bool:
        return bool(self.sample_format)


@dataclass(frozen=True, slots=True)
class Case:
    """One file, and what is known about it."""

    name: str
    content: bytes
    #: The seconds of sound in it.
    seconds: float | None = None
    #: The sounds of which it is made, in their order.
    parts: tuple[int, ...] = (0,)
    #: Whether it has to be marked truncated; None: it may.
    marked: bool | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one file."""

    case: Case
    #: The code of an error, else empty.
    error: str
    seconds: float
    truncated: bool
    #: What FFmpeg decodes, and how alike it is, if it was asked.
    truth_s: float | None = None
    alike: float = 1.0
    least_alike: float = ALIKE

    @property
    def problem(self) -> str:
        """What is wrong with it, else empty."""
        truth_s, case = self.truth_s or 0.0, self.case
        if self.error:
            return f"refused ({self.error})" if case.marked is False else ""
        least = truth_s if case.seconds is None else case.seconds
        if self.seconds < least - CLOSE_S and not self.truncated:
            return f"unmarked loss ({self.seconds:.2f} of {least:.2f} s)"
        if case.marked not in (None, self.truncated):
            return f"truncated is {self.truncated}"
        if self.seconds > max(truth_s, PART_S * len(case.parts)) + 0.3:
            return f"too long ({self.seconds:.2f} of {truth_s:.2f} s)"
        if self.alike < self.least_alike and not self.truncated:
            return f"other sound ({self.alike:.4f})"
        return ""


SNDFILE = [
    Encoding("wav16", "WAV", "PCM_16"),
    Encoding("wav24", "WAV", "PCM_24", 48000),
    Encoding("wav-float", "WAV", "FLOAT"),
    Encoding("wav-ulaw", "WAV", "ULAW", 8000),
    Encoding("wav-ima", "WAV", "IMA_ADPCM", 22050),
    Encoding("wavex", "WAVEX", "PCM_16"),
    Encoding("rf64", "RF64", "PCM_16", 96000),
    Encoding("w64", "W64", "PCM_16"),
    Encoding("aiff", "AIFF", "PCM_16"),
    Encoding("au", "AU", "PCM_16"),
    Encoding("caf", "CAF", "PCM_16", 22050),
    Encoding("voc", "VOC", "PCM_16"),
    Encoding("flac", "FLAC", "PCM_16"),
    Encoding("flac24", "FLAC", "PCM_24", 96000),
    Encoding("vorbis", "OGG", "VORBIS"),
    Encoding("sf-opus", "OGG", "OPUS", 48000),
    Encoding("mp3-xing", "MP3", "MPEG_LAYER_III"),
]
THROUGH_FFMPEG = [
    Encoding("m4a", "ipod", "aac", 44100, "fltp"),
    Encoding("mp4", "mp4", "aac", 48000, "fltp"),
    Encoding("alac", "ipod", "alac", 44100, "s16p"),
    Encoding("mov", "mov", "pcm_s16le", 48000, "s16"),
    Encoding("adts", "adts", "aac", 44100, "fltp"),
    Encoding("webm", "webm", "libopus", 48000, "flt"),
    Encoding("mka-flac", "matroska", "flac", 44100, "s16"),
    Encoding("mkv-mp3", "matroska", "libmp3lame", 44100, "fltp"),
    Encoding("opus", "ogg", "libopus", 48000, "flt"),
    Encoding("ogg-flac", "ogg", "flac", 44100, "s16"),
    Encoding("wma", "asf", "wmav2", 44100, "fltp"),
    Encoding("amr", "amr", "libopencore_amrnb", 8000, "s16"),
    Encoding("3gp", "3gp", "libopencore_amrnb", 8000, "s16"),
    Encoding("ac3", "ac3", "ac3", 48000, "fltp"),
    Encoding("mp2", "mp2", "mp2", 44100, "s16"),
    Encoding("mp3", "mp3", "libmp3lame", 44100, "fltp"),
    Encoding("ts", "mpegts", "mp2", 44100, "s16"),
    Encoding("ps", "mpeg", "mp2", 44100, "s16"),
    Encoding("avi", "avi", "pcm_s16le", 44100, "s16"),
    Encoding("avi-mp3", "avi", "libmp3lame", 44100, "fltp"),
    Encoding("flv", "flv", "aac", 44100, "fltp"),
    Encoding("wavpack", "wv", "wavpack", 44100, "fltp"),
    Encoding("tta", "tta", "tta", 44100, "s16"),
    Encoding("caf-alac", "caf", "alac", 44100, "s16p"),
    Encoding("flac-ffmpeg", "flac", "flac", 44100, "s16"),
    Encoding("wav-ffmpeg", "wav", "pcm_s16le", 44100, "s16"),
    Encoding("au-ffmpeg", "au", "pcm_s16be", 44100, "s16"),
    Encoding("w64-ffmpeg", "w64", "pcm_s16le", 44100, "s16"),
]
ENCODINGS = SNDFILE + THROUGH_FFMPEG
#: Streams that may change their sample rate or channels.
CHANGING = ("mp3", "mp3-xing", "adts", "vorbis", "opus", "sf-opus", "mp2", "ac3", "ogg-flac")
SLOWER = {"ac3": 32000, "opus": 24000, "sf-opus": 24000}
#: Streams whose parser takes what follows for a part of the last frame, as FFmpeg does.
GLUING = ("amr", "ac3", "ts")
#: A file of these made of two is one file, by its own rules or by everybody's habit.
READ_ON = ("mp3", "mp3-xing", "adts", "vorbis", "opus", "sf-opus", "mp2", "ac3", "ogg-flac", "ts")


# files --------------------------------------------------------------------------------------------


@cache
def sound(number: int, sample_rate: int, channels: int = 1) -> np.ndarray:
    """Return notes that no other number has at the same time, below 3 kHz, (frames, channels)."""
    pitch = np.random.default_rng(number).uniform(250, 2500, 9)
    fine_s = np.arange(int(PART_S * FINE_RATE)) / FINE_RATE
    turns = np.cumsum(np.interp(fine_s, np.linspace(0, PART_S, 9), pitch)) / FINE_RATE
    time_s = np.arange(int(sample_rate * PART_S)) / sample_rate
    mono = 0.3 * np.sin(2 * np.pi * np.interp(time_s, fine_s, turns))
    both = np.stack([mono * (1 - 0.4 * channel) for channel in range(channels)], axis=1)
    return both.astype(np.float32)


@cache
def written(encoding: Encoding, number: int = 0, channels: int = 1, *, pipe: bool = False) -> bytes:
    samples = sound(number, encoding.sample_rate, channels)
    if encoding.by_ffmpeg:
        return _by_ffmpeg(encoding, samples, pipe=pipe)
    with tempfile.NamedTemporaryFile() as file:
        container, subtype = encoding.container, encoding.codec
        soundfile.write(file.name, samples, encoding.sample_rate, subtype, format=container)
        return file.read()


class _Pipe(io.RawIOBase):
    """Takes bytes in order, and cannot go back to fill in a header."""

    def __init__(self) -> None:
        self.content = b""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.content += bytes(data)
        return len(data)


def _by_ffmpeg(encoding: Encoding, samples: np.ndarray, *, pipe: bool) -> bytes:
    file = _Pipe() if pipe else io.BytesIO()
    layout = ("mono", "stereo")[samples.shape[1] - 1]
    rate, sample_format = encoding.sample_rate, encoding.sample_format
    fragments = pipe and encoding.container in ("ipod", "mp4", "mov", "3gp")
    options = {"movflags": "frag_keyframe+empty_moov"} if fragments else {}
    with av.open(file, "w", format=encoding.container, options=options) as output:
        track = output.add_stream(encoding.codec, rate=rate, options={"strict": "experimental"})
        track.layout, track.format = layout, sample_format
        if encoding.codec != "libopencore_amrnb":
            track.bit_rate = 128_000
        track.codec_context.open(strict=False)
        for frame in _frames(samples, encoding, layout, track.codec_context.frame_size or 1024):
            output.mux(track.encode(frame))
        output.mux(track.encode(None))
    return file.content if isinstance(file, _Pipe) else file.getvalue()


def _frames(samples: np.ndarray, encoding: Encoding, layout: str, size: int) -> Iterator[object]:
    rate = encoding.sample_rate
    whole = av.AudioFrame.from_ndarray(samples.T.copy(), format="fltp", layout=layout)
    whole.sample_rate = rate
    queue = av.AudioFifo()
    resampler = av.AudioResampler(format=encoding.sample_format, layout=layout, rate=rate)
    for frame in resampler.resample(whole):
        queue.write(frame)
    while frame := queue.read(size) or queue.read(0):
        yield frame


def cases(encodings: Sequence[Encoding] = ENCODINGS) -> Iterator[Case]:
    """Yield every file of some encodings, always the same."""
    for encoding in encodings:
        whole, other = written(encoding), written(encoding, 1)
        name = encoding.name
        yield Case(f"whole/{name}", whole, PART_S, marked=False)
        if "amr" not in encoding.codec:
            yield Case(f"stereo/{name}", written(encoding, channels=2), PART_S, marked=False)
        unmarked = False if name in READ_ON else None
        yield Case(f"joined/{name}", whole + other, 2 * PART_S, (0, 1), unmarked)
        three = whole + other + written(encoding, 2)
        yield Case(f"joined3/{name}", three, 3 * PART_S, (0, 1, 2), unmarked)
        yield Case(f"same-joined/{name}", whole + whole, 2 * PART_S, (0, 0), unmarked)
        for cut in CUTS:
            yield Case(f"cut-{cut}/{name}", whole[: int(len(whole) * cut)])
        yield Case(f"joined-cut/{name}", (whole + other)[: -len(other) // 3], None, (0, 1))
        if name not in GLUING:
            yield Case(f"tagged/{name}", whole + b"TAG" + bytes(125), PART_S, marked=False)
            yield Case(f"zeros/{name}", whole + bytes(20_000), PART_S, marked=False)
        if encoding.by_ffmpeg and name != "caf-alac":  # that cannot be written to a pipe
            yield Case(f"pipe/{name}", written(encoding, pipe=True), PART_S, marked=False)
    yield from changes(encodings)
    yield from headers(encodings)


def changes(encodings: Sequence[Encoding]) -> Iterator[Case]:
    """Yield files of two parts with another rate or other channels in the second."""
    for encoding in (one for one in encodings if one.name in CHANGING):
        slower = SLOWER.get(encoding.name, 22050)
        changed = dataclasses.replace(encoding, sample_rate=slower)
        first = written(encoding)
        for name, second in (
            ("rate", written(changed, 1)),
            ("channels", written(encoding, 1, 2)),
            ("both", written(changed, 1, 2)),
        ):
            there, back = f"change-{name}/{encoding.name}", f"change-back-{name}/{encoding.name}"
            yield Case(there, first + second, 2 * PART_S, (0, 1), marked=False)
            yield Case(back, second + first, 2 * PART_S, (1, 0), marked=False)


# headers ------------------------------------------------------------------------------------------


def headers(encodings: Sequence[Encoding]) -> Iterator[Case]:
    """Yield files whose length field is too small, too large, zero or a pipe's."""
    for encoding in encodings:
        if encoding.name not in _FIELDS:
            continue
        whole = written(encoding)
        marker, offset, code = _FIELDS[encoding.name]
        at = whole.index(marker) + offset
        size = struct.calcsize(code)
        (true,) = struct.unpack_from(code, whole, at)
        for kind, value in _values(true, 8 * size, encoding.name).items():
            content = whole[:at] + struct.pack(code, value) + whole[at + size :]
            complete = PART_S if kind != "larger" else None
            marked = {"larger": True, "zero": "mp3" not in encoding.name}.get(kind)
            if kind.startswith("pipe"):
                marked = False
            yield Case(f"header-{kind}/{encoding.name}", content, complete, marked=marked)
    yield from _totals(encodings)


#: Where the length lies: behind which bytes, how far, and how it is written.
_FIELDS: dict[str, tuple[bytes, int, str]] = {
    **dict.fromkeys(
        ("wav16", "wav24", "wav-float", "wav-ulaw", "wav-ima", "wavex", "wav-ffmpeg"),
        (b"data", 4, "<I"),
    ),
    "rf64": (b"ds64", 16, "<Q"),
    "w64": (b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a", 16, "<Q"),
    "w64-ffmpeg": (b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a", 16, "<Q"),
    "aiff": (b"SSND", 4, ">I"),
    "au": (b".snd", 8, ">I"),
    "au-ffmpeg": (b".snd", 8, ">I"),
    "caf": (b"data", 4, ">q"),
    "mp3": (b"Info", 8, ">I"),
    "mp3-xing": (b"Xing", 8, ">I"),
}
#: What writers put where they cannot go back: sox, FFmpeg, arecord and others.
PLACEHOLDERS = {32: (0x7FFFF000, 0x7FFFFFFF, 0x7FFFFFFF - 36, 0x80000000, 0xFFFFFFFF), 64: (-1,)}


def _values(true: int, bits: int, name: str) -> dict[str, int]:
    tiny = 5 if "mp3" in name else 64
    values = {"smaller": true // 2 & ~1, "tiny": tiny, "zero": 0, "larger": true * 3 & ~1}
    if "mp3" in name:
        return values
    for placeholder in PLACEHOLDERS[bits]:
        signed = placeholder if name == "caf" else placeholder % 2**bits
        values[f"pipe-{placeholder & 0xFFFFFFFF:x}"] = signed
    return values


def _totals(encodings: Sequence[Encoding]) -> Iterator[Case]:
    for encoding in encodings:
        if encoding.container.lower() != "flac":
            continue
        frames = int(PART_S * encoding.sample_rate)
        for kind, total in (("smaller", frames // 2), ("tiny", 64), ("zero", 0)):
            content = bad_audio.with_total(written(encoding), total)
            yield Case(f"header-{kind}/{encoding.name}", content, PART_S, marked=False)
        content = bad_audio.with_total(written(encoding), 3 * frames)
        yield Case(f"header-larger/{encoding.name}", content, marked=True)


# what becomes of them -----------------------------------------------------------------------------


def truth(content: bytes) -> np.ndarray:
    """Return what Debian's FFmpeg decodes."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        command = [part.format(file=file.name) for part in FFMPEG]
        done = subprocess.run([*command, "-f", "f32le", "-"], capture_output=True, check=False)
    return np.frombuffer(done.stdout[: len(done.stdout) // 4 * 4], np.float32)


def judge(
    decoders: pool.Decoders, case: Case, asked: Callable[[bytes], np.ndarray] | None = None
) -> Verdict:
    """Decode a file; compare it with its source, and if it is not alike with what was `asked`."""
    true = None if asked is None else asked(case.content)
    truth_s = None if true is None else len(true) / 16000
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(case.content)
        try:
            decoded = decoders.decode(file, 16000)
        except errors.DecodeError as error:
            return Verdict(case, error.code, 0.0, truncated=False, truth_s=truth_s)
    samples = decoded.waveform.samples
    alike = likeness(samples, source(case.parts))
    if true is not None and alike < ALIKE:
        alike = max(alike, likeness(samples, true))
    least = CODED if true is None else ALIKE
    seconds = len(samples) / 16000
    return Verdict(case, "", seconds, decoded.facts.truncated, truth_s, alike, least)


@cache
def source(parts: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([sound(number, 16000)[:, 0] for number in parts])


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation that nine of ten pieces reach, each a little moved for the best."""
    if not one.any() and not other.any():
        return 1.0
    # Of analytic signals, since two decoders may be half a sample apart.
    one, other = scipy.signal.hilbert(one), scipy.signal.hilbert(other)
    found = []
    for start in range(0, min(len(one), len(other)) - PIECE, PIECE):
        piece, near = one[start : start + PIECE], other[max(0, start - MOVE) :][: PIECE + 2 * MOVE]
        places = np.abs(scipy.signal.correlate(near, piece, "valid", "fft"))
        energies = np.cumsum(np.concatenate([[0.0], np.abs(near) ** 2]))
        energies = energies[PIECE:] - energies[:-PIECE]
        energy = float(np.linalg.norm(piece)) ** 2
        found.append(float(np.max(places / np.sqrt(np.maximum(energies * energy, 1e-9)))))
    return float(np.quantile(found, 0.1)) if found else 1.0


def judge_all(files: list[Case], *, beside_ffmpeg: bool = False) -> list[Verdict]:
    decoders = pool.Decoders(settings.Audio(), 1)
    try:
        return [judge(decoders, case, truth if beside_ffmpeg else None) for case in files]
    finally:
        decoders.close()


def main() -> int:
    files = list(cases())
    verdicts = judge_all(files, beside_ffmpeg=True)
    bad = [verdict for verdict in verdicts if verdict.problem]
    kinds = Counter(verdict.problem.partition(" (")[0] or "right" for verdict in verdicts)
    encodings = len({case.name.partition("/")[2] for case in files})
    lines = [f"{len(files)} files of {encodings} containers and codecs"]
    lines += [f"{count:6} {kind}" for kind, count in kinds.most_common()]
    lines += [f"{verdict.case.name}: {verdict.problem}" for verdict in bad]
    sys.stdout.write("\n".join(lines) + "\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
