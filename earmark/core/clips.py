"""The records that flow through Earmark: clip, chunk, waveform, window, prediction, outcome."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from earmark.core import signed_urls
from earmark.core.errors import ClipError

if TYPE_CHECKING:
    import numpy as np


class State(StrEnum):
    """The state of a clip: pending, queued, running, then one of the final states."""

    #: Waits in the database: new, given back, or to be tried again.
    pending = "pending"
    #: Waits in a queue, as part of a chunk.
    queued = "queued"
    #: A worker has it.
    running = "running"
    #: Has a result.
    done = "done"
    #: Failed for good, with an error.
    failed = "failed"
    #: Its run was cancelled before it was final.
    cancelled = "cancelled"


STATES = tuple(State)
FINAL_STATES = (State.done, State.failed, State.cancelled)
#: Which channels of a file are heard: their mix; each by itself; the mix, or each by itself if
#: they cancel each other. A number from 1 up: that one.
MIX, EACH, MIX_UNLESS_CANCELLING = 0, -1, -2


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a file that a list row names."""

    #: A span in seconds.
    start_s: float | None = None
    end_s: float | None = None
    #: The member of a container file, such as a ZIP.
    member: str | None = None
    #: Where the container has the member's bytes, and how it packs them; empty: as they are.
    member_offset: int | None = None
    member_bytes: int | None = None
    packing: str | None = None

    @property
    def has_span(self) -> bool:
        return self.start_s is not None or self.end_s is not None

    @property
    def place(self) -> tuple[str | int | None, ...]:
        """The file's place in its container, which its spans have in common."""
        return self.member, self.member_offset, self.member_bytes, self.packing

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Part:
        """Return the part that a row of `clips` names."""
        return cls(*(row[name] for name in cls.__slots__))


@dataclass(frozen=True, slots=True)
class Clip:
    """One URL or path of a list, with every other column of its line."""

    uri: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    #: None for the whole file.
    part: Part | None = None
    #: What identifies the clip in place of its URI.
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A handful of clips of one run: what one queue message names."""

    #: The database that the ids are of.
    ledger_id: str
    run_id: int
    #: (clip id, display URI) pairs; the true URI never leaves the database.
    clips: tuple[tuple[int, str], ...]
    #: For Flower; not part of the message.
    run_name: str = ""


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
    #: Every sample of every channel is zero.
    silent: bool = False
    #: Its floats go beyond -1..1.
    over_scale: bool = False
    #: Its channels cancel each other in their mix, which was not heard therefore.
    cancelling: bool = False
    #: What the file says of itself, as a JSON object in ASCII; empty if nothing.
    tags: str = ""
    #: When it was recorded, ISO 8601: with a Z in UTC, else local; empty if unknown.
    recorded_at: str = ""
    #: The tag that says so, or `name`.
    recorded_from: str = ""


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
    #: 1-based, as recorded; None for the mix of all.
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class Embedding:
    """The embedding of one window of a clip."""

    start_s: float
    end_s: float
    #: As `earmark.core.vectors` reads it.
    vector: bytes
    #: 1-based, as recorded; None for the mix of all.
    channel: int | None = None


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
    #: The channel of the predictions; None for the mix of all.
    channel: int | None = None
    #: Another clip's result for the same bytes, model and options.
    reused: bool = False
    #: One for each window, if the run keeps them.
    embeddings: tuple[Embedding, ...] = ()
    #: The model that this one follows did not let the clip through, so that it has no predictions.
    unheard: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """A clip with the reason it has no predictions."""

    clip_id: int
    error: ClipError
    source: Source | None = None
    timings: Timings = Timings()
    #: The cause may be this worker's, so that another one takes the clip; not a try.
    given_back: bool = False
    #: The worker has looked: the cause is the clip's own, though the error's may be another.
    own: bool = False


Outcome = Success | Failure

#: 88 bits: among a billion URLs of a run, two share a hash with a probability of 1.6e-9.
KEY_BYTES = 11
#: Those of them that the parts of a file have in common.
FILE_KEY_BYTES = 4
#: The fields of a part that name it; the others say where its bytes are.
NAMING = 3
#: What display_uri takes away.
_SAYS_MORE = re.compile(r"[?#@]")
#: URLs that are in normal form at a glance, which most are.
_NORMAL = re.compile(
    r"https?://[a-z0-9-]+(?:\.[a-z0-9-]+)+/[\w~.,;:@!$'()*&=/-]*(?:%[89A-F][0-9A-F][\w~.,;:@!$'()*&=/-]*)*"
    r"(?:\?[\w~.,;:@!$'()*&=/-]+)?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Postponed:
    """A clip whose host is to be left alone for a while: no outcome yet, and no try either."""

    clip_id: int
    delay_s: float


def display_uri(uri: str) -> str:
    """Return the URI without user-info, query and fragment, for messages, Flower and logs."""
    if "://" not in uri or not _SAYS_MORE.search(uri):
        return uri
    try:
        parts = urlsplit(uri)
    except ValueError:
        return f"{uri.partition('://')[0]}://(not a URL)"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def clip_key(clip: Clip) -> bytes:
    """Return a clip's key within its run."""
    if clip.key is None:
        return uri_key(clip.uri, clip.part)
    # No URI begins with a NUL.
    return _hashed(f"\0{clip.key}", clip.part)


def uri_key(uri: str, part: Part | None = None) -> bytes:
    """Return a clip's key within a run: a hash of its URI in normal form and of its part.

    A signature that a provider will renew is no part of the key.
    """
    return whole_uri_key(signed_urls.without(uri) if "?" in uri else uri, part)


def whole_uri_key(uri: str, part: Part | None = None) -> bytes:
    """Return the same, with any signature a part of the key, as before 0.2.0."""
    normal = uri if _NORMAL.fullmatch(uri) and "/." not in uri else normal_uri(uri)
    return _hashed(normal, part)


def _hashed(text: str, part: Part | None) -> bytes:
    file = text.encode("utf-8", "surrogateescape")
    if part is None:
        return blake2b(file, digest_size=KEY_BYTES).digest()
    # No URI has a NUL, so that no other URI has the same key.
    named = file + b"\0" + json.dumps(astuple(part)[:NAMING]).encode()
    # The parts of a file begin alike, so that they stand together where rows are sorted by key.
    start = blake2b(file, digest_size=FILE_KEY_BYTES).digest()
    return start + blake2b(named, digest_size=KEY_BYTES - FILE_KEY_BYTES).digest()


def normal_uri(uri: str) -> str:
    """Return a URL in its normal form (RFC 3986, section 6.2.2), without the fragment.

    Scheme and host are lower-cased, an international host becomes ASCII, a default port is
    dropped, dot segments are resolved, and needless percent-encoding is undone. A path of a file
    stays as it is.
    """
    if "://" not in uri:
        return uri
    # Imported here because most lists are in normal form.
    from yarl import URL

    try:
        url = URL(uri).with_fragment(None)
        return str(url.with_path("/", keep_query=True) if url.raw_path == "/" else url)
    except (ValueError, TypeError):
        return uri
