"""The least score of each label from which up enough clips are right, by their reviews.

The method is Learn then Test (Angelopoulos, Bates, Candès, Jordan and Lei, 2021,
https://arxiv.org/abs/2110.01052) with fixed-sequence testing. "Too few clips from this score up are
right" is tested with the exact hypergeometric test, from high scores to low ones, each at the whole
error, until one test fails. Which scores are tested depends on the scores and the sample alone,
never on a verdict. So with the stated confidence no score is believed wrongly, however many were
tried.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from more_itertools import map_reduce
from scipy.special import gammaln

from db import decisions
from earmark.core.errors import UsageError
from earmark.sampling import Clips, sample

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sqlalchemy as sa

    from db.runs import RunRow

#: The chance that a threshold's promise is wrong.
ERROR = 0.05
#: Testing begins where this share of the sample lies above: higher up, one wrong review of a few
#: would end it.
BEGIN = 0.25
#: More reviews than these are not asked for.
MOST_MORE = 2000


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
    rows = decisions.rows(engine, decisions.SELECT_DRAWN, run_id=run.id)
    drawn = map_reduce(rows, lambda row: row.label)
    if not drawn:
        raise UsageError(
            reason=f"No clip of {run.name} was drawn at random and reviewed: `earmark review"
            f" {run.name}` does it."
        )
    for each in drawn:
        about = {"run_id": run.id, "label": each}
        clips = Clips.of(decisions.rows(engine, decisions.SELECT_CLIPS, **about))
        right = [row[0] for row in decisions.rows(engine, decisions.SELECT_RIGHT, **about)]
        heard = [tuple(row[1:]) for row in drawn[each]]
        found = find(clips, *sample(clips, heard, right), precision, ERROR / looks)
        more, tested = found.pop("more"), found.pop("tested")
        row = {"label": each, "precision": precision, **found}
        confidence = decisions.keep(engine, run.id, row, ERROR / looks * tested)
        yield row | {"confidence": confidence, "more": more}


def sentence(found: dict[str, Any]) -> str:
    """Say what a label's reviews allow, or how many more it needs."""
    label = found["label"]
    if found["min_score"] is not None:
        return (
            f"{label}: {found['clips']:,} clips from {found['min_score']:.3f} up; at least"
            f" {found['precision']:.0%} of them are right, at {found['confidence']:.0%} confidence."
        )
    if found["more"] is None:
        return f"{label}: too few are right. More reviews are not likely to help."
    return f"{label}: needs {found['more']:,} more reviews at least, all of them right."


def find(
    clips: Clips, reviews: np.ndarray, wrong: np.ndarray, precision: float, error: float
) -> dict[str, Any]:
    """Return the lowest score from which up the share of right clips is at least `precision`.

    If there is none, the counts are of the score that was tested in vain, and `more` is how many
    reviews are needed at least.
    """
    # Clips of one score are believed together, and only what is reviewed changes what is known.
    at = np.flatnonzero(np.diff(clips.scores, append=np.nan) != 0)
    at = at[(np.diff(reviews[at], prepend=0) > 0) | ((at == at.max(initial=0)) & (reviews[at] > 0))]
    counts, sizes, wrongs = at + 1, reviews[at], wrong[at]
    allowed = allowed_wrong(counts, sizes, precision, error)
    tested = _tested(allowed, sizes)
    passed = int(np.cumprod(wrongs[tested] <= allowed[tested]).sum())
    last = tested[max(passed - 1, 0)] if len(tested) else len(at) - 1
    facts = [(len(clips.ids), 0, 0), *zip(counts, sizes, wrongs, strict=True)][last + 1]
    count, size, bad = map(int, facts)
    return {
        "min_score": float(clips.scores[count - 1]) if passed else None,
        "clips": count,
        "reviews": size,
        "right": size - bad,
        "more": 0 if passed else _more(count, size, bad, precision, error),
        "tested": len(tested) > 0,
    }


def _tested(allowed: np.ndarray, reviews: np.ndarray) -> np.ndarray:
    """Return which scores are tested: each at which one more wrong review is allowed, the last."""
    high = np.maximum.accumulate(np.where(reviews < BEGIN * reviews.max(initial=0), -1, allowed))
    steps = np.diff(high, prepend=-1) > 0
    steps[-1:] |= allowed[-1:] >= 0
    return np.flatnonzero(steps)


def _more(clips: int, reviews: int, wrong: int, precision: float, error: float) -> int | None:
    sizes = np.arange(reviews + 1, min(clips, reviews + MOST_MORE) + 1)
    chance = _chance(np.full(len(sizes), clips), sizes, precision, wrong)
    enough = np.flatnonzero(chance[:, -1] <= error)
    return int(enough[0]) + 1 if len(enough) else None


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
