"""Evaluations agree with scikit-learn, on both databases, by column and by reviews."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import sqlalchemy as sa
from sklearn import metrics

from db import decisions, ledger, reviews, runs
from db.reviews import Review
from db.session import reading
from earmark.core import clips as words
from earmark.core.errors import UsageError
from earmark.core.options import RunOptions
from earmark.core.settings import Ledger
from earmark.evaluation import evaluate, share
from tests.db.builders import LABELS, _model, add_clips, chunk_of

if TYPE_CHECKING:
    from db.runs import RunRow

COUNT = 300


def classified(engine: sa.Engine) -> tuple[RunRow, list[str], np.ndarray]:
    """Make a run; return it, its clips' truths, and their scores (0 if not kept)."""
    random = np.random.default_rng(3)
    truth = [str(random.choice([*LABELS, "cat"])) for _ in range(COUNT)]
    run_id = ledger.open_run(engine, "birds", RunOptions(), queue="q", chunk_size=16)
    listed = [words.Clip(f"https://h/{n}", {"species": true}) for n, true in enumerate(truth)]
    add_clips(engine, run_id, listed)
    with reading(engine) as connection:
        ids = list(connection.scalars(sa.text("SELECT id FROM clips ORDER BY id")))
    claim = ledger.claim(engine, chunk_of(engine, ids), worker="w", limits=Ledger())
    scores, ended = np.zeros((COUNT, len(LABELS))), []
    for number, (clip_id, true) in enumerate(zip(ids, truth, strict=True)):
        full = np.round(random.random(3) + [0.6 * (true == label) for label in LABELS], 1)
        best = np.argsort(-full)[:2]
        scores[number, best] = full[best]
        predictions = tuple(words.Prediction(int(at), float(full[at])) for at in best)
        facts = words.AudioFacts(5.0, 44100, 1, "vorbis")
        source = words.Source(f"{number:04x}", 7)
        ended.append(words.Success(clip_id, source, facts, predictions))
    ledger.finish(engine, claim, ended, _model(engine, run_id, "m"), Ledger())
    return runs.get_run(engine, run_id), truth, scores


def test_it_agrees_with_scikit_learn(engine: sa.Engine) -> None:
    run, truth, scores = classified(engine)
    found = evaluate(engine, run, "species")
    best = [LABELS[at] for at in scores.argmax(axis=1)]
    rows = {row["label"]: row for row in found.labels}
    assert {*rows} == {*LABELS, "cat"}
    precision, recall, f1, clips = metrics.precision_recall_fscore_support(
        truth, best, labels=LABELS
    )
    for at, label in enumerate(LABELS):
        row = rows[label]
        ap = metrics.average_precision_score([true == label for true in truth], scores[:, at])
        got = [row[name] for name in ("precision", "recall", "f1", "average_precision", "clips")]
        assert got == pytest.approx([precision[at], recall[at], f1[at], ap, clips[at]])
        for name in ("precision", "recall", "f1", "average_precision"):
            assert 0 < row[f"{name}_low"] < row[name] < row[f"{name}_high"] < 1
    matrix = metrics.confusion_matrix(truth, best, labels=[*LABELS, "cat"])
    for cell in found.cells:
        at = [*LABELS, "cat"].index(cell["truth"]), [*LABELS, "cat"].index(cell["label"])
        assert matrix[at] == cell["clips"]
        behind = list(decisions.cell(engine, run.id, "species", cell["truth"], cell["label"]))
        assert len(behind) == cell["clips"]
    assert len(list(decisions.cell(engine, run.id, "species", None))) == COUNT


def test_the_truth_may_be_what_people_said(engine: sa.Engine) -> None:
    run, _, _ = classified(engine)
    said: list[Review] = []
    rows = list(decisions.cell(engine, run.id, "species", None))
    for row in rows[:50]:
        right = row["truth"] == row["label"]
        about: dict[str, Any] = {"clip_id": row["clip_id"], "reviewer": "ana"}
        verdict: Any = "right" if right else "wrong"
        said.append(Review(label=row["label"], verdict=verdict, **about))
        if not right and row["truth"] == "dog":
            said.append(Review(label="dog", verdict="right", **about))
    reviews.write(engine, run.id, said)
    found = evaluate(engine, run, "reviews")
    right = sum(row["truth"] == row["label"] for row in rows[:50])
    assert sum(row["right"] for row in found.labels) == right
    dogs = sum(row["truth"] == "dog" for row in rows[:50])
    assert next(row["clips"] for row in found.labels if row["label"] == "dog") == dogs
    assert found.clips == 50


def test_a_truth_that_is_not_there_is_said(engine: sa.Engine) -> None:
    run, _, _ = classified(engine)
    with pytest.raises(UsageError, match="has a truth in 'genus'"):
        evaluate(engine, run, "genus")


def test_an_interval_is_that_of_clopper_and_pearson() -> None:
    value, low, high = share(np.array([59, 0]), np.array([59, 10]))
    assert value == pytest.approx([1, 0])
    assert low == pytest.approx([0.9394, 0], abs=1e-4)
    assert high == pytest.approx([1, 0.3085], abs=1e-4)
