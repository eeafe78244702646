"""Loaders with clips of a test's own, and a queue that a test looks into."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from earmark.core.clips import MIX
from earmark.core.settings import Settings
from workers.loading.cutter import Shape
from workers.loading.process import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from earmark.core.clips import Part
    from workers.loading.loaders import Loaders
    from workers.loading.process import Dealt, Facts, LoadedWindow

SHAPE = Shape(sample_rate=8000, size=8000, hop=8000, least=1)
WAIT_S = 60


def until(happened: Callable[[], object]) -> None:
    """Wait for something that happens soon, even on a busy machine."""
    give_up = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.01)


@dataclass(eq=False)
class Clip:
    """A clip that notes what it hears."""

    clip_id: int
    uri: str
    part: Part | None = None
    deals: list[Dealt] = field(default_factory=list)
    facts: Facts | None = None
    end: Any = None
    windows: list[LoadedWindow] = field(default_factory=list)
    scores: list[Any] = field(default_factory=list)

    def begin(self, dealt: Dealt) -> None:
        self.deals.append(dealt)
        self.windows, self.scores, self.facts = [], [], None

    def decoded(self, dealt: Dealt, facts: Facts) -> None:
        assert dealt is self.deals[-1]
        self.facts = facts

    def ended(self, dealt: Dealt, end: Any) -> None:
        assert dealt is self.deals[-1]
        self.end = end

    def scored(self, window: LoadedWindow, outcome: Any) -> None:
        assert window.dealt is self.deals[-1]
        self.windows.append(window)
        self.scores.append(outcome)

    @property
    def is_done(self) -> bool:
        return self.facts is not None and len(self.scores) == self.facts.windows


class Queue:
    """Holds windows until a test scores them: the score is a copy of the samples."""

    def __init__(self) -> None:
        self.waiting: list[LoadedWindow] = []
        self.lock = threading.Lock()

    def put(self, windows: list[LoadedWindow]) -> list[LoadedWindow]:
        with self.lock:
            self.waiting += windows
        return []

    def take_back(self, _clips: Iterable[Any]) -> list[LoadedWindow]:
        with self.lock:
            unwanted = [window for window in self.waiting if not window.dealt.wanted]
            self.waiting = [window for window in self.waiting if window.dealt.wanted]
        return unwanted

    def score(self, loaders: Loaders, most: int = 1000) -> int:
        with self.lock:
            windows, self.waiting = self.waiting[:most], self.waiting[most:]
        queued = [SimpleNamespace(tag=window) for window in windows]
        loaders.scored(queued, [window.samples.copy() for window in windows])
        return len(windows)


def score_all(loaders: Loaders, queue: Queue, clips: list[Clip]) -> None:
    """Score windows as they come, until every clip is done."""

    def all_done() -> bool:
        queue.score(loaders)
        return all(clip.is_done for clip in clips)

    until(all_done)


def deal(loaders: Loaders, job: Job, clips: Iterable[Clip]) -> None:
    loaders.deal((clip, job) for clip in clips)


def settings_for(folder: Path, database_url: str, **groups: dict[str, Any]) -> Settings:
    """Return settings for files of a folder, without a broker that answers."""
    defaults: dict[str, dict[str, Any]] = {
        "database": {"url": database_url},
        "broker": {"url": "redis://127.0.0.1:1/0"},
        "fetch": {"file_roots": [folder], "allow_networks": ["127.0.0.0/8"]},
        "worker": {"loaders": 1, "decoders": 1},
    }
    for name, values in groups.items():
        defaults[name] = {**defaults.get(name, {}), **values}
    return Settings().changed(**defaults)


def job(
    shape: Shape = SHAPE,
    run_id: int = 1,
    *,
    channels: int = MIX,
    joins: bool = False,
    held: bool = False,
) -> Job:
    return Job(run_id, shape, by_url=False, channels=channels, joins=joins, held=held)
