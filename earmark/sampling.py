"""The random order in which a label's clips are reviewed, and the samples that reviews are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

#: The scores among which clips are drawn, both included.
Band = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Clips:
    """The clips of a run whose best label is one label, the highest score first."""

    ids: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[tuple[int, float]]) -> Clips:
        """Return clips from rows of an id and a score."""
        table = np.array([*map(tuple, rows)], dtype=[("id", np.int64), ("score", np.float64)])
        table = table[np.argsort(-table["score"], kind="stable")]
        return cls(table["id"], table["score"])

    def drawn(self, band: Band) -> np.ndarray:
        """Return the places of a band's clips in the order in which they are drawn."""
        inside = np.flatnonzero((self.scores >= band[0]) & (self.scores <= band[1]))
        # A multiplicative hash (Knuth): the same order at each call, and none that a list knows.
        mixed = self.ids[inside].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        drawn: np.ndarray = inside[np.argsort(mixed ^ (mixed >> np.uint64(32)), kind="stable")]
        return drawn

    def strata(self, band: Band, count: int) -> list[Band]:
        """Return parts of a band, with as many clips each."""
        scores = self.scores[(self.scores >= band[0]) & (self.scores <= band[1])]
        parts = [part for part in np.array_split(scores, count) if len(part)]
        return [(float(part[-1]), float(part[0])) for part in parts]


def sample(
    clips: Clips, drawn: Iterable[tuple[int, float, float]], right: Iterable[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the size of the random sample from each clip up, and how much of it is not right.

    Scores may have been drawn from at different rates. The sample from a score up is thinned, in
    the order of drawing, to the lowest rate above it: so each clip had the same chance. A clip that
    was passed over is not right, or passing over the hard ones would pay.

    Args:
        drawn: clips that were drawn and heard, each with its band.
        right: the clips for which the label is right.
    """
    heard = defaultdict(list)
    for clip_id, low, high in drawn:
        heard[low, high].append(clip_id)
    place, reached = np.ones(len(clips.ids)), np.zeros(len(clips.ids))
    for band, ids in heard.items():
        order = clips.drawn(band)
        rates = np.arange(1, len(order) + 1) / max(1, len(order))
        highest = rates[np.isin(clips.ids[order], ids)].max(initial=0.0)
        better = reached[order] < highest
        place[order[better]], reached[order[better]] = rates[better], highest
    rate = np.minimum.accumulate(reached)
    not_right = ~np.isin(clips.ids, [*right])
    size, wrong = np.zeros(len(rate), int), np.zeros(len(rate), int)
    for each in np.unique(rate[rate > 0]):
        taken, here = place <= each, rate == each
        size[here], wrong[here] = np.cumsum(taken)[here], np.cumsum(taken & not_right)[here]
    return size, wrong
