"""Everything that is read: runs, their progress, results, failures, labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from db.access import NO_LEASES, is_standby
from db.models import Clip, Label, Model, Run
from db.schema import SPELLINGS, view_query
from db.session import now, reading
from earmark.core.clips import FINAL_STATES, STATES
from earmark.core.errors import UsageError
from earmark.core.options import RunOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Rows of a large result held in memory at once.
ROWS_AT_ONCE = 2000
#: One statement, so that a clip is seen in one place. What has a lease is among the pending.
COUNTED = """
SELECT state, sum(clips), sum(audio_s), max(finished_at) FROM run_counts WHERE run_id = :run_id GROUP BY state
UNION ALL SELECT CASE WHEN token IS NULL THEN 'queued' ELSE 'running' END, count(*), 0.0, 0.0 FROM leases
WHERE run_id = :run_id GROUP BY 1
"""


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run as the ledger knows it."""

    id: int
    name: str
    options: RunOptions
    model_id: int | None
    reuse_urls: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """How many clips of a run are in each state, and how long it has been going."""

    states: dict[str, int]
    #: From submission to the last final clip, or to now.
    seconds: float
    #: Audio of the clips that are done.
    audio_s: float

    @property
    def total(self) -> int:
        return sum(self.states.values())

    @property
    def final(self) -> int:
        return sum(self.states[state] for state in FINAL_STATES)

    @property
    def finished(self) -> bool:
        return self.final == self.total


def run(engine: sa.Engine, run_id: int) -> RunRow:
    """Return a run by its id."""
    return _run_where(engine, Run.id == run_id, str(run_id))


def find_run(engine: sa.Engine, id_or_name: str | None) -> RunRow:
    """Return a run by id or name, or the newest.

    Raises:
        UsageError: there is no such run.
    """
    if id_or_name is None:
        return _run_where(
            engine, Run.id == sa.select(sa.func.max(Run.id)).scalar_subquery(), "(none yet)"
        )
    same = Run.name == id_or_name
    if id_or_name.isascii() and id_or_name.isdigit():
        same = sa.or_(same, Run.id == int(id_or_name))
    return _run_where(engine, same, id_or_name)


def run_of(engine: sa.Engine, queue: str) -> RunRow:
    """Return the run that has this queue to itself, or raise UsageError."""
    return _run_where(engine, Run.queue == queue, f"on {queue}")


def _run_where(engine: sa.Engine, condition: sa.ColumnElement[bool], asked: str) -> RunRow:
    with reading(engine) as connection:
        row = connection.execute(sa.select(Run.__table__).where(condition)).first()
    if row is None:
        raise UsageError(reason=f"There is no run {asked}; `earmark status` lists them.")
    return RunRow(row.id, row.name, RunOptions.from_json(row.options), row.model_id, row.reuse_urls)


def progress(engine: sa.Engine, run_id: int) -> Progress:
    """Return how far a run has come."""
    statement = sa.text(COUNTED)
    if is_standby(engine):
        statement = sa.text(f"WITH {NO_LEASES} {COUNTED}")
    with reading(engine) as connection:
        counted = connection.execute(statement, {"run_id": run_id}).all()
        created, clock = connection.execute(
            sa.select(Run.created_at, now()).where(Run.id == run_id)
        ).one()
    counts = {row[0]: (int(row[1]), row[2], row[3]) for row in counted}
    found = {state: counts.get(state, (0, 0.0, 0.0)) for state in STATES}
    states = {state: some[0] for state, some in found.items()}
    states["pending"] -= states["queued"] + states["running"]
    going = any(states[state] for state in STATES if state not in FINAL_STATES)
    last = max(found[state][2] for state in FINAL_STATES)
    return Progress(states, (clock if going else last or clock) - created, found["done"][1])


def top_errors(engine: sa.Engine, run_id: int, state: str = "failed") -> list[tuple[str, int, str]]:
    """Return (code, clips, one such sentence) of a run's failures, or of its `pending` retries, most frequent first."""
    count = sa.func.count()
    # Spelled into the statement as in the partial indexes.
    here = sa.and_(Clip.run_id == run_id, Clip.state == sa.literal(state, literal_execute=True))
    if state == "pending":
        # Of those, what failed before has a time: the index knows it.
        here &= Clip.not_before > 0
    statement = sa.select(Clip.error_code, count, sa.func.min(Clip.error)).where(
        here, Clip.error_code.is_not(None)
    )
    statement = statement.group_by(Clip.error_code)
    with reading(engine) as connection:
        rows = connection.execute(statement.order_by(count.desc(), Clip.error_code))
        return [(str(code), clips, str(example)) for code, clips, example in rows]


def failing_hosts(engine: sa.Engine, run_id: int, limit: int = 5) -> list[tuple[str, int]]:
    """Return (host, failures) of a run, those with the most first."""
    host = SPELLINGS["{host}"][engine.dialect.name == "postgresql"]
    statement = sa.text(
        f"SELECT {host} AS host, count(*) AS failed FROM failures WHERE run_id = :run_id"  # noqa: S608 - our own words
        " GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT :limit"
    )
    found = rows(engine, statement.bindparams(run_id=run_id, limit=limit))
    return [(row["host"], row["failed"]) for row in found if row["host"]]


