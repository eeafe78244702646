"""One clip, worked on in this process as a worker would, and told step by step."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol
from urllib.parse import urljoin, urlsplit

from db.ledger import Claimed
from earmark import api, folders
from earmark.core.clips import Failure, Postponed, Success, display_uri
from earmark.core.errors import ClipError, ServiceError
from earmark.output import bar
from earmark.sound import peaks
from workers.decoding import formats
from workers.decoding.pool import Decoders
from workers.fetching import guard
from workers.fetching.breaker import Breaker
from workers.fetching.fetch import Fetcher
from workers.fetching.polite import PoliteFetcher
from workers.models import LoadedModel, RunPlan, open_model
from workers.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import sqlalchemy as sa
    from urllib3 import BaseHTTPResponse

    from earmark.core.clips import Waveform
    from earmark.core.options import RunOptions
    from earmark.core.settings import Settings
    from workers.decoding.pool import Decoded
    from workers.fetching.fetch import Fetched
    from workers.scoring.batcher import Batcher

HEADERS = (
    "Content-Type",
    "Content-Length",
    "Content-Encoding",
    "Server",
    "Last-Modified",
    "ETag",
    "Retry-After",
)
#: Of each window.
LABELS_SHOWN = 3
#: With the steps' names they fit 80 columns.
SPARKS, BLOCKS = 60, "▁▂▃▄▅▆▇█"


class Say(Protocol):
    """Takes the name of a step and what is to be told of it."""

    def __call__(self, step: str, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Classified:
    """How one clip ended, the model that heard it, and what it heard: None if it did not come to that."""

    outcome: Success | Failure | Postponed
    labels: tuple[str, ...]
    batcher: Batcher
    waveform: Waveform | None

    def named(self, predictions: Any) -> str:
        return (
            ", ".join(f"{self.labels[each.label]} {each.score:.2f}" for each in predictions)
            or "nothing"
        )


def explain(uri: str, settings: Settings, options: RunOptions, say: Say) -> None:
    """Fetch and classify one clip and tell each step."""
    say("clip", display_uri(uri))
    allowed = may_read(uri, settings)
    if allowed is not settings:
        say(
            "file roots",
            "none are set: `run` and this command read the file, a worker of a cluster would not",
        )
    with classified(uri, allowed, options, say) as ended:
        _tell(ended, say)


def tell_row(row: sa.Row[Any], say: Say) -> None:
    """Tell what the ledger knows of a clip."""
    worker = f", by {row.worker}" if row.worker else ""
    say(
        "ledger",
        f"{row.state_now}{worker}; tries: {row.attempts}, deaths of its worker: {row.crashes}",
    )
    if row.error:
        say("its error", f"{row.error_code} ({row.error_stage}): {row.error}")


def may_read(uri: str, settings: Settings) -> Settings:
    """Return the settings with which the file that a person names here is read, where none says otherwise."""
    roots = [] if settings.fetch.file_roots else api.file_roots([uri])
    return with_roots(settings, *roots) if roots else settings


def with_roots(settings: Settings, *roots: Any) -> Settings:
    return settings.changed(fetch={"file_roots": roots})


@contextmanager
def classified(uri: str, settings: Settings, options: RunOptions, say: Say) -> Iterator[Classified]:
    """Yield how the clip ended.

    Raises:
        ServiceError: the model or the decoder cannot be had.
    """
    folders.check_temporary()
    decoders = _TellingDecoders(settings, say)
    pipeline = Pipeline(_TellingFetcher(settings, say), decoders, 1)
    try:
        card, batcher = open_model((options.model, options.revision, options.labels), settings)
        try:
            plan = RunPlan(options, LoadedModel(card, batcher, model_id=0, label_ids=()))
            outcome = pipeline.classify(Claimed(0, uri, attempts=1, crashes=0), plan)
            yield Classified(outcome, card.labels, batcher, decoders.waveform)
        finally:
            batcher.close()
    finally:
        pipeline.close()


class _TellingFetcher(PoliteFetcher):
    """Fetches as a worker does, but for the limits, which need a broker."""

    def __init__(self, settings: Settings, say: Say) -> None:
        self.breaker = Breaker()
        self._fetcher = Fetcher(settings.fetch, _TellingGuard(settings, say))
        self._say = say

    def fetch(self, uri: str) -> Fetched:
        fetched = self._fetcher.fetch(uri)
        self._say("fetched", f"{fetched.source.bytes} bytes, sha256 {fetched.source.sha256}")
        try:
            found = formats.recognise(fetched.file.fileno()).name
        except ClipError as error:
            found = str(error)
        self._say("first bytes", found)
        return fetched


class _TellingDecoders(Decoders):
    def __init__(self, settings: Settings, say: Say) -> None:
        super().__init__(settings.audio, 1)
        self._say = say
        self.waveform: Waveform | None = None

    def decode(self, file: BinaryIO, sample_rate: int) -> Decoded:
        decoded = super().decode(file, sample_rate)
        self.waveform = decoded.waveform
        self._say("waveform", sparkline(decoded.waveform.samples))
        return decoded


def sparkline(samples: np.ndarray) -> str:
    """Return (samples,) as a line of blocks, each as high as the loudest of its stretch."""
    return "".join(BLOCKS[round(peak * (len(BLOCKS) - 1))] for peak in peaks(samples, SPARKS))


class _TellingGuard(guard.Guard):
    def __init__(self, settings: Settings, say: Say) -> None:
        super().__init__(settings.fetch)
        self._say = say
        self._connect_s = settings.fetch.connect_timeout_s

    def _ask(self, url: str, download: guard.Download) -> BaseHTTPResponse:
        parts = urlsplit(url)
        port = parts.port or guard.DEFAULT_PORTS[parts.scheme]
        self._say("asked", display_uri(url))
        # A name that is not found is told as the clip's failure.
        with suppress(ClipError, TimeoutError):
            for _, _, _, _, (address, *_) in guard.resolve(
                str(parts.hostname), port, self._connect_s
            ):
                self._say("address", f"{address}, {self._verdict(address)}")
        answer = super()._ask(url, download)
        self._say("answer", f"HTTP {answer.status}")
        for name in HEADERS:
            if value := answer.headers.get(name):
                self._say("", f"{name}: {value}")
        if location := answer.headers.get("Location"):
            self._say("", f"Location: {display_uri(urljoin(url, location))}")
        return answer

    def _verdict(self, address: str) -> str:
        try:
            self._addresses.check(address)
        except ClipError:
            return "refused"
        return "may be dialled"


def _tell(ended: Classified, say: Say) -> None:
    outcome = ended.outcome
    if isinstance(outcome, Postponed):
        raise ServiceError(reason="The clip could not be worked on here; the log above says why.")
    if isinstance(outcome, Success):
        facts = outcome.facts
        marks = [name for name in ("truncated", "silent") if getattr(facts, name)]
        sound = f"{facts.codec}, {facts.source_sample_rate} Hz, {facts.channels} channels, {facts.duration_s:.2f} s"
        say("audio", ", ".join([sound, *marks]))
        say("model", f"{ended.batcher.classifier.card.name} on {ended.batcher.classifier.device}")
        for window in outcome.windows:
            best = ended.named(window.predictions[:LABELS_SHOWN])
            say("window", f"{window.start_s:.2f} to {window.end_s:.2f} s: {best}")
        names = [f"{ended.labels[each.label]} {each.score:.2f}" for each in outcome.predictions]
        width = max(map(len, names), default=0)
        for rank, (name, each) in enumerate(zip(names, outcome.predictions, strict=True)):
            say("" if rank else "scores", f"{name:<{width}}  {bar(each.score, SPARKS - width)}")
    took = outcome.timings
    say(
        "took",
        f"fetch {took.fetch_ms:.0f} ms, decode {took.decode_ms:.0f} ms, classify {took.classify_ms:.0f} ms",
    )
    if isinstance(outcome, Failure):
        again = "it would be tried again" if outcome.error.transient else "it is not tried again"
        say("failed", f"at {outcome.error.stage}, {outcome.error.code}: {outcome.error} ({again})")
