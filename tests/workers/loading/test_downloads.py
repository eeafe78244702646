"""Clips are looked up together while the decoders are busy, and at once when they are not."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

from db import reuse
from earmark.core.clips import Source
from tests.workers.loading.world import SHAPE, until
from workers.loading import downloads
from workers.loading.clip import DealtClip
from workers.loading.process import Job


class Fetcher:
    """Gives each clip a file that has its number."""

    breaker: Any = None

    def fetch(self, uri: str, _part: Any = None) -> Any:
        return SimpleNamespace(file=io.BytesIO(), source=Source(uri, 1))

    def close(self) -> None:
        """Close nothing."""


def clips(count: int, run_id: int = 1) -> list[DealtClip]:
    made = []
    for number in range(1, count + 1):
        job = Job(run_id, SHAPE, by_url=False, channels=0)
        made.append(DealtClip(number, number, f"{number:064x}", job))
    return made


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The clips of each statement."""
    counts: list[int] = []

    def known(_engine: Any, _run_id: int, sources: dict[int, Any]) -> dict[int, int]:
        counts.append(len(sources))
        return {}

    monkeypatch.setattr(reuse, "known", known)
    monkeypatch.setattr(downloads, "check_regular", lambda _: None)
    monkeypatch.setattr(downloads, "GATHER_S", 60.0)
    return counts


@pytest.fixture
def threads() -> downloads.Downloads:
    engine: Any = None
    copies: Any = SimpleNamespace(first=lambda _: None)
    return downloads.Downloads(Fetcher(), engine, copies, 4, downloads.Bell())


def through(threads: downloads.Downloads, count: int) -> None:
    until(lambda: len(threads._through) == count)


def test_clips_wait_for_each_other_until_a_decoder_is_hungry(
    threads: downloads.Downloads, looked_up: list[int]
) -> None:
    for clip in clips(10):
        threads.begin(clip)
    until(lambda: threads._to_look_up.qsize() == 9)  # the tenth is held by the thread
    assert looked_up == []
    threads.hungry.set()
    through(threads, 10)
    assert looked_up == [10]


def test_a_clip_of_no_run_is_not_looked_up(
    threads: downloads.Downloads, looked_up: list[int]
) -> None:
    for clip in clips(2, run_id=0):
        threads.begin(clip)
    through(threads, 2)
    assert looked_up == []


def test_the_many_spans_of_a_file_are_looked_up_a_few_at_a_time(
    threads: downloads.Downloads, looked_up: list[int]
) -> None:
    first, *first.others = clips(150)
    threads.hungry.set()
    threads.begin(first)
    through(threads, 1)
    assert looked_up == [64, 64, 22]