def label_counts(engine: sa.Engine, run_id: int, limit: int) -> list[tuple[str, int]]:
    """Return (label, clips it is the best of) of a run, the most frequent first."""
    statement = "SELECT label, clips FROM label_counts WHERE run_id = :run_id ORDER BY clips DESC, label LIMIT :limit"
    bound = sa.text(statement).bindparams(run_id=run_id, limit=limit)
    return [(row["label"], row["clips"]) for row in rows(engine, bound)]


class Rows(Iterator[dict[str, Any]]):
    """Rows by column name, one by one as they come, and the names even where there are no rows."""

    def __init__(self, lines: Iterator[Sequence[Any]]) -> None:
        """Take lines of which the first has the names."""
        self.columns = tuple(next(lines))
        self._lines = lines
        if twice := {name for name in self.columns if self.columns.count(name) > 1}:
            raise UsageError(
                reason=f"Two columns are called {min(twice)}: give one another name with AS."
            )

    def __next__(self) -> dict[str, Any]:
        return dict(zip(self.columns, next(self._lines), strict=True))


def rows(engine: sa.Engine, statement: sa.TextClause) -> Rows:
    """Return the rows of a statement."""
    return Rows(_lines(engine, statement))


def _lines(engine: sa.Engine, statement: sa.TextClause) -> Iterator[Sequence[Any]]:
    with reading(engine) as connection:
        result = connection.execution_options(yield_per=ROWS_AT_ONCE).execute(statement)
        yield tuple(result.keys())
        yield from result


def results(
    run_id: int, *, label: str | None = None, min_score: float | None = None, windows: bool = False
) -> sa.TextClause:
    """Return the statement for a run's results, or for its windows, that carry a label with at least a score."""
    view, best = ("windows", "AND rank = 1") if windows else ("results", "")
    order = "clip_id, start_s" if windows else "clip_id"
    conditions = [
        *(["AND label = :label"] if label is not None else []),
        *(["AND score >= :min_score"] if min_score is not None else []),
    ]
    values = {"run_id": run_id, "label": label, "min_score": min_score}
    statement = f"SELECT * FROM {view} WHERE run_id = :run_id {best} {' '.join(conditions)} ORDER BY {order}"  # noqa: S608
    return sa.text(statement).bindparams(
        **{name: value for name, value in values.items() if f":{name}" in statement}
    )


def clips(run_id: int) -> sa.TextClause:
    """Return the statement for a run's clips with their states and errors."""
    columns = "id AS clip_id, coalesce(display_uri, uri) AS uri, state, error_code, error"
    return sa.text(f"SELECT {columns} FROM clips WHERE run_id = :run_id ORDER BY id").bindparams(
        run_id=run_id
    )


def clip(engine: sa.Engine, clip_id: int) -> sa.Row[Any]:
    """Return a clip's row, true URI and all; raise UsageError if there is none."""
    state = Clip.state.label("state_now") if is_standby(engine) else Clip.state_now
    with reading(engine) as connection:
        found = connection.execute(
            sa.select(Clip.__table__, state).where(Clip.id == clip_id)
        ).first()
    if found is None:
        raise UsageError(
            reason=f"There is no clip {clip_id}; `earmark results RUN` and `failures RUN` give their ids."
        )
    return found


def top_k(run_id: int) -> sa.TextClause:
    """Return the statement for every stored prediction of a run, clip by clip, best first."""
    return sa.text("SELECT * FROM top_k WHERE run_id = :run_id ORDER BY clip_id, rank").bindparams(
        run_id=run_id
    )


def failures(run_id: int) -> sa.TextClause:
    """Return the statement for a run's failures."""
    return sa.text("SELECT * FROM failures WHERE run_id = :run_id ORDER BY clip_id").bindparams(
        run_id=run_id
    )


def hosts(run_id: int) -> sa.TextClause:
    """Return the statement for how a run fares with each host, those with the most clips first."""
    columns = "host, clips, done, failed, failure_rate, mean_fetch_ms, bytes"
    statement = f"SELECT {columns} FROM host_stats WHERE run_id = :run_id ORDER BY clips DESC, host"  # noqa: S608
    return sa.text(statement).bindparams(run_id=run_id)


def run_progress(engine: sa.Engine, run_id: int | None = None) -> Rows:
    """Return the counts of one run or of all, the newest first."""
    statement = "SELECT * FROM run_progress"
    if is_standby(engine):
        view = view_query("run_progress", engine.dialect.name)
        statement = f"WITH {NO_LEASES}, run_progress AS ({view}) {statement}"
    if run_id is None:
        return rows(engine, sa.text(f"{statement} ORDER BY run_id DESC"))
    return rows(engine, sa.text(f"{statement} WHERE run_id = :run_id").bindparams(run_id=run_id))


def labels(engine: sa.Engine, model: str) -> list[str]:
    """Return the labels of a model some worker has loaded, in its order; the newest of that name."""
    newest = sa.select(sa.func.max(Model.id)).where(Model.name == model).scalar_subquery()
    with reading(engine) as connection:
        return list(
            connection.scalars(
                sa.select(Label.name).where(Label.model_id == newest).order_by(Label.position)
            )
        )
