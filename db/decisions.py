"""What thresholds and evaluations read of a run, and the thresholds it has."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from db.rows import Rows, select
from db.session import execute, writing

#: The truth that reviews are, and the label of a clip for which they name none.
REVIEWS, OTHER = "reviews", "(another)"
SELECT_CLIPS = """
SELECT c.id, c.score FROM clips c JOIN labels l ON l.id = c.label_id
WHERE c.run_id = :run_id AND c.state = 'done' AND l.name = :label
"""
SELECT_DRAWN = """
SELECT DISTINCT label, clip_id, sample_low, sample_high FROM review_log
WHERE run_id = :run_id AND sample_low IS NOT NULL AND verdict <> 'shown' ORDER BY label
"""
SELECT_RIGHT = """
SELECT clip_id FROM reviews WHERE run_id = :run_id AND label = :label AND verdict = 'right'
AND start_s IS NULL AND channel IS NULL
"""
#: A look that ends in a new claim takes from the confidence of what is claimed.
INSERT_THRESHOLD = """
INSERT INTO thresholds AS t
(run_id, label, "precision", confidence, min_score, clips, reviews, "right", at)
VALUES (:run_id, :label, :precision, 1 - :error, :min_score, :clips, :reviews, :right, {now})
ON CONFLICT (run_id, label) DO UPDATE SET
confidence = t.confidence - CASE
  WHEN excluded."precision" = t."precision" AND excluded.reviews = t.reviews
       AND excluded."right" = t."right" AND excluded.min_score {same} t.min_score
       AND t.confidence < 1 THEN 0 ELSE :error END,
"precision" = excluded."precision", min_score = excluded.min_score, clips = excluded.clips,
reviews = excluded.reviews, "right" = excluded."right", at = excluded.at
RETURNING confidence
"""
SELECT_LISTED = """
SELECT id, label_id, label_ids, scores, CAST(meta ->> CAST(:truth AS text) AS text) AS truth
FROM clips WHERE run_id = :run_id AND state = 'done' AND meta ->> CAST(:truth AS text) IS NOT NULL
"""
SELECT_REVIEWED = """
SELECT c.id, c.label_id, c.label_ids, c.scores, v.truth
FROM clips c JOIN (
  SELECT clip_id, coalesce(max(CASE WHEN verdict = 'right' THEN label END), '(another)') AS truth
  FROM reviews WHERE run_id = :run_id AND verdict <> :truth AND verdict <> 'unsure'
  AND start_s IS NULL AND channel IS NULL GROUP BY clip_id
) v ON v.clip_id = c.id
WHERE c.state = 'done'
"""
#: The clips behind a cell of the confusion matrix, or behind all; the truths are put in.
SELECT_CELL = """
SELECT r.clip_id, r.uri, e.truth, coalesce(r.label, '') AS label, r.score
FROM ({truths}) e JOIN results r ON r.clip_id = e.id
WHERE :every = 1 OR (e.truth = :true AND coalesce(r.label, '') = :label)
ORDER BY r.score DESC, r.clip_id
"""
SELECT_LABELS = """
SELECT l.id, l.name FROM labels l JOIN runs r ON r.model_id = l.model_id WHERE r.id = :run_id
"""


def keep(engine: sa.Engine, run_id: int, found: dict[str, Any], error: float) -> float:
    """Keep a label's threshold in place of the one before; return the confidence that is left."""
    with writing(engine) as connection:
        kept = execute(connection, INSERT_THRESHOLD, run_id=run_id, error=error, **found)
        return float(kept.scalar_one())


def truths(engine: sa.Engine, run_id: int, truth: str) -> Rows:
    """Return the clips that are done and have a truth, in a column of the list or by reviews."""
    return select(engine, _statement(truth), run_id=run_id, truth=truth)


def cell(engine: sa.Engine, run_id: int, truth: str, true: str | None, label: str = "") -> Rows:
    """Return the clips with a truth and a best label, the best first; of None, all."""
    statement = SELECT_CELL.format(truths=_statement(truth))
    values = {"truth": truth, "every": int(true is None), "true": true or "", "label": label}
    return select(engine, statement, run_id=run_id, **values)


def _statement(truth: str) -> str:
    return SELECT_REVIEWED if truth == REVIEWS else SELECT_LISTED
