"""Results and failures of a run, and the labels of a model, as read from the views."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from db.access import is_standby
from db.models import Clip, Label, Model, Run
from db.rows import Rows, parsed, select
from db.runs import RunRow
from db.session import fetch, fetch_column
from earmark.core.errors import UsageError
from earmark.core.spelling import did_you_mean

SELECT_RESULTS = "SELECT * FROM results WHERE run_id = :run_id"
SELECT_WINDOWS = "SELECT * FROM windows WHERE run_id = :run_id AND rank <= :rank"
#: The row of `results` with another label than the best; the columns are put in.
SELECT_AT_ANY_RANK = """
SELECT * FROM (
  SELECT {columns}, t.rank FROM results r JOIN top_k t ON t.clip_id = r.clip_id
  WHERE r.run_id = :run_id AND t.run_id = :run_id AND t.rank <= :rank
) ranked WHERE run_id = :run_id
"""
#: Windows with the score of each label they have, clip by clip.
SELECT_HEARD = """
SELECT clip_id, uri, member, channel, start_s, end_s, label, score FROM windows
WHERE run_id = :run_id
"""
SELECT_TOP_K = "SELECT * FROM top_k WHERE run_id = :run_id ORDER BY clip_id, rank"
SELECT_EMBEDDINGS = "SELECT * FROM embeddings WHERE run_id = :run_id ORDER BY clip_id, start_s"
SELECT_FAILURES = "SELECT * FROM failures WHERE run_id = :run_id ORDER BY clip_id"
SELECT_CLIPS = """
SELECT id AS clip_id, coalesce(display_uri, uri) AS uri, member, state, error_code, error, unheard
FROM clips WHERE run_id = :run_id ORDER BY id
"""
#: A result with the ids and scores of all its labels, which are the columns that come last.
SELECT_WIDE = """
SELECT r.*, c.label_ids, c.scores
FROM results r JOIN clips c ON c.id = r.clip_id
WHERE r.run_id = :run_id ORDER BY r.clip_id
"""
#: Windows with the second at which their file begins if all files are played one after the other.
SELECT_IN_SEQUENCE = """
WITH files AS (
  SELECT uri, min(id) AS first_id,
         max(coalesce(end_s, coalesce(start_s, 0) + duration_s)) AS length_s
  FROM clips WHERE run_id = :run_id AND state = 'done' GROUP BY uri
), placed AS (
  SELECT uri, sum(length_s) OVER (ORDER BY first_id) - length_s AS file_begin_s FROM files
)
SELECT * FROM (
  SELECT w.*, p.file_begin_s
  FROM windows w JOIN clips c ON c.id = w.clip_id JOIN placed p ON p.uri = c.uri
  WHERE w.run_id = :run_id AND w.rank <= :rank
) placed_windows WHERE run_id = :run_id
"""
SELECT_MODEL = """
SELECT model, revision, sha256, sample_rate, function_to_apply, window_s
FROM models_used WHERE run_id = :run_id
"""
#: What an argument of `results` asks of a row.
CONDITIONS = {
    "label": "label = :label",
    "min_score": "score >= :min_score",
    "max_score": "score <= :max_score",
}
#: The start of the columns with the score of each label.
SCORE_OF = "score."


def results(
    engine: sa.Engine,
    run_id: int,
    *,
    label: str | None = None,
    rank: int = 1,
    min_score: float | None = None,
    max_score: float | None = None,
    by_score: bool = False,
    windows: bool = False,
    in_sequence: bool = False,
    day: str | None = None,
    hours: str | None = None,
) -> Rows:
    """Return a run's clips, or windows, with their best label.

    Args:
        label: only those with this label.
        rank: up to this rank; with more than 1, a row for each label of a clip up to it.
        min_score, max_score: only those with a score from one to the other.
        by_score: the highest score first, in place of the order of the list.
        windows: a row for each window.
        in_sequence: windows, each with the second at which its file begins among all files.
        day: only those recorded on this day, or in this month or year, such as 2026-05-01.
        hours: only those recorded in these hours of the day, such as 4-6 or 22-3.

    Raises:
        UsageError: the run's model has no such label, or these are no hours.
    """
    statement, order = _rows_of(engine, rank, windows=windows, in_sequence=in_sequence)
    if by_score:
        order = f"score DESC NULLS LAST, {order}"
    if label is not None:
        _check_label(engine, run_id, label)
    values: dict[str, Any] = {"run_id": run_id}
    if ":rank" in statement:
        values["rank"] = rank
    statement += _conditions(values, label=label, min_score=min_score, max_score=max_score)
    statement += _recorded(values, day, hours)
    return select(engine, f"{statement} ORDER BY {order}", **values)


def _rows_of(engine: sa.Engine, rank: int, *, windows: bool, in_sequence: bool) -> tuple[str, str]:
    """Return the statement that has such rows, and their order."""
    if in_sequence:
        return SELECT_IN_SEQUENCE, "clip_id, start_s, channel"
    if windows:
        return SELECT_WINDOWS, "clip_id, start_s, channel, rank"
    if rank > 1:
        return _at_any_rank(engine), "clip_id, rank"
    return SELECT_RESULTS, "clip_id"


def _conditions(values: dict[str, Any], **given: Any) -> str:
    """Return the conditions that have a value, and add their values."""
    conditions = ""
    for name, value in given.items():
        if value is not None:
            conditions += f" AND {CONDITIONS[name]}"
            values[name] = value
    return conditions


def _recorded(values: dict[str, Any], day: str | None, hours: str | None) -> str:
    """Return the condition on when a clip was recorded, and add its values."""
    of_clip = ""
    if day is not None:
        of_clip += " AND substr(recorded_at, 1, :length) = :day"
        values.update(day=day, length=len(day))
    if hours is not None:
        first, last = _hours(hours)
        joined = "AND" if first <= last else "OR"
        hour = "substr(recorded_at, 12, 2)"
        of_clip += f" AND ({hour} >= :first {joined} {hour} <= :last)"
        values.update(first=f"{first:02}", last=f"{last:02}")
    if not of_clip:
        return ""
    return f" AND clip_id IN (SELECT id FROM clips WHERE run_id = :run_id{of_clip})"  # noqa: S608


def _hours(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d\d?)(?:-(\d\d?))?", text)
    if not found or max(int(found[1]), int(found[2] or 0)) > 23:
        raise UsageError(reason=f"{text} are no hours: 4-6 means from 04:00 to 06:59.")
    return int(found[1]), int(found[2] or found[1])


def _check_label(engine: sa.Engine, run_id: int, label: str) -> None:
    model_id = sa.select(Run.model_id).where(Run.id == run_id).scalar_subquery()
    known = fetch_column(engine, sa.select(Label.name).where(Label.model_id == model_id))
    # Before a worker has loaded the model, nobody knows its labels.
    if known and label not in known:
        raise UsageError(
            reason=f"The model of this run has no label {label}.{did_you_mean(label, known)}"
        )


def wide(engine: sa.Engine, run: RunRow) -> Rows:
    """Return a run's clips with a column for the score of each label of its model.

    A score that was not stored, as it was not among the clip's best, is None.
    """
    named = sa.select(Label.id, Label.name).where(Label.model_id == run.model_id)
    labels = dict(map(tuple, fetch(engine, named.order_by(Label.position))))
    rows = select(engine, SELECT_WIDE, run_id=run.id)
    *columns, _, _ = rows.columns
    scores_of = [f"{SCORE_OF}{name}" for name in dict.fromkeys(labels.values())]

    def lines() -> Iterator[Sequence[Any]]:
        yield (*columns, *scores_of)
        for row in rows:
            ids, scores = parsed(row["label_ids"]), parsed(row["scores"])
            found: dict[str, float] = {}
            for label_id, score in zip(ids or (), scores or (), strict=True):
                # The best comes first, also of two labels with one name.
                found.setdefault(f"{SCORE_OF}{labels[label_id]}", score)
            yield [
                *(row[name] for name in columns),
                *(found.get(name) for name in scores_of),
            ]

    return Rows(lines())


def made_by(engine: sa.Engine, run: RunRow) -> dict[str, Any]:
    """Return what made a run's results: its options and, once it is loaded, its model."""
    model, *_ = [*select(engine, SELECT_MODEL, run_id=run.id), {}]
    return {"run": run.name, "options": run.options.as_json(), **model}


