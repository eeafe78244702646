"""Each clip ends as one outcome, and is postponed if a host or a service is to blame."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from db.ledger import Claimed
from earmark.core.clips import AudioFacts, Failure, Postponed, Source, Success, Waveform
from earmark.core.errors import DatabaseError, NotFound
from earmark.core.options import RunOptions
from workers.decoding.pool import Decoded
from workers.fetching.fetch import Fetched
from workers.fetching.polite import HostBusyError
from workers.models import LoadedModel, RunPlan
from workers.pipeline import Pipeline

CLIP = Claimed(7, "https://h/a.wav", attempts=1, crashes=0)
SOURCE = Source("ab", 5)
FACTS = AudioFacts(duration_s=2.0, source_sample_rate=8000, channels=1, codec="pcm")


class Card:
    sample_rate = 4
    min_samples = 1

    def usable_window_s(self, asked: float | None) -> float:
        return asked or 1.0


class Fetching:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def fetch(self, uri: str, part: object = None) -> Fetched:
        if self.error:
            raise self.error
        return Fetched(io.BytesIO(b"bytes"), SOURCE)


class Decoding:
    def decode(self, file: Any, sample_rate: int) -> Decoded:
        return Decoded(Waveform(np.arange(8, dtype=np.float32), sample_rate), FACTS)


class Scoring:
    """Gives each window the mean of its samples as the score of label 1."""

    def submit(self, samples: np.ndarray, _function: str | None) -> Any:
        from concurrent.futures import Future

        future: Future[np.ndarray] = Future()
        future.set_result(np.array([0.5, float(samples.mean())]))
        return future


def classify(error: Exception | None = None, **plan: Any) -> Any:
    model = LoadedModel(Card(), Scoring(), model_id=1, label_ids=(10, 11))  # type: ignore[arg-type]
    pipeline = Pipeline(Fetching(error), Decoding(), 1)  # type: ignore[arg-type]
    return pipeline.classify(CLIP, RunPlan(RunOptions(top_k=1), model, **plan))


def test_window_scores_are_combined_and_kept() -> None:
    outcome = classify()
    assert isinstance(outcome, Success)
    assert (outcome.clip_id, outcome.source, outcome.facts) == (7, SOURCE, FACTS)
    assert [(window.start_s, window.predictions[0].score) for window in outcome.windows] == [
        (0.0, 1.5),
        (1.0, 5.5),
    ]
    assert (outcome.predictions[0].label, outcome.predictions[0].score) == (1, 3.5)


def test_bytes_with_a_result_are_not_decoded_again() -> None:
    known = Success(7, SOURCE, FACTS, (), reused=True)
    outcome = classify(
        known=lambda clip_id, source: known if (clip_id, source) == (7, SOURCE) else None
    )
    assert outcome.reused
    assert outcome.timings.decode_ms == 0.0


def test_a_clip_error_is_the_clips_outcome() -> None:
    outcome = classify(NotFound(status=404))
    assert isinstance(outcome, Failure)
    assert outcome.error.code == "not_found"


def test_an_unexpected_error_fails_one_clip_and_not_the_worker() -> None:
    outcome = classify(ZeroDivisionError("by nought"))
    assert isinstance(outcome, Failure)
    assert "by nought" in str(outcome.error)


@pytest.mark.parametrize("error", [HostBusyError(3.0), DatabaseError(reason="away")])
def test_a_busy_host_or_an_absent_database_postpones_the_clip(error: Exception) -> None:
    assert isinstance(classify(error), Postponed)


@pytest.mark.parametrize(
    "error", [DatabaseError(reason="away", bug=True), RuntimeError("the driver's own")]
)
def test_a_failed_look_up_postpones_the_clip(error: Exception) -> None:
    def known(_clip_id: int, _source: Source | None) -> None:
        raise error

    assert isinstance(classify(known=known), Postponed)
    assert isinstance(classify(known=known, reuse_urls=True), Postponed)


def test_a_look_up_whose_connection_had_ended_is_made_again() -> None:
    errors = [DatabaseError(reason="ended")]
    known = Success(7, SOURCE, FACTS, (), reused=True)

    def look_up(_clip_id: int, _source: Source | None) -> Success:
        if errors:
            raise errors.pop()
        return known

    assert classify(known=look_up).reused
