"""Results and failures of a run, and the labels of a model, as read from the views."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from db.access import is_standby
from db.models import Clip, Label, Model
from db.rows import select
from db.session import reading
from earmark.core.errors import UsageError

if TYPE_CHECKING:
    from db.rows import Rows

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
WHERE run_id = :run_id AND score >= :min_score
"""
SELECT_TOP_K = "SELECT * FROM top_k WHERE run_id = :run_id ORDER BY clip_id, rank"
SELECT_FAILURES = "SELECT * FROM failures WHERE run_id = :run_id ORDER BY clip_id"
SELECT_CLIPS = """
SELECT id AS clip_id, coalesce(display_uri, uri) AS uri, state, error_code, error
FROM clips WHERE run_id = :run_id ORDER BY id
"""


def results(
    engine: sa.Engine,
    run_id: int,
    *,
    label: str | None = None,
    rank: int = 1,
    min_score: float | None = None,
    windows: bool = False,
) -> Rows:
    """Return a run's clips, or windows, with their best label.

    Args:
        label: only those with this label.
        rank: up to this rank; with more than 1, a row for each label of a clip up to it.
        min_score: only those with at least this score.
        windows: a row for each window.
    """
    statement, order = SELECT_RESULTS, "clip_id"
    values: dict[str, Any] = {"run_id": run_id}
    if windows:
        statement, order = SELECT_WINDOWS, "clip_id, start_s, rank"
        values["rank"] = rank
    elif rank > 1:
        statement, order = _at_any_rank(engine), "clip_id, rank"
        values["rank"] = rank
    if label is not None:
        statement += " AND label = :label"
        values["label"] = label
    if min_score is not None:
        statement += " AND score >= :min_score"
        values["min_score"] = min_score
    return select(engine, f"{statement} ORDER BY {order}", **values)


def _at_any_rank(engine: sa.Engine) -> str:
    columns = []
    for column in sa.inspect(engine).get_columns("results"):
        view = "t" if column["name"] in ("label", "score") else "r"
        columns.append(f"{view}.{column['name']}")
    return SELECT_AT_ANY_RANK.format(columns=", ".join(columns))


def heard(engine: sa.Engine, run_id: int, *, label: str | None, min_score: float) -> Rows:
    """Return each window's labels, of any rank, with at least this score, in order of time."""
    statement = SELECT_HEARD
    values: dict[str, Any] = {"run_id": run_id, "min_score": min_score}
    if label is not None:
        statement += " AND label = :label"
        values["label"] = label
    return select(engine, f"{statement} ORDER BY clip_id, start_s", **values)


def top_k(engine: sa.Engine, run_id: int) -> Rows:
    """Return every stored prediction of a run, clip by clip, the best first."""
    return select(engine, SELECT_TOP_K, run_id=run_id)


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
    with reading(engine) as connection:
        row = connection.execute(statement).first()
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
    with reading(engine) as connection:
        return list(connection.scalars(labels))
