"""The records that flow through Earmark: a list line becomes a clip, a chunk, a waveform, windows, an outcome."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from earmark.errors import ClipError

STATES = ("pending", "queued", "running", "done", "failed", "cancelled")
FINAL_STATES = ("done", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Clip:
    """One URL or path of a list, with every other column of its line."""

    uri: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A handful of clips of one run: what one queue message names."""

    run_id: int
    #: (clip id, display URI) pairs; the true URI never leaves the database.
    clips: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class Waveform:
    """Mono float32 samples, shape (samples,), at a sample rate in Hz."""

    samples: np.ndarray
    sample_rate: int

    @property
    def duration_s(self) -> float:
        return len(self.samples) / self.sample_rate


@dataclass(frozen=True, slots=True)
class AudioFacts:
    """What the decoder learnt about a file, before resampling."""

    duration_s: float
    source_sample_rate: int
    channels: int
    codec: str
    #: The file declares more audio than it holds.
    truncated: bool = False
    #: Every sample is zero.
    silent: bool = False


@dataclass(frozen=True, slots=True)
class Window:
    """The stretch of a waveform the model sees at once, shape (samples,)."""

    start_s: float
    end_s: float
    samples: np.ndarray


@dataclass(frozen=True, slots=True)
class Prediction:
    """One label, by its position in the model's label list, and its score."""

    label: int
    score: float


@dataclass(frozen=True, slots=True)
class WindowPredictions:
    """The top-k of one window of a clip that has several."""

    start_s: float
    end_s: float
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds a clip spent in each stage."""

    fetch_ms: float = 0.0
    decode_ms: float = 0.0
    classify_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Source:
    """The bytes a clip turned out to be."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Success:
    """A clip with its predictions, best first."""

    clip_id: int
    source: Source
    facts: AudioFacts
    predictions: tuple[Prediction, ...]
    windows: tuple[WindowPredictions, ...] = ()
    timings: Timings = Timings()


@dataclass(frozen=True, slots=True)
class Failure:
    """A clip with the reason it has no predictions."""

    clip_id: int
    error: ClipError
    source: Source | None = None
    timings: Timings = Timings()


Outcome = Success | Failure


@dataclass(frozen=True, slots=True)
class Postponed:
    """A clip whose host is to be left alone for a while: no outcome yet, and no try either."""

    clip_id: int
    delay_s: float


def display_uri(uri: str) -> str:
    """Return the URI without user-info, query and fragment: what may appear in messages, Flower and logs."""
    if "://" not in uri or not any(mark in uri for mark in "?#@"):
        return uri
    parts = _split(uri)
    if parts is None:
        return f"{uri.partition('://')[0]}://(not a URL)"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def uri_key(uri: str) -> bytes:
    """Return what makes a clip the same clip within a run: a hash of the URI in its normal form.

    Scheme and host are lower-cased, a default port and the fragment are dropped; the path and the query stay as they
    are, since servers may tell those apart.
    """
    parts = _split(uri)
    if parts:
        netloc = parts.netloc.lower().removesuffix({"http": ":80", "https": ":443"}.get(parts.scheme, ":"))
        uri = urlunsplit((parts.scheme, netloc, parts.path or "/", parts.query, ""))
    return blake2b(uri.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _split(uri: str) -> SplitResult | None:
    try:
        return urlsplit(uri) if "://" in uri else None
    except ValueError:
        return None
