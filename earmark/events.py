"""Sound events: stretches of a recording in which a label is heard, joined out of windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import sqlalchemy as sa

from db import results
from db.rows import Rows
from db.runs import RunRow

COLUMNS = (
    "clip_id", "uri", "member", "channel", "label", "start_s", "end_s", "score", "windows",
)  # fmt: skip
#: Windows touch if they are this near: their times are sums of binary fractions.
TOUCHING_S = 1e-3


@dataclass(frozen=True, slots=True)
class Rule:
    """When a label is heard: the double threshold of sound event detection, and the gaps to close.

    An event is a stretch of windows of at least `low`, one of them of at least `min_score`. Two
    stretches with at most `gap_s` seconds between them are one event. Source: Dinkel, Wu and Yu,
    "Towards Duration Robust Weakly Supervised Sound Event Detection", IEEE/ACM TASLP 29, 2021.
    """

    min_score: float
    #: None: `min_score`.
    low: float | None = None
    gap_s: float = 0.0


def events(engine: sa.Engine, run: RunRow, rule: Rule, *, label: str | None = None) -> Rows:
    """Return the events of a run, clip by clip, in the order of their start.

    A label counts wherever it is among a window's stored labels, first or not. So a run needs a
    `top_k` as large as the number of labels that may sound at once.

    Args:
        label: only this label's events; else every label's.
    """
    low = rule.min_score if rule.low is None else rule.low
    windows = results.heard(engine, run.id, label=label, min_score=low)
    return Rows(_lines(windows, rule))


def _lines(windows: Iterable[dict[str, Any]], rule: Rule) -> Iterator[tuple[Any, ...]]:
    yield COLUMNS
    for _, clip_windows in groupby(windows, itemgetter("clip_id")):
        found = join(clip_windows, rule)
        for event in sorted(found, key=itemgetter("start_s")):
            yield tuple(event[column] for column in COLUMNS)


def join(windows: Iterable[dict[str, Any]], rule: Rule) -> list[dict[str, Any]]:
    """Return the events of one clip; its windows come in the order of their start.

    Each window is a label's: `channel`, `label`, `start_s`, `end_s` and `score`, of at least the
    rule's `low`.
    """
    events: list[dict[str, Any]] = []
    open_events: dict[tuple[int | None, str], dict[str, Any]] = {}
    for window in windows:
        sound = window["channel"], window["label"]
        event = open_events.get(sound)
        if event and window["start_s"] <= event["end_s"] + rule.gap_s + TOUCHING_S:
            event["end_s"] = max(event["end_s"], window["end_s"])
            event["score"] = max(event["score"], window["score"])
            event["windows"] += 1
        else:
            event = {**window, "windows": 1}
            open_events[sound] = event
            events.append(event)
    return [event for event in events if event["score"] >= rule.min_score]
