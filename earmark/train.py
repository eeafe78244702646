"""Train a head on the embeddings that a run keeps, from its list's column or its reviews."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from db import results, reviews
from db.rows import select
from earmark.core import vectors
from earmark.core.errors import UsageError
from workers.scoring import heads

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import sqlalchemy as sa

    from db.runs import RunRow

REVIEWS = "reviews"
#: Clips that must have a label, and that must not: one in each of the parts for cross-validation.
LEAST_CLIPS = PARTS = 5
#: The inverse strength of the regularisation, for unit vectors.
C = 100.0
SELECT_META = "SELECT clip_id, meta FROM results WHERE run_id = :run_id"
CARD = """# {name}

A head of Earmark: {labels} labels over the embeddings of `{model}`, by logistic regression.
Trained on the run `{run}`; cross-validated in {parts} parts, the windows of a clip in one of them.

| label | clips with it | without it | precision | recall | average precision |
|---|---|---|---|---|---|
{rows}

`earmark run YOUR_LIST --model {model} --head {name}/` hears with it, and
`earmark rescore RUN --head {name}/ --name NEW` scores a run that kept its embeddings.
"""


@dataclass(frozen=True, slots=True)
class Said:
    """Whether a label is right for a clip, or for a part of it."""

    clip_id: int
    label: str
    right: bool
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True, slots=True)
class Examples:
    """Windows with what is known of them."""

    clip_ids: np.ndarray
    spans: np.ndarray
    #: Shape (windows, dimensions).
    vectors: np.ndarray

    def truth(self, said: Iterable[Said]) -> np.ndarray:
        """Return for each window whether a label is right: 1, 0, or -1 if nobody said."""
        truth = np.full(len(self.clip_ids), -1, np.int8)
        for each in said:
            first, end = np.searchsorted(self.clip_ids, [each.clip_id, each.clip_id + 1])
            starts, ends = self.spans[first:end].T
            low, high = each.start_s or 0.0, each.end_s or np.inf
            truth[first:end][(starts < high) & (ends > low)] = each.right
        return truth


def train(
    engine: sa.Engine, run: RunRow, labels_from: str, folder: Path
) -> Iterator[dict[str, Any]]:
    """Train a head, write it, and return how well it does for each label.

    Args:
        labels_from: `reviews`, or a column of the list.

    Raises:
        UsageError: the run keeps no embeddings, or there is nothing to learn from.
    """
    results.embeddings(engine, run)
    said = _reviewed(engine, run) if labels_from == REVIEWS else _listed(engine, run, labels_from)
    examples = _examples(engine, run, {each.clip_id for each in said})
    rows, learnt = [], {}
    for label in sorted({each.label for each in said if each.right}):
        truth = examples.truth(each for each in said if each.label == label)
        row, weights = _learn(examples, truth)
        rows.append({"label": label, **row})
        if weights is not None:
            learnt[label] = weights
    if not learnt:
        raise UsageError(
            reason=f"Nothing can be learnt from {labels_from}: a label needs {LEAST_CLIPS} clips"
            f" that have it and {LEAST_CLIPS} that do not."
        )
    _save(engine, run, folder, learnt, rows)
    return iter(rows)


def _reviewed(engine: sa.Engine, run: RunRow) -> list[Said]:
    said = []
    for row in reviews.reviews(engine, run.id):
        if row["verdict"] != "unsure":
            right = row["verdict"] == "right"
            said.append(Said(row["clip_id"], row["label"], right, row["start_s"], row["end_s"]))
    return said


def _listed(engine: sa.Engine, run: RunRow, column: str) -> list[Said]:
    """Return what a column says: a label, or a list of them, is all that is in the clip."""
    named: dict[int, list[str]] = {}
    for row in select(engine, SELECT_META, run_id=run.id):
        meta = row["meta"]
        value = (json.loads(meta) if isinstance(meta, str) else meta or {}).get(column)
        if value not in (None, "", []):
            named[row["clip_id"]] = list(map(str, value if isinstance(value, list) else [value]))
    labels = {label for has in named.values() for label in has}
    return [
        Said(clip_id, label, label in has) for clip_id, has in named.items() for label in labels
    ]


def _examples(engine: sa.Engine, run: RunRow, clip_ids: set[int]) -> Examples:
    rows = [
        row
        for some in results.vectors(engine, run_id=run.id)
        for row in some
        if row.clip_id in clip_ids
    ]
    ids = np.array([row.clip_id for row in rows], np.int64)
    spans = np.array([(row.start_s, row.end_s) for row in rows]).reshape(-1, 2)
    return Examples(ids, spans, vectors.unpack([row.vector for row in rows]))


def _learn(
    examples: Examples, truth: np.ndarray
) -> tuple[dict[str, Any], tuple[np.ndarray, float] | None]:
    """Return figures and the weights of one label; no weights if there are too few examples."""
    # Imported here because it takes a second.
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score, precision_score, recall_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    known = truth >= 0
    inputs, right, clips = examples.vectors[known], truth[known], examples.clip_ids[known]
    row = {"clips": len(set(clips[right == 1])), "without": len(set(clips[right == 0]))}
    if min(row.values()) < LEAST_CLIPS:
        return row | dict.fromkeys(("precision", "recall", "average_precision")), None
    model = LogisticRegression(C=C, class_weight="balanced", max_iter=1000)
    parts = StratifiedGroupKFold(PARTS)
    scores = cross_val_predict(
        model, inputs, right, groups=clips, cv=parts, method="predict_proba"
    )[:, 1]
    figures = {
        "precision": precision_score(right, scores >= 0.5, zero_division=0),
        "recall": recall_score(right, scores >= 0.5),
        "average_precision": average_precision_score(right, scores),
    }
    model.fit(inputs, right)
    rounded = {name: round(float(figure), 3) for name, figure in figures.items()}
    return row | rounded, (model.coef_[0], model.intercept_[0])


def _save(
    engine: sa.Engine,
    run: RunRow,
    folder: Path,
    learnt: dict[str, tuple[np.ndarray, float]],
    rows: list[dict[str, Any]],
) -> None:
    weight = np.stack([weights for weights, _ in learnt.values()]).astype(np.float32)
    bias = np.array([intercept for _, intercept in learnt.values()], np.float32)
    made_by = results.made_by(engine, run)
    head = heads.Head(tuple(learnt), weight, bias, made_by["sha256"])
    heads.save(folder, head, {"made_by": made_by, "figures": rows})
    lines = ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    facts = {"name": folder.name, "labels": len(learnt), "model": run.options.model}
    card = CARD.format(**facts, run=run.name, parts=PARTS, rows="\n".join(lines))
    (folder / "README.md").write_text(card, encoding="utf-8")
