"""Counts behind a run's charts and summaries: errors, hosts, labels, scores, clips over time."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from db.models import Clip, state_is
from db.rows import Rows, select
from db.session import fetch, fetch_column
from earmark.core.clips import State

SELECT_FAILING_HOSTS = """
SELECT {host} AS host, count(*) AS failed FROM failures WHERE run_id = :run_id
AND {host} <> '' GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT :limit
"""
#: Not the view, whose mean takes twice the time: 0.9 s for ten million.
SELECT_LABEL_COUNTS = """
SELECT l.name AS label, n.clips FROM (
  SELECT label_id, count(*) AS clips FROM clips
  WHERE run_id = :run_id AND state = 'done' AND label_id IS NOT NULL GROUP BY label_id
) n
JOIN labels l ON l.id = n.label_id ORDER BY n.clips DESC, l.name LIMIT :limit
"""
SELECT_HOSTS = """
SELECT host, clips, done, failed, failure_rate, mean_fetch_ms, bytes FROM host_stats
WHERE run_id = :run_id ORDER BY clips DESC, host
"""


def top_errors(
    engine: sa.Engine, run_id: int, state: State = State.failed
) -> list[tuple[str, int, str]]:
    """Return (code, clips, an example's sentence) of a run's failures, the most frequent first.

    With the state `pending`: of the clips that failed and will be tried again.
    """
    clips = sa.func.count()
    statement = sa.select(Clip.error_code, clips, sa.func.min(Clip.error))
    statement = statement.where(Clip.run_id == run_id, state_is(state))
    if state == State.pending:
        # Clips that failed before have a time, which the index knows.
        statement = statement.where(Clip.not_before > 0)
    statement = statement.where(Clip.error_code.is_not(None)).group_by(Clip.error_code)
    rows = fetch(engine, statement.order_by(clips.desc(), Clip.error_code))
    return list(map(tuple, rows))


def unheard(engine: sa.Engine, run_id: int) -> int:
    """Return how many clips the run that this one follows did not let through."""
    # Their label is null, which the index by label knows.
    done = sa.select(sa.func.count()).where(Clip.run_id == run_id, state_is(State.done))
    (count,) = fetch_column(engine, done.where(Clip.label_id.is_(None), Clip.unheard))
    return int(count)


def failing_hosts(engine: sa.Engine, run_id: int, limit: int = 5) -> list[tuple[str, int]]:
    """Return (host, failures) of a run, those with the most first."""
    return list(map(tuple, fetch(engine, SELECT_FAILING_HOSTS, run_id=run_id, limit=limit)))


def hosts(engine: sa.Engine, run_id: int) -> Rows:
    """Return a run's clips, failures, times and bytes by host, those with the most clips first."""
    return select(engine, SELECT_HOSTS, run_id=run_id)


def label_counts(engine: sa.Engine, run_id: int, limit: int) -> list[tuple[str, int]]:
    """Return (label, clips that have it as their best) of a run, the most frequent first."""
    return list(map(tuple, fetch(engine, SELECT_LABEL_COUNTS, run_id=run_id, limit=limit)))


def score_histogram(engine: sa.Engine, run_id: int, bins: int) -> list[int]:
    """Return how many clips have their best score in each of `bins` equal parts of 0 to 1."""
    labelled = sa.and_(Clip.run_id == run_id, state_is(State.done), Clip.label_id.is_not(None))
    return _histogram(engine, Clip.score * bins, labelled, bins)


def throughput(engine: sa.Engine, run_id: int, bins: int) -> tuple[float, list[int]]:
    """Return the seconds from the first final clip to the last, and the clips in each part."""
    ended = sa.and_(Clip.run_id == run_id, Clip.finished_at.is_not(None))
    ends = sa.select(sa.func.min(Clip.finished_at), sa.func.max(Clip.finished_at)).where(ended)
    ((first, last),) = fetch(engine, ends)
    if first is None or last is None or last == first:
        return 0.0, []
    position = (Clip.finished_at - first) / (last - first) * bins
    return last - first, _histogram(engine, position, ended, bins)


def _histogram(
    engine: sa.Engine, position: Any, where: sa.ColumnElement[bool], bins: int
) -> list[int]:
    # Rounded, since a cast to integer rounds on PostgreSQL and cuts on SQLite.
    number = sa.cast(sa.func.round(sa.cast(position - 0.5, sa.Double)), sa.Integer)
    counts = [0] * bins
    groups = sa.select(number, sa.func.count()).where(where).group_by(number)
    for part, clips in fetch(engine, groups):
        counts[min(max(part, 0), bins - 1)] += clips
    return counts
