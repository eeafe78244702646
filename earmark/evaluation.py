"""How well a run's labels agree with the truth: precision, recall, F1, average precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import sqlalchemy as sa
from more_itertools import chunked
from scipy.special import betaincinv, expit, logit

from db import decisions
from db.runs import RunRow
from db.session import fetch
from earmark.core.errors import UsageError

#: Intervals hold the true value in 95% of cases.
OUTSIDE, Z = 0.05, 1.96
MEASURES = ("precision", "recall", "f1", "average_precision")
#: Clips that are held as Python's objects at once.
ROWS_AT_ONCE = 20_000
COLUMNS = {
    "label_id": pl.Int64(),
    "label_ids": pl.List(pl.Int64),
    "scores": pl.List(pl.Float64),
    "truth": pl.String(),
}
#: The columns for a terminal.
SHOWN = ("label", "clips", "predicted", "right", *MEASURES)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a run made of clips whose truth is known."""

    #: Of each label that is true or predicted, the most frequent truth first.
    labels: list[dict[str, Any]]
    #: Clips by truth and best label, which is empty where none was.
    cells: list[dict[str, Any]]
    clips: int


def evaluate(engine: sa.Engine, run: RunRow, truth: str) -> Evaluation:
    """Compare the labels of a run's clips with a column of its list, or with `reviews`.

    Raises:
        UsageError: no clip that is done has such a truth.
    """
    rows = decisions.truths(engine, run.id, truth)
    blocks = [_frame(block) for block in chunked(rows, ROWS_AT_ONCE)]
    if not blocks:
        raise UsageError(
            reason=f"No clip of {run.name} that is done has a truth in {truth!r}: name a column of"
            " its list, or `reviews`."
        )
    names = dict(map(tuple, fetch(engine, decisions.SELECT_LABELS, run_id=run.id)))
    clips = pl.concat(blocks).with_columns(_named("label_id", names))
    cells = clips.group_by("truth", "label").len("clips").sort("clips", "truth", descending=True)
    labels = _measures(cells, _average_precisions(clips, names))
    return Evaluation(labels, cells.to_dicts(), len(clips))


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    frame = pl.DataFrame(rows, infer_schema_length=None)
    if frame["label_ids"].dtype == pl.String:
        # SQLite's lists are JSON.
        decoded = [pl.col(name).str.json_decode(COLUMNS[name]) for name in ("label_ids", "scores")]
        frame = frame.with_columns(decoded)
    return frame.select(pl.col(name).cast(dtype) for name, dtype in COLUMNS.items())


def _named(column: str, names: dict[int, str]) -> pl.Expr:
    named = pl.col(column).replace_strict(names, default="", return_dtype=pl.String)
    return named.alias("label")


def _average_precisions(clips: pl.DataFrame, names: dict[int, str]) -> pl.DataFrame:
    """Return each label's precision summed over its true clips, and how many of these it has.

    Over all scores that were stored; clips of one score count together.
    """
    scored = clips.select("truth", "label_ids", "scores").explode("label_ids", "scores")
    named = scored.drop_nulls().with_columns(_named("label_ids", names))
    by_score = named.group_by("label", "scores")
    steps = by_score.agg(pl.len(), right=(pl.col("truth") == pl.col("label")).sum())
    steps = steps.sort("scores", descending=True).with_columns(
        precision=(pl.col("right").cum_sum() / pl.col("len").cum_sum()).over("label")
    )
    summed = (pl.col("right") * pl.col("precision")).sum()
    return steps.group_by("label").agg(summed=summed, scored=pl.col("right").sum())


def _measures(cells: pl.DataFrame, summed: pl.DataFrame) -> list[dict[str, Any]]:
    counts = cells.group_by(label="truth").agg(clips=pl.col("clips").sum())
    predicted = cells.group_by("label").agg(predicted=pl.col("clips").sum())
    right = cells.filter(pl.col("truth") == pl.col("label")).select("label", right="clips")
    table = counts.join(predicted, on="label", how="full", coalesce=True)
    table = table.join(right, on="label", how="left").join(summed, on="label", how="left")
    table = table.fill_null(0).filter(~pl.col("label").is_in(["", decisions.OTHER]))
    table = table.sort("clips", "label", descending=[True, False])
    true, seen, hits = (table[name].to_numpy() for name in ("clips", "predicted", "right"))
    # A clip without a stored score of the label comes last.
    rest = (true - table["scored"].to_numpy()) * true / cells["clips"].sum()
    with np.errstate(all="ignore"):
        ends = (
            share(hits, seen),
            share(hits, true),
            # F1 is a function of the share of right ones among those true or predicted.
            tuple(2 * each / (1 + each) for each in share(hits, true + seen - hits)),
            _around((table["summed"].to_numpy() + rest) / true, true),
        )
    for name, values in zip(MEASURES, ends, strict=True):
        for suffix, column in zip(("", "_low", "_high"), values, strict=True):
            table = table.with_columns(pl.Series(f"{name}{suffix}", column).fill_nan(None))
    return table.drop("summed", "scored").to_dicts()


def share(part: np.ndarray, of: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return shares and the ends of their intervals (Clopper and Pearson, 1934)."""
    low = np.where(part > 0, betaincinv(part, of - part + 1, OUTSIDE / 2), 0.0)
    high = np.where(part < of, betaincinv(part + 1, of - part, 1 - OUTSIDE / 2), 1.0)
    return part / of, np.where(of > 0, low, np.nan), np.where(of > 0, high, np.nan)


def _around(value: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return average precisions and their logit intervals (Boyd, Eng and Page, 2013)."""
    width = Z / np.sqrt(count * value * (1 - value))
    return value, expit(logit(value) - width), expit(logit(value) + width)
