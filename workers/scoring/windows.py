"""A waveform in, windows out; the windows' scores in, the clip's scores and predictions out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from earmark.core import clips

if TYPE_CHECKING:
    from collections.abc import Iterator

    from earmark.core import options

#: A window's best labels, ranked on the device: the best first, equal scores in label order.
BEST = np.dtype([("label", np.int32), ("score", np.float32)])


def split(
    waveform: clips.Waveform, *, window_s: float, hop_s: float | None, min_samples: int
) -> Iterator[clips.Window]:
    """Yield views of the waveform, `hop_s` apart. The last one ends where the clip ends.

    A clip shorter than a window is one window. A window shorter than `min_samples`, the least
    that the model takes, is padded with zeros at its end; its `end_s` is where the sound ends.
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
    if len(samples) >= least:
        return samples
    return np.pad(samples, (0, least - len(samples)))


def combine(scores: np.ndarray, method: options.Combine) -> np.ndarray:
    """Combine the scores of a clip's windows, (windows, labels), into the clip's, (labels,)."""
    combined: np.ndarray = scores.max(axis=0) if method == "max" else scores.mean(axis=0)
    return combined


def predictions(best: np.ndarray, min_score: float) -> tuple[clips.Prediction, ...]:
    """Return a window's BEST labels that reach `min_score`; 0 keeps all, as in `top_k`."""
    if min_score:
        best = best[best["score"] >= min_score]
    return tuple(clips.Prediction(*label_and_score) for label_and_score in best.tolist())


def top_k(scores: np.ndarray, k: int, min_score: float) -> tuple[clips.Prediction, ...]:
    """Return the `k` best of (labels,) scores that reach `min_score`, the best first.

    Equal scores are in label order. A `k` beyond the label set gives all labels. A `min_score` of
    0 keeps every score, negative logits too.
    """
    best = np.argsort(-scores, kind="stable")[:k]
    if min_score:
        best = best[scores[best] >= min_score]
    return tuple(clips.Prediction(int(label), float(scores[label])) for label in best)
