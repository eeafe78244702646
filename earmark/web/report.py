"""`earmark report`: one HTML file about a run, with its labels, failures, and clips to play."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.progress import track

from db import browse, runs
from db import charts as counts
from db.pace import pace
from db.rows import plain
from db.runs import RunRow
from earmark import files
from earmark.advice import bottleneck
from earmark.core.clips import Part, State
from earmark.core.errors import ClipError
from earmark.core.settings import Settings
from earmark.evaluation import evaluate
from earmark.sound import Heard, Listener, Segment, segments
from earmark.terminal import in_words, screen

#: Clips on a page: it opens at once on a phone, and in 5 MB each clip has seconds of sound.
MOST_CLIPS = 200
#: Bytes for all clips together, and for all parts of a clip but its sound.
BUDGET, BESIDE_SOUND = 4_800_000, 11_000
LONGEST_SOUND_S = 30.0
#: Downloads and decoders at once: a page is made once in a while, by one person.
AT_ONCE = 4
#: Labels with a colour of their own; the style sheet has as many.
COLOURS = 7
LABELS_SHOWN = 12
SCORE_BINS = 20
TIME_BINS = 48
#: Below it a best label is in doubt.
UNCERTAIN = 0.6
LONGEST_META = 300

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True, slots=True)
class Card:
    """A clip on a page: its row, and its sound or the reason why there is none."""

    clip: dict[str, Any]
    heard: Heard | None
    why_not: str

    @property
    def name(self) -> str:
        uri = str(self.clip["display_uri"])
        return uri.rstrip("/").rpartition("/")[2] or uri

    @property
    def link(self) -> str | None:
        """Its URL on the web; the path of a file would lead nowhere from another machine."""
        uri = str(self.clip["display_uri"])
        if uri.lower().startswith(("http://", "https://")):
            return uri
        return None

    @property
    def meta(self) -> dict[str, str]:
        shown = {}
        for name, value in islice((self.clip["meta"] or {}).items(), LABELS_SHOWN):
            shown[name] = _short(value)
        return shown

    @property
    def search(self) -> str:
        words = [str(self.clip["display_uri"])]
        for name, value in self.meta.items():
            words += [name, value]
        return " ".join(words).lower()

    @property
    def timelines(self) -> list[tuple[int | None, list[Segment]]]:
        """What is heard when, on each channel."""
        begin_s = self.clip["start_s"] or 0.0
        timelines = []
        for channel, windows in groupby(self.clip["windows"], itemgetter(0)):
            shown = [(start - begin_s, end - begin_s, *rest) for _, start, end, *rest in windows]
            timelines.append((channel, segments(shown)))
        return timelines

    @property
    def events(self) -> list[Segment]:
        """What is heard when, on any channel."""
        events = []
        for _, timeline in self.timelines:
            events += timeline
        return events


def write(
    engine: sa.Engine,
    run: RunRow,
    settings: Settings,
    file: Path,
    *,
    most: int = MOST_CLIPS,
    truth: str | None = None,
) -> int:
    """Write a run's page; return how many clips it shows."""
    compared = evaluate(engine, run, truth) if truth else None
    ids = browse.sample(engine, run.id, most)
    with Listener(settings, at_once=AT_ONCE) as listener, ThreadPoolExecutor(AT_ONCE) as pool:
        hear = partial(listener.hear, most_s=LONGEST_SOUND_S, most_bytes=sound_bytes(len(ids)))
        found = pool.map(partial(card, hear=hear), browse.details(engine, ids))
        shown: Any = {"console": screen, "transient": True, "disable": not screen.is_terminal}
        cards = list(track(found, "Fetching sounds", len(ids), **shown))
    page = render(
        "report.html",
        **overview(engine, run, settings),
        **charts(engine, run),
        cards=cards,
        evaluation=compared,
        **inlined(),
    )
    with files.opened(file) as out:
        out.write(page)
    return len(cards)


def sound_bytes(clips: int) -> int:
    """Return the bytes of sound that each of so many clips may have, before Base64."""
    return int((BUDGET / max(1, clips) - BESIDE_SOUND) * 3 / 4)


def card(clip: dict[str, Any], hear: Callable[[str, Part], Heard]) -> Card:
    """Return a clip's card; what failed is not fetched again."""
    if clip["state"] != State.done:
        return Card(clip, None, "")
    try:
        return Card(clip, hear(clip["uri"], Part.of(clip)), "")
    except ClipError as error:
        return Card(clip, None, str(error))


def overview(engine: sa.Engine, run: RunRow, settings: Settings) -> dict[str, Any]:
    """Return the parts of a page that are quick to read, whatever the size of the run."""
    state = runs.progress(engine, run.id)
    going = pace(engine, run.id, state)
    advice = bottleneck(going.workload, settings.worker)
    return {"run": run, "state": state, "pace": going, "bottleneck": advice}


def quick_counts(engine: sa.Engine, run: RunRow) -> dict[str, Any]:
    """Return the counts that an index holds: a second for ten million clips."""
    return {
        "labels": counts.label_counts(engine, run.id, LABELS_SHOWN),
        "errors": counts.top_errors(engine, run.id),
    }


def charts(engine: sa.Engine, run: RunRow) -> dict[str, Any]:
    """Return the charts, which read every clip of a run: seconds for ten million."""
    seconds, clips = counts.throughput(engine, run.id, TIME_BINS)
    hosts = [row for row in counts.hosts(engine, run.id) if row["failed"]]
    return {
        **quick_counts(engine, run),
        "scores": counts.score_histogram(engine, run.id, SCORE_BINS),
        "throughput": clips,
        "throughput_s": seconds,
        "hosts": sorted(hosts, key=lambda row: -row["failed"])[:LABELS_SHOWN],
    }


def inlined() -> dict[str, Any]:
    """Return the style and script of the page, and the policy that allows no other."""
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    policy = (
        "default-src 'none'; img-src data:; media-src data:;"
        f" style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    )
    return {"style": Markup(style), "script": Markup(script), "policy": policy}  # noqa: S704 - ours


def render(template: str, **values: Any) -> str:
    """Return a template filled in; all text is escaped."""
    return _environment.get_template(template).render(**values)


def colours(cards: Iterable[Card]) -> dict[str, int]:
    """Return the number of each label's colour; the labels heard for the longest have one."""
    seconds: dict[str, float] = {}
    for each in cards:
        for start_s, end_s, label, _ in each.events:
            seconds[label] = seconds.get(label, 0.0) + end_s - start_s
    longest_first = sorted(seconds, key=lambda label: -seconds[label])
    return {label: number for number, label in enumerate(longest_first[:COLOURS])}


def clock(seconds: float) -> str:
    """Return a time in a recording, such as 3:20:00."""
    return f"{seconds // 3600:.0f}:{seconds // 60 % 60:02.0f}:{seconds % 60 // 1:02.0f}"


def _digest(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) > LONGEST_META:
        return f"{text[:LONGEST_META]}…"
    return text


_environment = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters |= {
    "in_words": in_words,
    "clock": clock,
    "plain": plain,
    "thousands": lambda number: f"{number:,}",
}
_environment.globals |= {"colours": colours, "UNCERTAIN": UNCERTAIN}
