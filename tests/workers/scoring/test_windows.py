"""Tests of workers/scoring/windows.py."""

from __future__ import annotations

import numpy as np
import pytest

from earmark.core import clips
from workers.scoring import windows

RATE = 1000


def spans(
    seconds: float, *, window_s: float, hop_s: float | None = None
) -> list[tuple[float, float]]:
    waveform = clips.Waveform(np.ones(round(seconds * RATE), np.float32), RATE)
    found = windows.split(waveform, window_s=window_s, hop_s=hop_s, min_samples=1)
    return [(window.start_s, window.end_s) for window in found]


def test_windows_are_adjacent_and_the_last_ends_with_the_clip() -> None:
    assert spans(25, window_s=10) == [(0, 10), (10, 20), (15, 25)]


def test_a_clip_of_whole_windows_has_no_extra_one() -> None:
    assert spans(20, window_s=10) == [(0, 10), (10, 20)]


def test_a_hop_makes_windows_overlap() -> None:
    assert spans(21, window_s=10, hop_s=5) == [(0, 10), (5, 15), (10, 20), (11, 21)]


def test_a_clip_shorter_than_a_window_is_one_window() -> None:
    assert spans(3.5, window_s=10, hop_s=1) == [(0, 3.5)]


def test_a_clip_shorter_than_the_model_takes_is_padded_with_zeros() -> None:
    waveform = clips.Waveform(np.ones(30, np.float32), RATE)
    (window,) = windows.split(waveform, window_s=10, hop_s=None, min_samples=50)
    assert window.samples.tolist() == [1] * 30 + [0] * 20
    assert window.end_s == 0.03


def test_an_hour_is_cut_without_copying_it() -> None:
    samples = np.zeros(3600 * RATE, np.float32)
    found = list(
        windows.split(clips.Waveform(samples, RATE), window_s=10, hop_s=None, min_samples=1)
    )
    assert len(found) == 360
    assert all(window.samples.base is samples for window in found)


def test_window_scores_are_combined_by_mean_or_maximum() -> None:
    scores = np.array([[0.2, 0.8], [0.6, 0.4]], np.float32)
    assert windows.combine(scores, "mean") == pytest.approx([0.4, 0.6])
    assert windows.combine(scores, "max") == pytest.approx([0.6, 0.8])


def test_top_k_is_best_first_and_equal_scores_keep_label_order() -> None:
    best = windows.top_k(np.array([0.1, 0.4, 0.1, 0.4]), 3, 0.0)
    assert [prediction.label for prediction in best] == [1, 3, 0]
    assert best[0].score == 0.4


def test_a_top_k_beyond_the_label_set_is_the_label_set() -> None:
    assert len(windows.top_k(np.array([0.3, 0.7]), 5, 0.0)) == 2


def test_predictions_below_the_minimum_score_are_left_out() -> None:
    assert [each.label for each in windows.top_k(np.array([0.3, 0.7, 0.5]), 3, 0.5)] == [1, 2]


def test_the_best_of_a_window_become_predictions_from_the_minimum_score_on() -> None:
    best = np.array([(1, 0.75), (2, 0.5), (0, 0.25)], windows.BEST)
    assert windows.predictions(best, 0.5) == (clips.Prediction(1, 0.75), clips.Prediction(2, 0.5))
    assert len(windows.predictions(best, 0.0)) == 3


def test_no_minimum_score_keeps_negative_logits() -> None:
    assert len(windows.top_k(np.array([-3.0, 2.0]), 2, 0.0)) == 2
