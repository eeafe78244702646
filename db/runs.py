"""Runs and their progress, as read from the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import sqlalchemy as sa

from db.access import NO_LEASES, is_standby
from db.brake import in_a_sentence
from db.dialects import now
from db.models import Run
from db.rows import Rows, select
from db.schema import view_query
from db.session import fetch, fetch_column, reading
from earmark.core.clips import FINAL_STATES, STATES, State
from earmark.core.errors import UsageError
from earmark.core.options import RunOptions
from earmark.core.spelling import did_you_mean

#: One statement, so that each clip is counted in one state. Leased clips are among the pending.
COUNT_BY_STATE = """
SELECT state, sum(clips) AS clips, sum(audio_s) AS audio_s, max(finished_at) AS finished_at
FROM run_counts WHERE run_id = :run_id GROUP BY state
UNION ALL
SELECT CASE WHEN token IS NULL THEN 'queued' ELSE 'running' END, count(*), 0.0, 0.0
FROM leases WHERE run_id = :run_id GROUP BY 1
"""
#: Clips of a run that failed before and are not due yet; more are not counted.
COUNT_WAITING = """
SELECT count(*) AS clips, min(not_before) - {now} AS seconds FROM (
  SELECT not_before FROM clips
  WHERE run_id = :run_id AND state = 'pending' AND not_before > (SELECT {now})
  AND error_code IS NOT NULL
  ORDER BY not_before LIMIT :most
) AS waiting
"""
MOST_WAITING = 1000
SELECT_PROGRESS = "SELECT * FROM run_progress"


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run as the ledger knows it."""

    id: int
    name: str
    options: RunOptions
    model_id: int | None
    reuse_urls: bool
    #: Why the run is paused.
    paused: str | None = None
    #: Runs with the same number hear the same clips.
    pass_id: int | None = None
    queue: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """How many clips of a run are in each state, and how long it has been going."""

    states: dict[str, int]
    #: From submission to the last final clip, or to now.
    seconds: float
    #: Audio of the clips that are done.
    audio_s: float
    #: Why the run is paused.
    paused: str | None = None

    @property
    def total(self) -> int:
        return sum(self.states.values())

    @property
    def final(self) -> int:
        return sum(self.states[state] for state in FINAL_STATES)

    @property
    def finished(self) -> bool:
        return self.final == self.total


def get_run(engine: sa.Engine, run_id: int) -> RunRow:
    """Return a run by its id, or raise UsageError."""
    return _run_where(engine, Run.id == run_id, str(run_id))


def find_run(engine: sa.Engine, id_or_name: str | None) -> RunRow:
    """Return a run by id or name, or the newest.

    Raises:
        UsageError: there is no such run.
    """
    if id_or_name is None:
        newest = sa.select(sa.func.max(Run.id)).scalar_subquery()
        return _run_where(engine, Run.id == newest, "(none yet)")
    same = Run.name == id_or_name
    if id_or_name.isascii() and id_or_name.isdigit():
        same = sa.or_(same, Run.id == int(id_or_name))
    return _run_where(engine, same, id_or_name)


def run_on_queue(engine: sa.Engine, queue: str) -> RunRow:
    """Return the run that has this queue to itself, or raise UsageError."""
    return _run_where(engine, Run.queue == queue, f"on {queue}")


def _run_where(engine: sa.Engine, condition: sa.ColumnElement[bool], name: str) -> RunRow:
    rows = fetch(engine, sa.select(Run.__table__).where(condition))
    if not rows:
        meant = did_you_mean(name, fetch_column(engine, sa.select(Run.name)))
        raise UsageError(reason=f"There is no run {name}; `earmark status` lists them.{meant}")
    (run,) = rows
    options = RunOptions.from_json(run.options)
    own = run.model_id, run.reuse_urls, run.paused, run.pass_id, run.queue
    return RunRow(run.id, run.name, options, *own)


def in_pass(engine: sa.Engine, run: RunRow) -> list[RunRow]:
    """Return the runs of a run's pass, which are done together; else the run alone."""
    if run.pass_id is None:
        return [run]
    same = sa.select(Run.id).where(Run.pass_id == run.pass_id).order_by(Run.id)
    with reading(engine) as connection:
        ids = connection.scalars(same).all()
    return list(map(partial(get_run, engine), ids))


def is_going(engine: sa.Engine, run_id: int) -> bool:
    """Return whether there is such a run, and it is not paused."""
    going = sa.select(Run.id).where(Run.id == run_id, Run.paused.is_(None))
    return bool(fetch(engine, going))


def progress(engine: sa.Engine, run_id: int) -> Progress:
    """Return the clips of a run by state, and its times."""
    count = COUNT_BY_STATE
    if is_standby(engine):
        count = f"WITH {NO_LEASES} {count}"
    times = sa.select(Run.created_at, Run.name, Run.paused, now().label("now"))
    with reading(engine) as connection:
        counts = connection.execute(sa.text(count), {"run_id": run_id}).all()
        run = connection.execute(times.where(Run.id == run_id)).one()

    states: dict[str, int] = dict.fromkeys(STATES, 0)
    audio_s = last = 0.0
    for row in counts:
        state = State(row.state)
        states[state] = int(row.clips)
        if state in FINAL_STATES:
            last = max(last, row.finished_at)
        if state is State.done:
            audio_s = row.audio_s
    states[State.pending] -= states[State.queued] + states[State.running]

    going = any(states[state] for state in STATES if state not in FINAL_STATES)
    end = run.now if going or not last else last
    paused = in_a_sentence(run.name, run.paused) if going and run.paused else None
    return Progress(states, end - run.created_at, audio_s, paused)


def waiting(engine: sa.Engine, run_id: int) -> tuple[int, float]:
    """Return how many clips wait for another try, at most 1,000, and the seconds to the next."""
    (row,) = fetch(engine, COUNT_WAITING, run_id=run_id, most=MOST_WAITING)
    return row.clips, row.seconds or 0.0


def run_progress(engine: sa.Engine, run_id: int | None = None) -> Rows:
    """Return the counts of one run or of all, the newest first."""
    statement = SELECT_PROGRESS
    if is_standby(engine):
        view = view_query("run_progress", engine.dialect.name)
        statement = f"WITH {NO_LEASES}, run_progress AS ({view}) {statement}"
    if run_id is None:
        return select(engine, f"{statement} ORDER BY run_id DESC")
    return select(engine, f"{statement} WHERE run_id = :run_id", run_id=run_id)
