"""The bottleneck of a run in a sentence, by the clips that a worker has in each stage at once."""

from __future__ import annotations

from typing import Any

import pytest

from db.pace import Workload
from earmark.advice import bottleneck
from earmark.core.settings import Worker


@pytest.mark.parametrize(
    ("stages", "limits", "sentence"),
    [
        (
            (25.0, 0.05, 0.38),
            {},
            "at least 62% of the time for downloads: raise EARMARK_WORKER__CLIPS_IN_FLIGHT",
        ),
        ((25.0, 0.05, 0.38), {"concurrency": 1}, "raise --concurrency"),
        (
            (8.0, 0.05, 0.38),
            {},
            "8.0 downloads a worker at once: raise EARMARK_FETCH__HOST_CONCURRENCY",
        ),
        ((0.2, 25.0, 0.38), {}, "for decoding"),
        (
            (2.0, 0.05, 25.0),
            {},
            "92% of their time at the model: add workers, each with a device of its own, or take"
            " a faster device or a cheaper model (`earmark models` times them).",
        ),
    ],
)
def test_the_bottleneck_is_named_with_its_cure(
    stages: tuple[float, float, float], limits: dict[str, Any], sentence: str
) -> None:
    assert sentence in str(bottleneck(Workload(*stages, chunk_size=16), Worker(**limits)))


def test_a_busy_model_is_no_bottleneck_while_clips_wait_elsewhere() -> None:
    assert bottleneck(Workload(25.0, 0.05, 0.98, chunk_size=16), Worker()) is None


def test_no_bottleneck_is_named_without_a_workload() -> None:
    assert bottleneck(None, Worker()) is None
