"""Two runs over the same clips: where their best labels agree, and which clips changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import sqlalchemy as sa

from db.rows import Rows, select
from db.runs import RunRow
from db.session import fetch

#: Clips with one key have one URI, span and channel. This is one pass over both runs, in the order
#: of the first one's rows, which is the second one's too if their lists are the same.
SELECT_PAIRS = """
SELECT la.name AS label_a, lb.name AS label_b, pairs.clips
FROM (
  SELECT a.label_id AS id_a, b.label_id AS id_b, count(*) AS clips
  FROM clips a {in_run_order}
  JOIN clips b ON b.run_id = :b AND b.uri_key = a.uri_key
  WHERE a.run_id = :a AND a.state = 'done' AND b.state = 'done'
  GROUP BY 1, 2
) pairs
LEFT JOIN labels la ON la.id = pairs.id_a
LEFT JOIN labels lb ON lb.id = pairs.id_b
"""
SELECT_CHANGED = """
SELECT a.id AS clip_id, coalesce(a.display_uri, a.uri) AS uri, a.start_s, a.end_s, a.channel,
       a.member, la.name AS label_a, a.score AS score_a, lb.name AS label_b, b.score AS score_b,
       coalesce(a.score, 0) + coalesce(b.score, 0) AS change
FROM clips a {in_run_order}
JOIN clips b ON b.run_id = :b AND b.uri_key = a.uri_key
LEFT JOIN labels la ON la.id = a.label_id
LEFT JOIN labels lb ON lb.id = b.label_id
WHERE a.run_id = :a AND a.state = 'done' AND b.state = 'done' AND NOT la.name {same} lb.name
ORDER BY change DESC, clip_id
"""
LABEL_COLUMNS = ("label", "clips_a", "clips_b", "both", "lost", "gained")
CHANGE_COLUMNS = ("label_a", "label_b", "clips")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two runs made of the clips that are done in both, counted by pairs of labels."""

    engine: sa.Engine
    a: RunRow
    b: RunRow
    #: (label_a, label_b, clips).
    pairs: Sequence[sa.Row[Any]]

    @property
    def clips(self) -> int:
        return sum(pair.clips for pair in self.pairs)

    @property
    def agreement(self) -> float:
        """The share of the clips that have one best label in both runs."""
        same = sum(pair.clips for pair in self.pairs if pair.label_a == pair.label_b)
        return same / self.clips if self.clips else 1.0

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """The options that differ, which may be why the results do."""
        ours, theirs = asdict(self.a.options), asdict(self.b.options)
        return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}

    def labels(self) -> Rows:
        """Return how often each label came first in each run, those that changed most first."""
        before, after, both = Counter[str | None](), Counter[str | None](), Counter[str | None]()
        for pair in self.pairs:
            before[pair.label_a] += pair.clips
            after[pair.label_b] += pair.clips
            if pair.label_a == pair.label_b:
                both[pair.label_a] += pair.clips
        rows = []
        for label in before | after:
            a, b, same = before[label], after[label], both[label]
            rows.append((label, a, b, same, a - same, b - same))
        rows.sort(key=lambda row: (-row[4] - row[5], -row[1]))
        return Rows(chain([LABEL_COLUMNS], rows))

    def changes(self) -> Rows:
        """Return which label became which other one, the most frequent change first."""
        pairs = [pair for pair in self.pairs if pair.label_a != pair.label_b]
        pairs.sort(key=lambda pair: -pair.clips)
        return Rows(chain([CHANGE_COLUMNS], pairs))

    def changed(self) -> Rows:
        """Return the clips with another best label, those with the highest two scores first."""
        return select(self.engine, SELECT_CHANGED, a=self.a.id, b=self.b.id)


def compare(engine: sa.Engine, a: RunRow, b: RunRow) -> Comparison:
    """Compare the clips that are done in two runs, by one statement that reads each clip once."""
    return Comparison(engine, a, b, fetch(engine, SELECT_PAIRS, a=a.id, b=b.id))
