"""A waveform in, the windows a model sees out; the windows' scores in, the clip's scores and predictions out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from earmark.core import clips

if TYPE_CHECKING:
    from collections.abc import Iterator

    from earmark.core import options


def split(
    waveform: clips.Waveform, *, window_s: float, hop_s: float | None, min_samples: int
) -> Iterator[clips.Window]:
    """Yield views of the waveform, `hop_s` apart; the last one ends where the clip ends, so nothing goes unheard.

    A clip shorter than a window is one window. What is shorter than `min_samples`, the least the model can take,
    is padded with zeros at its end; `end_s` then still says where the sound ends.
    """
    rate = waveform.sample_rate
    size = max(1, round(window_s * rate))
    hop = size if hop_s is None else max(1, round(hop_s * rate))
    for start in _starts(len(waveform.samples), size=size, hop=hop):
        samples = waveform.samples[start : start + size]
        yield clips.Window(
            start / rate, (start + len(samples)) / rate, _padded(samples, min_samples)
        )


def _starts(total: int, *, size: int, hop: int) -> Iterator[int]:
    last = max(0, total - size)
    yield from range(0, last, hop)
    yield last


def _padded(samples: np.ndarray, least: int) -> np.ndarray:
    return samples if len(samples) >= least else np.pad(samples, (0, least - len(samples)))


def combine(scores: np.ndarray, how: options.Combine) -> np.ndarray:
    """Combine the scores of a clip's windows, (windows, labels), into the clip's, (labels,)."""
    combined: np.ndarray = scores.max(axis=0) if how == "max" else scores.mean(axis=0)
    return combined


def top_k(scores: np.ndarray, k: int, min_score: float) -> tuple[clips.Prediction, ...]:
    """Return the `k` best of (labels,) scores that reach `min_score`, best first; equal ones in label order.

    A `k` beyond the label set is the label set. A `min_score` of 0 keeps everything, negative logits too.
    """
    best = np.argsort(-scores, kind="stable")[:k]
    kept = best if min_score == 0 else best[scores[best] >= min_score]
    return tuple(clips.Prediction(int(label), float(scores[label])) for label in kept)
