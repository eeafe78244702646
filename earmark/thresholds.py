"""The least score of each label from which up enough clips are right, by their reviews.

The method is Learn then Test (Angelopoulos, Bates, Candès, Jordan and Lei, 2021,
https://arxiv.org/abs/2110.01052) with fixed-sequence testing. "Too few clips from this score up are
right" is tested with the exact hypergeometric test, from high scores to low ones, each at the whole
error, until one test fails. Which scores are tested depends on the scores and the sample alone,
never on a verdict. So with the stated confidence no score is believed wrongly, however many were
tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import sqlalchemy as sa
from more_itertools import map_reduce
from scipy.special import gammaln

from db import decisions
from db.runs import RunRow
from db.session import fetch, fetch_column
from earmark.core.errors import UsageError
from earmark.sampling import Clips, sample

#: The chance that a threshold's promise is wrong.
ERROR = 0.05
#: Testing begins where this share of the sample lies above: higher up, one wrong review of a few
#: would end it.
BEGIN = 0.25
#: More reviews than these are not asked for, and they are counted from so many scores up.
MOST_MORE, SCORES = 2000, 50


def thresholds(
    engine: sa.Engine, run: RunRow, precision: float, *, looks: int = 1
) -> Iterator[dict[str, Any]]:
    """Find the threshold of each reviewed label, keep it with the run, and yield it.

    Args:
        looks: how often reviews of a label may be looked at; each look takes its share of the
            error, and one too many is subtracted from the confidence that is stated.

    Raises:
        UsageError: there are no reviews of clips that were drawn at random.
    """
    rows = fetch(engine, decisions.SELECT_DRAWN, run_id=run.id)
    drawn = map_reduce(rows, lambda row: row.label)
    if not drawn:
        raise UsageError(
            reason=f"No clip of {run.name} was drawn at random and reviewed: `earmark review"
            f" {run.name}` does it."
        )
    for each in drawn:
        about = {"run_id": run.id, "label": each}
        clips = Clips.of(fetch(engine, decisions.SELECT_CLIPS, **about))
        if not len(clips.ids):
            continue  # it is the best label of no clip any more
        right = fetch_column(engine, decisions.SELECT_RIGHT, **about)
        heard = [tuple(row[1:]) for row in drawn[each]]
        drawn_here = sample(clips, heard, right)
        found = find(clips, *drawn_here, precision, ERROR / looks)
        row = {"label": each, "precision": precision, **found}
        confidence = decisions.keep(engine, run.id, row, ERROR / looks * row.pop("tested"))
        needed = {"more": 0, "more_from": None}
        if found["min_score"] is None:
            needed = missing(clips, *drawn_here, precision, ERROR / looks)
        yield row | {"confidence": confidence} | needed


def sentence(found: dict[str, Any]) -> str:
    """Say what a label's reviews allow, or how many more it needs."""
    label = found["label"]
    if found["min_score"] is not None:
        return (
            f"{label}: {found['clips']:,} clips from {found['min_score']:.3f} up; at least"
            f" {found['precision']:.0%} of them are right, at {found['confidence']:.0%} confidence."
        )
    if found["more"] is None:
        return f"{label}: too few are right at every score. More reviews are not likely to help."
    return (
        f"{label}: needs {found['more']:,} more reviews at least, from {found['more_from']:.3f} up,"
        " all of them right."
    )


def find(
    clips: Clips, reviews: np.ndarray, wrong: np.ndarray, precision: float, error: float
) -> dict[str, Any]:
    """Return the lowest score from which up the share of right clips is at least `precision`.

    If there is none, the counts are of all clips.
    """
    at = _candidates(clips, reviews)
    allowed = allowed_wrong(at + 1, reviews[at], precision, error)
    tested = at[_tested(allowed, reviews[at])]
    passed = int(np.cumprod(wrong[tested] <= allowed[np.isin(at, tested)]).sum())
    last, min_score = len(clips.ids) - 1, None
    if passed:
        last = tested[passed - 1]
        min_score = float(clips.scores[last])
    return {
        "min_score": min_score,
        "clips": int(last) + 1,
        "reviews": int(reviews[last]),
        "right": int(reviews[last] - wrong[last]),
        "tested": len(tested) > 0,
    }


def missing(
    clips: Clips, reviews: np.ndarray, wrong: np.ndarray, precision: float, error: float
) -> dict[str, Any]:
    """Return how many more reviews suffice, all of them right, and from which score up."""
    at = _candidates(clips, reviews)
    needs = []
    at = at[reviews[at] >= BEGIN * reviews.max(initial=0)]
    for place in at[:: len(at) // SCORES + 1]:
        more = _more(place + 1, reviews[place], wrong[place], precision, error)
        needs.append((more, int(place)))
    more, place = min(needs, default=(np.inf, -1))
    if more == np.inf:
        return {"more": None, "more_from": None}
    return {"more": int(more), "more_from": float(clips.scores[place])}


def _candidates(clips: Clips, reviews: np.ndarray) -> np.ndarray:
    # Clips of one score are believed together, and only what is reviewed changes what is known.
    at = np.flatnonzero(np.diff(clips.scores, append=np.nan) != 0)
    candidates: np.ndarray = at[(np.diff(reviews[at], prepend=0) > 0) | (at == len(clips.ids) - 1)]
    return candidates


def _tested(allowed: np.ndarray, reviews: np.ndarray) -> np.ndarray:
    """Return which scores are tested: each at which one more wrong review is allowed, the last."""
    high = np.maximum.accumulate(np.where(reviews < BEGIN * reviews.max(initial=0), -1, allowed))
    steps = np.diff(high, prepend=-1) > 0
    steps[-1:] |= allowed[-1:] >= 0
    return np.flatnonzero(steps)


def _more(clips: int, reviews: int, wrong: int, precision: float, error: float) -> float:
    most = min(clips, reviews + MOST_MORE)
    if wrong > (1 - precision) * most:
        return np.inf
    sizes = np.arange(reviews + 1, most + 1)
    chance = _chance(np.full(len(sizes), clips), sizes, precision, wrong)
    enough = np.flatnonzero(chance[:, -1] <= error)
    return int(enough[0]) + 1 if len(enough) else np.inf


def allowed_wrong(
    clips: np.ndarray, reviews: np.ndarray, precision: float, error: float
) -> np.ndarray:
    """Return how many reviews may be wrong; -1 where there are too few reviews."""
    most = int((1 - precision) * reviews.max(initial=0))
    allowed: np.ndarray = (_chance(clips, reviews, precision, most) <= error).sum(axis=1) - 1
    return allowed


def _chance(clips: np.ndarray, reviews: np.ndarray, precision: float, most: int) -> np.ndarray:
    """Return the chance that of so many reviews at most 0, 1, ... `most` are wrong.

    That is if the clips are a little worse than promised.
    """
    bad = np.floor((1 - precision) * clips + 1e-9) + 1
    of, bad, drawn, wrong = clips[:, None], bad[:, None], reviews[:, None], np.arange(most + 1)
    logs = _choose(bad, wrong) + _choose(of - bad, drawn - wrong) - _choose(of, drawn)
    chance: np.ndarray = np.cumsum(np.exp(logs), axis=1)
    return chance


def _choose(of: np.ndarray, taken: np.ndarray) -> np.ndarray:
    possible = (taken >= 0) & (taken <= of)
    kept = np.where(possible, taken, 0)
    ways = gammaln(of + 1) - gammaln(kept + 1) - gammaln(of - kept + 1)
    return np.where(possible, ways, -np.inf)
