"""Events: when each label is heard, joined out of windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from db import results, runs
from earmark.events import Rule, events, join
from tests.db.builders import two_runs

if TYPE_CHECKING:
    import sqlalchemy as sa


def siren(*scores: float, hop_s: float = 1.0, channel: int | None = None) -> list[dict[str, Any]]:
    """Return the windows of one second that have these scores; 0 is for none."""
    windows = []
    for number, score in enumerate(scores):
        start_s = number * hop_s
        if score:
            windows.append(
                {"channel": channel, "label": "siren", "start_s": start_s, "end_s": start_s + 1.0,
                 "score": score}
            )  # fmt: skip
    return windows


def spans(windows: list[dict[str, Any]], rule: Rule) -> list[tuple[float, float]]:
    return [(event["start_s"], event["end_s"]) for event in join(windows, rule)]


def test_windows_that_touch_or_overlap_are_one_event_at_its_peak() -> None:
    [event] = join(siren(0.6, 0.9, 0.7, hop_s=0.5), Rule(0.5, 0.5))
    assert (event["start_s"], event["end_s"], event["score"], event["windows"]) == (0, 2, 0.9, 3)


def test_an_event_needs_the_high_score_once_and_goes_on_down_to_the_low_one() -> None:
    scores = (0.3, 0.8, 0.4, 0, 0.3, 0.4)
    assert spans(siren(*scores), Rule(0.5, 0.3)) == [(0, 3)]


@pytest.mark.parametrize(("gap_s", "expected"), [(1.9, [(0, 1), (3, 4)]), (2.0, [(0, 4)])])
def test_a_gap_is_closed_up_to_its_length(
    gap_s: float, expected: list[tuple[float, float]]
) -> None:
    assert spans(siren(0.8, 0, 0, 0.8), Rule(0.5, 0.5, gap_s)) == expected


def test_labels_and_channels_have_events_of_their_own() -> None:
    left, right = siren(0.8, 0.8, channel=1), siren(0.8, channel=2)
    dog = [{**window, "label": "dog"} for window in left]
    windows = sorted([*left, *right, *dog], key=lambda window: float(window["start_s"]))
    found = join(windows, Rule(0.5, 0.5))
    sounds = sorted((event["label"], event["channel"], event["windows"]) for event in found)
    assert sounds == [("dog", 1, 2), ("siren", 1, 2), ("siren", 2, 1)]


def test_a_label_is_heard_where_another_is_louder(engine: sa.Engine) -> None:
    two_runs(engine)
    run = runs.find_run(engine, "march")
    found = list(events(engine, run, Rule(0.1, 0.1), label="rain"))
    assert [(event["start_s"], event["end_s"], event["windows"]) for event in found] == [
        (0.0, 16.0, 4),
        (0.0, 4.0, 1),
        (0.0, 4.0, 1),
    ]


def test_results_of_a_label_at_any_rank(engine: sa.Engine) -> None:
    two_runs(engine)
    run_id = runs.find_run(engine, "march").id
    first = results.results(engine, run_id, label="dog")
    assert list(first) == []
    rows = list(results.results(engine, run_id, label="dog", rank=2, min_score=0.35))
    assert [(row["uri"][-5:], row["label"], row["rank"]) for row in rows] == [("1.wav", "dog", 2)]
    assert rows[0]["meta"] in ({"city": "Oslo"}, '{"city": "Oslo"}')
