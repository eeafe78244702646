"""The scores of a window in, its best labels out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from earmark.core import clips, errors

#: A window's best labels, ranked on the device: the best first, equal scores in label order.
BEST = np.dtype([("label", np.int32), ("score", np.float32)])


class Embedded(NamedTuple):
    """The outcome of a window whose embedding is wanted too."""

    scores: np.ndarray
    #: As `earmark.core.vectors` reads it.
    vector: bytes


#: Of a window: its scores, shape (labels,), or its BEST labels, or these with its embedding.
Outcome = np.ndarray | Embedded | errors.ClipError


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
