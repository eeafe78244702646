"""Train a head on the embeddings that a run keeps, from its list's column or its reviews."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sqlalchemy as sa
from more_itertools import always_iterable

from db import results, reviews
from db.decisions import REVIEWS
from db.rows import parsed, select
from db.runs import RunRow
from earmark import similar
from earmark.core.errors import UsageError
from earmark.core.settings import Settings
from workers.scoring import heads

if TYPE_CHECKING:
    from earmark.vector_index import Index

#: Clips that must have a label, and that must not: one in each of the parts for cross-validation.
LEAST_CLIPS = PARTS = 5
#: The inverse strength of the regularisation, for unit vectors.
C = 100.0
SELECT_META = "SELECT clip_id, meta FROM results WHERE run_id = :run_id"
FIGURES = ("precision", "recall", "average_precision")
CARD = """# {name}

A head of Earmark over the embeddings of `{model}`, trained on the run `{run}` by logistic
regression: {labels}. `head.json` has the figures of a cross-validation in {parts} parts, with all
windows of a clip in one part.
"""

#: Of a label: clips with the span in seconds that was heard, and whether the label is right.
Said = dict[str, list[tuple[int, float, float, bool]]]


def train(
    engine: sa.Engine, run: RunRow, settings: Settings, labels_from: str, folder: Path
) -> list[dict[str, Any]]:
    """Train a head and write it; return how well it does for each label.

    Args:
        labels_from: `reviews`, or a column of the list.

    Raises:
        UsageError: the run keeps no embeddings, or there is nothing to learn from.
    """
    index = similar.opened(engine, run, settings)
    said = _reviewed(engine, run) if labels_from == REVIEWS else _listed(engine, run, labels_from)
    rows, learnt = [], {}
    for label, verdicts in sorted(said.items()):
        figures, weights = _learn(index, verdicts)
        rows.append({"label": label, **figures})
        if weights is not None:
            learnt[label] = weights
    if not learnt:
        raise UsageError(
            reason=f"Nothing can be learnt from {labels_from}: a label needs {LEAST_CLIPS} clips"
            f" that have it and {LEAST_CLIPS} that do not."
        )
    made_by = results.made_by(engine, run)
    weights = np.stack(list(learnt.values())).astype(np.float32)
    head = heads.Head(
        tuple(learnt), weights[:, :-1].copy(), weights[:, -1].copy(), made_by["sha256"]
    )
    heads.save(folder, head, {"made_by": made_by, "figures": rows})
    card = {"name": folder.name, "model": run.options.model, "run": run.name, "parts": PARTS}
    text = CARD.format(**card, labels=", ".join(learnt))
    (folder / "README.md").write_text(text, encoding="utf-8")
    return rows


def _reviewed(engine: sa.Engine, run: RunRow) -> Said:
    said: Said = defaultdict(list)
    for row in reviews.reviews(engine, run.id):
        if row["verdict"] != "unsure":
            span = row["start_s"] or 0.0, row["end_s"] or np.inf
            said[row["label"]].append((row["clip_id"], *span, row["verdict"] == "right"))
    return said


def _listed(engine: sa.Engine, run: RunRow, column: str) -> Said:
    """Return what a column says: a label, or a list of them, is all that a clip has."""
    named: dict[int, list[str]] = {}
    for row in select(engine, SELECT_META, run_id=run.id):
        value = (parsed(row["meta"]) or {}).get(column)
        if value not in (None, ""):
            named[row["clip_id"]] = list(map(str, always_iterable(value, (str, dict))))
    said: Said = defaultdict(list)
    for label in set(chain.from_iterable(named.values())):
        for clip_id, labels in named.items():
            said[label].append((clip_id, 0.0, np.inf, label in labels))
    return said


def _learn(
    index: Index, verdicts: list[tuple[int, float, float, bool]]
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Return figures and the weights of one label, the bias last; None of too few examples."""
    # Imported here because it takes a second.
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score, precision_score, recall_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

    places, right = _examples(index, verdicts)
    clips = index.windows["clip_id"][places]
    row: dict[str, Any] = {"clips": len(set(clips[right])), "without": len(set(clips[~right]))}
    if min(row.values()) < LEAST_CLIPS:
        return row | dict.fromkeys(FIGURES), None
    inputs = index.vectors(places)
    model = LogisticRegression(C=C, class_weight="balanced", max_iter=1000)
    how = {"groups": clips, "cv": StratifiedGroupKFold(PARTS), "method": "predict_proba"}
    scores = cross_val_predict(model, inputs, right, **how)[:, 1]
    row["precision"] = precision_score(right, scores >= 0.5, zero_division=0)
    row["recall"] = recall_score(right, scores >= 0.5)
    row["average_precision"] = average_precision_score(right, scores)
    model.fit(inputs, right)
    rounded = {name: round(value, 3) for name, value in row.items()}
    return rounded, np.append(model.coef_[0], model.intercept_)


def _examples(
    index: Index, verdicts: list[tuple[int, float, float, bool]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the windows that were judged, and whether the label is right."""
    truth = np.full(len(index.windows), -1, np.int8)
    for clip_id, low, high, right in verdicts:
        first, end = np.searchsorted(index.windows["clip_id"], [clip_id, clip_id + 1])
        windows = index.windows[first:end]
        truth[first:end][(windows["start_s"] < high) & (windows["end_s"] > low)] = right
    places = np.flatnonzero(truth >= 0)
    return places, truth[places] == 1
