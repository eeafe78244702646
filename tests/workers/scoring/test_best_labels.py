"""Tests of workers/scoring/best_labels.py."""

from __future__ import annotations

import numpy as np

from earmark.core import clips
from workers.scoring import best_labels


def test_top_k_is_best_first_and_equal_scores_keep_label_order() -> None:
    best = best_labels.top_k(np.array([0.1, 0.4, 0.1, 0.4]), 3, 0.0)
    assert [prediction.label for prediction in best] == [1, 3, 0]
    assert best[0].score == 0.4


def test_a_top_k_beyond_the_label_set_is_the_label_set() -> None:
    assert len(best_labels.top_k(np.array([0.3, 0.7]), 5, 0.0)) == 2


def test_predictions_below_the_minimum_score_are_left_out() -> None:
    assert [each.label for each in best_labels.top_k(np.array([0.3, 0.7, 0.5]), 3, 0.5)] == [1, 2]


def test_the_best_of_a_window_become_predictions_from_the_minimum_score_on() -> None:
    best = np.array([(1, 0.75), (2, 0.5), (0, 0.25)], best_labels.BEST)
    assert best_labels.predictions(best, 0.5) == (
        clips.Prediction(1, 0.75),
        clips.Prediction(2, 0.5),
    )
    assert len(best_labels.predictions(best, 0.0)) == 3


def test_no_minimum_score_keeps_negative_logits() -> None:
    assert len(best_labels.top_k(np.array([-3.0, 2.0]), 2, 0.0)) == 2
