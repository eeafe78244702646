"""`earmark explain`: classify one clip in this process and tell each step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import sqlalchemy as sa

from earmark import folders
from earmark.core import addresses, resolver
from earmark.core.clips import Failure, Part, Success, display_uri
from earmark.core.credentials import DEFAULT_PORTS, Credentials, Proxy
from earmark.core.errors import ClipError
from earmark.core.options import RunOptions
from earmark.core.settings import Settings
from earmark.in_process import Classified, classified
from earmark.sound import peaks
from earmark.tables import bar

if TYPE_CHECKING:
    import numpy as np

    #: Takes the name of a step and a text about it.
    Say = Callable[[str, str], None]

HEADERS = (
    "Content-Type", "Content-Length", "Content-Encoding", "Server", "Last-Modified", "ETag",
    "Retry-After",
)  # fmt: skip
#: Labels shown of each window.
LABELS_SHOWN = 3
MARKS = ("truncated", "silent", "over_scale", "cancelling")
#: With the names of the steps they fit 80 columns.
SPARKS, BLOCKS = 60, "▁▂▃▄▅▆▇█"


def explain(
    uri: str, settings: Settings, options: RunOptions, say: Say, part: Part | None = None
) -> bool:
    """Fetch and classify one clip and tell each step; return whether it has a result."""
    say("clip", display_uri(uri))
    if part and part.has_span:
        end = "its end" if part.end_s is None else f"{part.end_s:g} s"
        say("span", f"{part.start_s or 0:g} s to {end}")
    allowed = folders.readable(uri, settings)
    if allowed is not settings:
        say(
            "file roots",
            "none are set: `run` and this command read the file, a worker of a cluster would not",
        )
    with classified(uri, allowed, options, Steps(allowed, say), part) as ended:
        if ended.waveform:
            say("waveform", sparkline(ended.waveform.samples))
        _tell(ended, say)
        return isinstance(ended.outcome, Success)


def tell_row(row: sa.Row[Any], say: Say) -> None:
    """Tell the state of a clip in the ledger."""
    worker = f", by {row.worker}" if row.worker else ""
    counts = f"tries: {row.attempts}, deaths of its worker: {row.crashes}"
    say("ledger", f"{row.state_now}{worker}; {counts}")
    if row.error:
        say("its error", f"{row.error_code} ({row.error_stage}): {row.error}")


class Steps:
    """An observer that tells each request, its answer and the file."""

    def __init__(self, settings: Settings, say: Say) -> None:
        self._say = say
        self._addresses = addresses.Addresses(settings.fetch)
        self._fetch = settings.fetch
        self._credentials = Credentials(
            settings.fetch.headers, settings.fetch.tokens, settings.fetch.basic_auth
        )

    def seen(self, step: str, *facts: Any) -> None:
        # With this, rich ends the thread that finds its pipe closed: here, the one of a loader.
        with suppress(SystemExit):
            match step:
                case "sending":
                    self._sending(*facts)
                case "answered":
                    self._answered(*facts)
                case "fetched":
                    self._fetched(*facts)

    def _sending(self, url: str) -> None:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORTS[parts.scheme]
        self._say("asked", display_uri(url))
        if sent := self._credentials.headers(url):
            self._say("with", ", ".join(sent))
        if self._fetch.proxy:
            proxy = Proxy.parse(self._fetch.proxy)
            self._say("proxy", f"{proxy.host}:{proxy.port}")
            if self._fetch.proxy_resolves:
                return
        # A name that is not found is told as the clip's failure.
        with suppress(ClipError, TimeoutError):
            for *_, place in resolver.resolve(
                str(parts.hostname), port, self._fetch.connect_timeout_s
            ):
                self._say("address", f"{place[0]}, {self._verdict(place[0])}")

    def _answered(self, url: str, status: int, headers: dict[str, str]) -> None:
        self._say("answer", f"HTTP {status}")
        sent = {name.lower(): value for name, value in headers.items()}
        for name in HEADERS:
            if value := sent.get(name.lower()):
                self._say("", f"{name}: {value}")
        if location := sent.get("location"):
            self._say("", f"Location: {display_uri(urljoin(url, location))}")

    def _fetched(self, size: int, sha256: str, kind: str) -> None:
        self._say("fetched", f"{size} bytes, sha256 {sha256}")
        self._say("first bytes", kind)

    def _verdict(self, address: str) -> str:
        try:
            self._addresses.check(address)
        except ClipError:
            return "refused"
        return "may be dialled"


def sparkline(samples: np.ndarray) -> str:
    """Return (samples,) as a line of blocks, each as high as the loudest of its stretch."""
    highest = len(BLOCKS) - 1
    return "".join(BLOCKS[round(peak * highest)] for peak in peaks(samples, SPARKS))


def _tell(ended: Classified, say: Say) -> None:
    match outcome := ended.outcome:
        case Success():
            _tell_success(outcome, ended, say)
            _tell_timings(outcome, say)
        case Failure(error=error):
            _tell_timings(outcome, say)
            again = "it would be tried again" if error.transient else "it is not tried again"
            say("failed", f"at {error.stage}, {error.code}: {error} ({again})")
        case _:
            assert ended.success  # raises the reason


def _tell_success(success: Success, ended: Classified, say: Say) -> None:
    facts = success.facts
    form = f"{facts.codec}, {facts.source_sample_rate} Hz, {facts.channels} channels"
    marks = "".join(f", {name.replace('_', ' ')}" for name in MARKS if getattr(facts, name))
    say("audio", f"{form}, {facts.duration_s:.2f} s{marks}")
    if facts.recorded_at:
        say("recorded", f"{facts.recorded_at} (by its {facts.recorded_from})")
    classifier = ended.batcher.classifier
    say("model", f"{classifier.card.name} on {classifier.device}")
    for window in success.windows:
        best = in_words(ended.named(window.predictions[:LABELS_SHOWN]))
        where = f"channel {window.channel}, " if window.channel else ""
        say("window", f"{where}{window.start_s:.2f} to {window.end_s:.2f} s: {best}")
    if success.channel:
        say("heard on", f"channel {success.channel}")
    _tell_scores(ended.named(success.predictions), say)


def _tell_scores(predictions: list[tuple[str, float]], say: Say) -> None:
    names = [f"{label} {score:.2f}" for label, score in predictions]
    width = max(map(len, names), default=0)
    step = "scores"
    for name, (_, score) in zip(names, predictions, strict=True):
        say(step, f"{name:<{width}}  {bar(score, SPARKS - width)}")
        step = ""


def _tell_timings(outcome: Success | Failure, say: Say) -> None:
    took = outcome.timings
    loaded = f"fetch {took.fetch_ms:.0f} ms, decode {took.decode_ms:.0f} ms"
    say("took", f"{loaded}, classify {took.classify_ms:.0f} ms")


def in_words(predictions: list[tuple[str, float]]) -> str:
    """Return labels and scores as a line of text."""
    return ", ".join(f"{label} {score:.2f}" for label, score in predictions) or "nothing"
