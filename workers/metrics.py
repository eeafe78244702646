"""The counters of a worker, for Prometheus: clips, errors, bytes, seconds per stage, batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram

from earmark.core.clips import Failure, Outcome

if TYPE_CHECKING:
    from collections import Counter as Counts


_clips = Counter(
    "earmark_clips",
    "Clips by outcome: done, failed, retried, or lost with their lease.",
    ["outcome"],
)
_errors = Counter("earmark_errors", "Tries that ended with an error, by its code.", ["code"])
_audio = Counter("earmark_audio_seconds", "Seconds of audio classified.")
_bytes = Counter("earmark_fetched_bytes", "Bytes of the clips fetched.")
_stages = Counter(
    "earmark_stage_seconds", "Seconds that clips spent in a stage, with its waits.", ["stage"]
)
_wait = Counter(
    "earmark_decoder_wait_seconds", "Seconds of the stage decode that clips waited for a decoder."
)
_model_wait = Counter(
    "earmark_model_wait_seconds", "Seconds of the stage classify that windows waited for a lane."
)
_model = Counter("earmark_model_seconds", "Seconds that the lanes of the model were at work.")
_batches = Histogram(
    "earmark_batch_windows", "Windows in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64)
)

decoder_wait = _wait.inc


def batch(windows: int, waited_s: float, seconds: float) -> None:
    """Count a batch that the model has scored, with the sum of its windows' waits."""
    _batches.observe(windows)
    _model_wait.inc(waited_s)
    _model.inc(seconds)


def chunk(counts: Counts[str], outcomes: Sequence[Outcome], stages: Mapping[str, float]) -> None:
    """Count the outcomes of a chunk, and the seconds of its stages."""
    for name, clips in counts.items():
        _clips.labels(name).inc(clips)
    for stage, seconds in stages.items():
        _stages.labels(stage).inc(seconds)
    fetched, audio_s = 0, 0.0
    for outcome in outcomes:
        if outcome.source:
            fetched += outcome.source.bytes
        if isinstance(outcome, Failure):
            _errors.labels(outcome.error.code).inc()
        elif not (outcome.reused or outcome.unheard):
            audio_s += outcome.facts.duration_s
    _bytes.inc(fetched)
    _audio.inc(audio_s)


def stage_seconds(outcomes: Sequence[Outcome], store_s: float) -> dict[str, float]:
    """Return the seconds that the clips of a chunk spent in each stage."""
    seconds = {"fetch": 0.0, "decode": 0.0, "classify": 0.0, "store": store_s}
    for outcome in outcomes:
        seconds["fetch"] += outcome.timings.fetch_ms / 1000
        seconds["decode"] += outcome.timings.decode_ms / 1000
        seconds["classify"] += outcome.timings.classify_ms / 1000
    return seconds
