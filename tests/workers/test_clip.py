"""The scores of a clip's windows: combined as they come, and begun anew with each deal."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from db.claims import Claimed
from earmark.core.clips import Failure, Source, Success, Timings
from earmark.core.errors import OutOfMemory
from earmark.core.options import RunOptions
from tests.db.builders import FACTS
from workers.clip import ClipInWork, Scores
from workers.loading.cutter import Shape
from workers.loading.process import Dealt, Facts, Job, LoadedWindow
from workers.models import RunPlan
from workers.scoring.best_labels import BEST

JOB = Job(1, Shape(1000, 1000, 1000, 1), by_url=False)


class Ended:
    """A clip, and its end once it has one."""

    def __init__(self, **options: Any) -> None:
        self.ends: list[Any] = []
        plan = RunPlan(RunOptions(top_k=1, **options), None)  # type: ignore[arg-type]
        self.clip = ClipInWork(
            Claimed(7, "/a", 1, 0), plan, threading.Lock(), lambda _, end: self.ends.append(end)
        )

    def deal(self) -> Dealt:
        loader = SimpleNamespace(dealt={}, send=lambda _: None)
        dealt = Dealt(1, self.clip, JOB, loader, deaths=0)  # type: ignore[arg-type]
        self.clip.begin(dealt)
        return dealt


def facts(windows: int) -> Facts:
    return Facts(Source("ab", 5), FACTS, Timings(1.0, 2.0), windows, room_ms=50.0)


def window(dealt: Dealt, start: int) -> LoadedWindow:
    return LoadedWindow(dealt, 0, np.empty(1000, np.float32), start, 1000)


def test_windows_are_combined_and_kept_in_their_order() -> None:
    ended = Ended()
    dealt = ended.deal()
    ended.clip.scored(window(dealt, 1000), np.array([0.5, 5.5], np.float32))
    ended.clip.decoded(dealt, facts(2))
    assert ended.ends == []
    ended.clip.scored(window(dealt, 0), np.array([0.5, 1.5], np.float32))
    assert ended.ends == [None]
    success = ended.clip.success()
    assert isinstance(success, Success)
    assert [(part.start_s, part.predictions[0].score) for part in success.windows] == [
        (0.0, 1.5),
        (1.0, 5.5),
    ]
    assert (success.predictions[0].label, success.predictions[0].score) == (1, 3.5)
    assert success.timings.classify_ms >= 50.0


def test_the_best_of_a_single_window_are_the_clip_s() -> None:
    ended = Ended(min_score=0.2)
    dealt = ended.deal()
    ended.clip.decoded(dealt, facts(1))
    assert ended.clip.is_one_window
    ended.clip.scored(window(dealt, 0), np.array([(1, 0.75), (0, 0.1)], BEST))
    success = ended.clip.success()
    assert [(best.label, best.score) for best in success.predictions] == [(1, 0.75)]
    assert success.windows == ()


def test_scores_of_an_older_deal_do_not_count() -> None:
    ended = Ended()
    first = ended.deal()
    ended.clip.scored(window(first, 0), np.array([9.0, 0.0], np.float32))
    second = ended.deal()
    ended.clip.scored(window(first, 1000), np.array([9.0, 0.0], np.float32))
    ended.clip.decoded(first, facts(1))
    ended.clip.decoded(second, facts(1))
    assert ended.ends == []
    ended.clip.scored(window(second, 0), np.array([0.0, 1.0], np.float32))
    assert ended.clip.success().predictions[0].score == 1.0


def test_a_window_that_fails_ends_its_clip_once() -> None:
    ended = Ended()
    dealt = ended.deal()
    ended.clip.scored(window(dealt, 0), OutOfMemory())
    ended.clip.scored(window(dealt, 1000), OutOfMemory())
    (end,) = ended.ends
    assert isinstance(end, Failure)
    assert not dealt.wanted


@pytest.mark.parametrize(("combine", "expected"), [("mean", [0.4, 0.6]), ("max", [0.6, 0.8])])
def test_window_scores_are_combined_by_mean_or_maximum(combine: Any, expected: list[float]) -> None:
    scores = Scores(RunOptions(combine=combine, top_k=2))
    scores.add((0.0, 1.0), np.array([0.2, 0.8], np.float32))
    scores.add((1.0, 2.0), np.array([0.6, 0.4], np.float32))
    best = scores.answer().predictions
    by_label = {prediction.label: prediction.score for prediction in best}
    assert [by_label[0], by_label[1]] == pytest.approx(expected)
