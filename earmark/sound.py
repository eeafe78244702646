"""A clip for a page: its outline, mel spectrogram and sound, small enough to embed."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np
import soundfile
import soxr
from PIL import Image

from earmark.core.clips import AudioFacts, Part
from earmark.core.errors import TooShort, Unsupported
from earmark.core.settings import Settings
from earmark.core.sparse_file import SparseFile
from workers.decoding.meter import downmix
from workers.decoding.pool import Decoders
from workers.fetching.fetch import Fetcher
from workers.loading.spans import Span

if TYPE_CHECKING:
    from workers.decoding.decoder import Piece

#: Hz. Speech and most sounds are well told below 8 kHz, and a spectrogram needs no more.
RATE = 16_000
#: The outline's bars, and its height in the same units.
BARS, HEIGHT = 150, 48
#: What softer clips are drawn against: silence stays a line.
LOUD_ENOUGH = 0.02
MELS, COLUMNS = 64, 240
FFT = 512
#: Below the loudest, as librosa draws it.
FLOOR_DB = -80.0
#: Some 40 dB below a full-scale tone.
SOFT_DB = 0.0
#: Opus between its best and its smallest: 14 kbit/s, at which every sound is still plain to hear.
COMPRESSION = 0.97
#: Noise takes half as much again.
USUAL_BYTES_PER_S = 2000
#: Black to pale yellow, readable on light and dark.
COLOURS = np.array(
    [(12, 10, 30), (66, 20, 104), (150, 44, 110), (222, 82, 74), (251, 160, 60), (252, 240, 180)]
)
#: A page is not held up by a slow host as a worker may be.
CONNECT_S, TIMEOUT_S = 5.0, 30.0
#: Recordings from elsewhere that are kept for the next click: as a whole, 1 GiB each at most.
KEPT = 2

#: start_s, end_s, label, score.
Segment = tuple[float, float, str, float]


@dataclass(frozen=True, slots=True)
class Heard:
    """One clip as a page shows it."""

    duration_s: float
    #: An SVG path of BARS by HEIGHT.
    outline: str
    #: An image as a data URI, low frequencies at the bottom.
    mel: str
    #: Audio as a data URI, and how much of the clip it is.
    sound: str
    sound_s: float


@dataclass(slots=True)
class Recording:
    """An open recording; threads may share it."""

    file: BinaryIO
    decoders: Decoders
    #: Fetches all of it.
    fetch: Callable[[], BinaryIO]
    #: A decoder moves the place in the file.
    lock: Lock = field(default_factory=Lock)

    def stretch(self, start_s: float, end_s: float) -> Iterator[Piece]:
        """Yield some seconds at its own rate, with the channels of each frame.

        Raises:
            ClipError: it cannot be decoded, or what is missing of it cannot be fetched.
        """
        with self.lock:
            if isinstance(self.file, SparseFile):
                with suppress(Unsupported):
                    pieces = self.decoders.stretch(self.file, start_s, end_s)
                    first = next(pieces)
                    if len(first.samples):
                        yield first
                        yield from pieces
                        return
                # Its header tells too little: all of it is looked at.
                self.file.close()
                self.file = self.fetch()
            yield from self.decoders.stretch(self.file, start_s, end_s)

    def __del__(self) -> None:
        self.file.close()


class Listener:
    """Fetches clips again, through the guard and the limited decoders that workers use.

    Use one for a page; its threads share it.
    """

    def __init__(self, settings: Settings, *, at_once: int = 1) -> None:
        fetch = settings.fetch
        quick: dict[str, Any] = {
            "connect_timeout_s": min(CONNECT_S, fetch.connect_timeout_s),
            "timeout_s": min(TIMEOUT_S, fetch.timeout_s),
        }
        if settings.database_url.startswith("sqlite") and not fetch.file_roots:
            # A SQLite ledger names files of this machine; a shared ledger may name any.
            quick["file_roots"] = (Path("/"),)
        self._fetcher = Fetcher(settings.changed(fetch=quick).fetch)
        self._decoders = Decoders(settings.audio, at_once)
        self._kept = lru_cache(KEPT)(self.open)

    def hear(self, uri: str, part: Part | None = None, *, most_s: float, most_bytes: int) -> Heard:
        """Return a clip as a page shows it, with the beginning of its sound up to the limits.

        Raises:
            ClipError: it cannot be fetched any more, or not be decoded.
        """
        fetched = self._fetcher.fetch(uri, part)
        with fetched.file:
            samples = self._decoders.decode(fetched.file, RATE).waveform.samples
        span = Span.of(part, RATE)
        return heard(span.cut(samples) if span else samples, most_s, most_bytes)

    def open(self, uri: str, part: Part | None = None) -> Recording:
        """Return a recording, fetched if it is elsewhere: as a whole, or later what is heard of it.

        Raises:
            ClipError: it cannot be fetched any more.
        """
        file = self._fetcher.open(uri, part)
        return Recording(file, self._decoders, lambda: self._fetcher.fetch(uri, part).file)

    def hear_stretch(
        self, uri: str, part: Part, start_s: float, *, most_s: float, most_bytes: int
    ) -> Heard:
        """Return the seconds of a recording behind some time as a page shows them.

        Raises:
            ClipError: it cannot be fetched any more, or not be decoded, or ends before.
        """
        recording = self._kept(uri, part) if "://" in uri else self.open(uri, part)
        *_, last = pieces = list(recording.stretch(start_s, start_s + most_s))
        facts, samples = last.end, np.concatenate([piece.samples for piece in pieces])
        assert isinstance(facts, AudioFacts)
        if not len(samples):
            raise TooShort(min_duration_s=start_s, setting="where one wants to hear it")
        mono = downmix(samples.reshape(-1, facts.channels))
        resampled = soxr.resample(mono, facts.source_sample_rate, RATE)
        return heard(resampled, most_s, most_bytes)

    def close(self) -> None:
        self._kept.cache_clear()
        self._fetcher.close()
        self._decoders.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def heard(samples: np.ndarray, most_s: float, most_bytes: int) -> Heard:
    """Return (samples,) at RATE as a page shows them, with the first seconds of their sound."""
    first = samples[: round(RATE * min(most_s, most_bytes / USUAL_BYTES_PER_S))]
    sound = _opus(first)
    if len(sound) > most_bytes:
        first = first[: int(0.9 * len(first) * most_bytes / len(sound))]
        sound = _opus(first)
    mel, seconds = _data("image/webp", _image(mel_db(samples))), len(samples) / RATE
    return Heard(seconds, outline(samples), mel, _data("audio/ogg", sound), len(first) / RATE)


def segments(windows: Iterable[Segment]) -> list[Segment]:
    """Join consecutive windows with one label, at their best score.

    Where two stretches overlap, the overlap belongs to the later one.
    """
    joined: list[Segment] = []
    for label, group in groupby(windows, lambda window: window[2]):
        stretch = list(group)
        start_s, end_s = stretch[0][0], stretch[-1][1]
        best = max(score for *_, score in stretch)
        if joined:
            before = joined[-1]
            joined[-1] = (before[0], start_s, *before[2:])
        joined.append((start_s, end_s, label, best))
    return joined


def peaks(samples: np.ndarray, count: int) -> np.ndarray:
    """Return the peak of each of `count` stretches of (samples,): (count,), 1 the highest."""
    edges = np.linspace(0, len(samples), count, endpoint=False, dtype=int)
    loud = np.maximum.reduceat(np.abs(samples), np.minimum(edges, len(samples) - 1))
    found: np.ndarray = loud / max(float(loud.max()), LOUD_ENOUGH)
    return found


def outline(samples: np.ndarray) -> str:
    """Return (samples,) as an SVG path of upright bars, BARS by HEIGHT."""
    half = np.maximum(1, np.rint(peaks(samples, BARS) * (HEIGHT / 2 - 1))).astype(int)
    return "".join(f"M{at} {HEIGHT // 2 - size}v{2 * size}" for at, size in enumerate(half))


def mel_db(samples: np.ndarray) -> np.ndarray:
    """Return the mel spectrogram of (samples,) at RATE, in dB below its loudest part.

    Its shape is (MELS, at most COLUMNS). A clip softer than a whisper stays dark.
    """
    padded = np.pad(samples, FFT // 2)
    hop = max(FFT // 4, len(samples) // (4 * COLUMNS))
    frames = np.lib.stride_tricks.sliding_window_view(padded, FFT)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(FFT).astype(np.float32))) ** 2 @ _mel_filters().T
    columns = min(COLUMNS, len(power))
    pooled = np.maximum.reduceat(
        power, np.linspace(0, len(power), columns, endpoint=False, dtype=int)
    )
    level = 10 * np.log10(np.maximum(pooled, 1e-10))
    found: np.ndarray = np.maximum(level - max(level.max(), SOFT_DB), FLOOR_DB).T
    return found


def _mel_filters() -> np.ndarray:
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    centres = 700 * (10 ** (np.linspace(0, top, MELS + 2) / 2595) - 1)
    low, middle, high = centres[:-2, None], centres[1:-1, None], centres[2:, None]
    hertz = np.fft.rfftfreq(FFT, 1 / RATE)[None]
    filters: np.ndarray = np.maximum(
        0, np.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle))
    )
    return filters


def _image(level: np.ndarray) -> bytes:
    shade = (level[::-1] / -FLOOR_DB + 1) * (len(COLOURS) - 1)
    pixels = np.stack(
        [np.interp(shade, np.arange(len(COLOURS)), channel) for channel in COLOURS.T], axis=-1
    )
    file = BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "WEBP", quality=45, method=4)
    return file.getvalue()


def _opus(samples: np.ndarray) -> bytes:
    file = BytesIO()
    soundfile.write(
        file, samples, RATE, format="OGG", subtype="OPUS", compression_level=COMPRESSION
    )
    return file.getvalue()


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"