def _at_any_rank(engine: sa.Engine) -> str:
    columns = []
    for column in sa.inspect(engine).get_columns("results"):
        view = "t" if column["name"] in ("label", "score") else "r"
        columns.append(f"{view}.{column['name']}")
    return SELECT_AT_ANY_RANK.format(columns=", ".join(columns))


def heard(engine: sa.Engine, run_id: int, *, label: str | None, min_score: float) -> Rows:
    """Return each window's labels, of any rank, with at least this score, in order of time."""
    if label is not None:
        _check_label(engine, run_id, label)
    values: dict[str, Any] = {"run_id": run_id}
    statement = SELECT_HEARD + _conditions(values, label=label, min_score=min_score)
    return select(engine, f"{statement} ORDER BY clip_id, start_s, channel", **values)


def top_k(engine: sa.Engine, run_id: int) -> Rows:
    """Return every stored prediction of a run, clip by clip, the best first."""
    return select(engine, SELECT_TOP_K, run_id=run_id)


def check_embeddings(run: RunRow) -> None:
    """Raise UsageError if a run keeps no embeddings."""
    if not run.options.embeddings:
        raise UsageError(
            reason=f"The run {run.name} keeps no embeddings: submit its list with --embeddings."
        )


def embeddings(engine: sa.Engine, run: RunRow) -> Rows:
    """Return the embeddings of a run's windows, as `earmark.core.vectors` reads them.

    Raises:
        UsageError: the run keeps none.
    """
    check_embeddings(run)
    return select(engine, SELECT_EMBEDDINGS, run_id=run.id)


def failures(engine: sa.Engine, run_id: int) -> Rows:
    """Return a run's failed clips with their errors."""
    return select(engine, SELECT_FAILURES, run_id=run_id)


def clips(engine: sa.Engine, run_id: int) -> Rows:
    """Return a run's clips with their states and errors."""
    return select(engine, SELECT_CLIPS, run_id=run_id)


def clip(engine: sa.Engine, clip_id: int) -> sa.Row[Any]:
    """Return a clip's row with its true URI; raise UsageError if there is none."""
    state = Clip.state.label("state_now") if is_standby(engine) else Clip.state_now
    statement = sa.select(Clip.__table__, state).where(Clip.id == clip_id)
    row: sa.Row[Any] | None = next(iter(fetch(engine, statement)), None)
    if row is None:
        raise UsageError(
            reason=f"There is no clip {clip_id}; `earmark results RUN` and `failures RUN` give"
            " their ids."
        )
    return row


def model_labels(engine: sa.Engine, model: str) -> list[str]:
    """Return the labels of a model in its order: the newest of that name that a worker loaded."""
    newest = sa.select(sa.func.max(Model.id)).where(Model.name == model).scalar_subquery()
    labels = sa.select(Label.name).where(Label.model_id == newest).order_by(Label.position)
    return fetch_column(engine, labels)


def models(engine: sa.Engine) -> list[str]:
    """Return the names of the models that workers loaded."""
    return fetch_column(engine, sa.select(Model.name).distinct())
