"""Thresholds: their promise holds in 1,000 simulated reviews; they are found where possible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from earmark.sampling import Clips, sample
from earmark.thresholds import ERROR, find, missing

if TYPE_CHECKING:
    from collections.abc import Callable


PRECISION = 0.95
SIMULATIONS = 1000


def clips(scores: np.ndarray, first_id: int = 1) -> Clips:
    return Clips(np.arange(first_id, first_id + len(scores)), np.sort(scores)[::-1])


def look(of: Clips, truth: np.ndarray, counts: list[int], looks: int = 1) -> dict[str, Any]:
    """Review so many clips of each of as many strata."""
    drawn = []
    for band, count in zip(of.strata((0, 1), len(counts)), counts, strict=True):
        drawn += [(int(clip), *band) for clip in of.ids[of.drawn(band)[:count]]]
    return find(of, *sample(of, drawn, of.ids[truth]), PRECISION, ERROR / looks)


def lacks(of: Clips, truth: np.ndarray, band: tuple[float, float], count: int) -> Any:
    """Review so many clips of a band; return how many more are needed."""
    drawn = [(int(clip), *band) for clip in of.ids[of.drawn(band)[:count]]]
    return missing(of, *sample(of, drawn, of.ids[truth]), PRECISION, ERROR)["more"]


def is_wrong(found: dict[str, Any], of: Clips, truth: np.ndarray) -> bool:
    """Whether a threshold is believed from which up too few clips are right."""
    believed = of.scores >= found["min_score"] if found["min_score"] is not None else of.scores > 2
    return bool(believed.any() and truth[believed].mean() < PRECISION)


def right_below_the_promise(of: Clips, random: np.random.Generator) -> np.ndarray:
    return random.random(len(of.ids)) < 0.945


def right_by_score(of: Clips, random: np.random.Generator) -> np.ndarray:
    return random.random(len(of.ids)) < 1 - 0.1 * (1 - of.scores) ** 0.5


@pytest.mark.parametrize(
    ("truth_of", "counts", "looks"),
    [
        (right_below_the_promise, [[96]], 1),
        (right_by_score, [[60, 20, 30]], 1),
        (right_below_the_promise, [[80], [150]], 2),
    ],
    ids=["96 reviews", "strata", "two looks"],
)
def test_the_promise_holds_in_95_of_100_simulated_reviews(
    truth_of: Callable[..., np.ndarray], counts: list[list[int]], looks: int
) -> None:
    random = np.random.default_rng(7)
    broken = 0
    for number in range(SIMULATIONS):
        of = clips(np.round(random.random(700), 2), first_id=number * 1000)
        truth = truth_of(of, random)
        broken += any(is_wrong(look(of, truth, each, looks), of, truth) for each in counts)
    assert broken <= SIMULATIONS * ERROR


def test_fifty_nine_right_in_a_row_are_the_least() -> None:
    of = clips(np.linspace(0.2, 0.9, 100_000))
    every = np.ones(100_000, bool)
    assert (lacks(of, every, (0, 1), 58), look(of, every, [58])["tested"]) == (1, False)
    found = look(of, every, [59])
    assert found["min_score"] == pytest.approx(0.2, abs=0.05)
    assert (found["reviews"], found["right"]) == (59, 59)


def test_of_a_few_clips_fewer_reviews_suffice_and_all_are_certainty() -> None:
    of = clips(np.linspace(0.2, 0.9, 30))
    truth = np.ones(30, bool)
    assert look(of, truth, [30])["min_score"] == pytest.approx(0.2)
    assert lacks(of, truth, (0, 1), 20) == 3
    truth[-2:] = False
    found = look(of, truth, [30])
    assert (found["clips"], found["right"]) == (20, 20)


def test_a_label_that_is_right_above_a_score_is_believed_above_it() -> None:
    of = clips(np.linspace(0, 1, 10_000))
    found = look(of, of.scores > 0.5, [400])
    assert found["min_score"] is not None
    assert 0.45 < found["min_score"] < 0.6
    assert abs(found["clips"] - (of.scores >= found["min_score"]).sum()) == 0


def test_what_was_passed_over_counts_as_wrong_and_unreviewed_scores_are_not_believed() -> None:
    of = clips(np.linspace(0, 1, 10_000))
    drawn = [(int(clip), 0.0, 1.0) for clip in of.ids[of.drawn((0.0, 1.0))[:80]]]
    right = [clip for clip, *_ in drawn]
    assert find(of, *sample(of, drawn, right), PRECISION, ERROR)["min_score"] is not None
    some = sample(of, drawn[::2], right[::2])
    assert find(of, *some, PRECISION, ERROR)["min_score"] is None
    assert lacks(of, of.scores < 2, (0.0, 0.5), 80) == 59


def test_more_reviews_are_asked_for_where_the_fewest_are_needed() -> None:
    of = clips(np.linspace(0, 1, 10_000))
    drawn = [(int(clip), 0.0, 1.0) for clip in of.ids[of.drawn((0.0, 1.0))[:50]]]
    needed = missing(of, *sample(of, drawn, of.ids[of.scores > 0.5]), PRECISION, ERROR)
    assert needed["more_from"] == pytest.approx(0.5, abs=0.1)
    assert 25 < needed["more"] < 45
