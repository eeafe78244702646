"""What a worker counts, and the small server that tells it: /metrics for Prometheus, /ready and /health."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram

from earmark.core.clips import Failure, Success

if TYPE_CHECKING:
    from collections import Counter as Counts
    from collections.abc import Sequence

    from earmark.core.clips import Outcome

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
_model = Counter("earmark_model_seconds", "Seconds that the lanes of the model were at work.")
_batches = Histogram(
    "earmark_batch_windows", "Windows in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64)
)

#: Stages that a clip's own timings tell of.
_TIMED = ("fetch", "decode", "classify")

decoder_wait = _wait.inc


def batch(windows: int, seconds: float) -> None:
    """Count a batch that the model has scored."""
    _batches.observe(windows)
    _model.inc(seconds)


def chunk(counts: Counts[str], outcomes: Sequence[Outcome], store_s: float) -> dict[str, float]:
    """Count what a chunk came to; return the seconds that its clips spent in each stage."""
    stages = {
        stage: sum(getattr(one.timings, f"{stage}_ms") for one in outcomes) / 1000
        for stage in _TIMED
    }
    stages["store"] = store_s
    for outcome, clips in counts.items():
        _clips.labels(outcome).inc(clips)
    for stage, seconds in stages.items():
        _stages.labels(stage).inc(seconds)
    for failure in outcomes:
        if isinstance(failure, Failure):
            _errors.labels(failure.error.code).inc()
    _bytes.inc(sum(one.source.bytes for one in outcomes if one.source))
    _audio.inc(
        sum(one.facts.duration_s for one in outcomes if isinstance(one, Success) and not one.reused)
    )
    return stages
