"""Everything that changes what is known about a clip: submitted, queued, claimed, finished, given back.

A clip's state moves pending -> queued -> running -> done | failed | cancelled. Each function is one transaction;
times are the database's clock, so no machine's own clock matters.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import aliased

from db import results
from db.listed import Listed, insert, known_keys, listed
from db.models import CONTENT, Base, Clip, Label, Model, Run, RunCount, WindowPrediction
from db.outcomes import error_values, write
from db.session import now, reading, writing
from earmark import clips as words
from earmark.errors import Cancelled, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from earmark.clips import Outcome
    from earmark.options import RunOptions
    from earmark.settings import Ledger


#: Clips deleted in one transaction: a second or so in which no other writer of a SQLite file gets its turn.
PRUNED_AT_ONCE = 5000


@dataclass(frozen=True, slots=True)
class Claimed:
    """A clip a worker may work on until its lease ends."""

    id: int
    uri: str
    #: This try included.
    attempts: int
    crashes: int


@dataclass(frozen=True, slots=True)
class Claim:
    """The clips of a chunk that are still to do, and the token that lets their results in."""

    token: int
    clips: tuple[Claimed, ...]


@dataclass(frozen=True, slots=True)
class PickedClip:
    """A clip that is marked as queued and now has to be sent."""

    id: int
    display_uri: str
    crashes: int


@dataclass(frozen=True, slots=True)
class Picked:
    """What the feeder took from one run."""

    run_id: int
    chunk_size: int
    clips: tuple[PickedClip, ...]


def state_is(*states: str) -> sa.ColumnElement[bool]:
    # Spelled into the statement as in the partial indexes, which SQLite does not see behind anything else.
    spelled = [sa.literal(state, literal_execute=True) for state in states]
    return Clip.state == spelled[0] if len(spelled) == 1 else Clip.state.in_(spelled)


# submit --------------------------------------------------------------------------------------------------------------


def open_run(
    engine: sa.Engine,
    name: str | None,
    options: RunOptions,
    *,
    queue: str,
    chunk_size: int,
    priority: int = 1,
    reuse_urls: bool = False,
) -> int:
    """Return the id of the run of that name, made now unless it exists; a run without a name gets `run-<id>`.

    Raises:
        UsageError: a run of that name exists with other options: its results would not be comparable.
    """
    how = {"queue": queue, "priority": priority, "reuse_urls": reuse_urls}
    with writing(engine) as connection:
        found = connection.execute(sa.select(Run.id, Run.options).where(Run.name == name)).first()
        if found is None:
            return _insert_run(connection, name, {**how, "options": options.as_json(), "chunk_size": chunk_size})
        if found.options != options.as_json():
            raise UsageError(reason=f"The run {name!r} exists with other options; use another --name.")
        connection.execute(sa.update(Run).where(Run.id == found.id).values(**how))
        return int(found.id)


def _insert_run(connection: sa.Connection, name: str | None, values: dict[str, Any]) -> int:
    temporary = name or f"run-{secrets.token_hex(8)}"
    row = sa.insert(Run).values(name=temporary, created_at=now(), **values)
    run_id = connection.execute(row.returning(Run.id)).scalar_one()
    if name is None:
        connection.execute(sa.update(Run).where(Run.id == run_id).values(name=f"run-{run_id}"))
    return run_id


def add_clips(engine: sa.Engine, run_id: int, clips: Iterable[words.Clip]) -> int:
    """Add clips to a run as `pending`, passing over those it has already; return how many were new."""
    return add_listed(engine, run_id, [listed(clip) for clip in clips])


def add_listed(engine: sa.Engine, run_id: int, rows: list[Listed], *, mostly_known: bool = False) -> int:
    """Do what add_clips does; rows that are sorted by their key write each page of the index only once.

    Args:
        mostly_known: look first which are new, since looking costs a fraction of a failed insert.
    """
    if mostly_known:
        with reading(engine) as connection:
            known = known_keys(connection, run_id, rows)
        rows = [row for row in rows if row[0] not in known]
    if not rows:
        return 0
    with writing(engine) as connection:
        return insert(connection, run_id, rows)


def retry_failed(engine: sa.Engine, run_id: int, codes: Iterable[str] = ()) -> int:
    """Put a run's failed clips (all, or those with these error codes) back to `pending`; return how many."""
    statement = sa.update(Clip).where(Clip.run_id == run_id, state_is("failed"))
    if wanted := list(codes):
        statement = statement.where(Clip.error_code.in_(wanted))
    fresh = {"attempts": 0, "crashes": 0, "finished_at": None}
    with writing(engine) as connection:
        return connection.execute(statement.values(**_AT_ONCE, **fresh, **NO_ERROR)).rowcount


def cancel(engine: sa.Engine, run_id: int) -> int:
    """Make a run's waiting clips `cancelled`; those being worked on still end by themselves."""
    final = {**NO_LEASE, **error_values(Cancelled()), "state": "cancelled", "not_before": None, "finished_at": now()}
    # An index for each: one statement for both would read all of the run's clips.
    waiting = (state_is("pending"), sa.and_(state_is("queued", "running"), state_is("queued")))
    with writing(engine) as connection:
        return sum(
            connection.execute(sa.update(Clip).where(Clip.run_id == run_id, some).values(final)).rowcount
            for some in waiting
        )


def prune(engine: sa.Engine, run_id: int) -> int:
    """Delete a run with its clips and results, some thousands in a transaction; return how many clips it had.

    Raises:
        UsageError: the run is not at its end.
    """
    if not results.progress(engine, run_id).finished:
        raise UsageError(reason="This run is not at its end: `earmark cancel` it first.")
    pruned = 0
    while some := _prune_some(engine, run_id):
        pruned += some
    with writing(engine) as connection:
        connection.execute(sa.delete(RunCount).where(RunCount.run_id == run_id))
        connection.execute(sa.delete(Run).where(Run.id == run_id))
    return pruned


def _prune_some(engine: sa.Engine, run_id: int) -> int:
    with writing(engine) as connection:
        ids = list(connection.scalars(sa.select(Clip.id).where(Clip.run_id == run_id).limit(PRUNED_AT_ONCE)))
        for clip_id in (WindowPrediction.clip_id, Clip.id):
            connection.execute(sa.delete(clip_id.class_).where(clip_id.in_(ids)))
    return len(ids)


# feed ----------------------------------------------------------------------------------------------------------------


def take_back(engine: sa.Engine, queue: str) -> int:
    """Put clips whose lease has ended back to `pending`; return how many.

    A worker that let a lease end has died with the clip: that counts as a crash, and the try does not.
    """
    ended = Clip.lease_until < _CLOCK
    if not _some_kept(engine, queue, ended):
        return 0
    lost = {"crashes": Clip.crashes + 1, "attempts": Clip.attempts - 1}
    with writing(engine) as connection:
        crashed = sa.update(Clip).where(state_is("running"), _kept(queue, ended)).values(**_AT_ONCE, **lost)
        stale = sa.update(Clip).where(state_is("queued"), _kept(queue, ended)).values(_AT_ONCE)
        return connection.execute(crashed).rowcount + connection.execute(stale).rowcount


def take_back_queued(engine: sa.Engine, queue: str, within_s: float) -> int:
    """Put clips back to `pending` whose time in the queue would end within so many seconds; return how many."""
    lost = sa.and_(state_is("queued"), Clip.lease_until < _CLOCK + within_s)
    if not _some_kept(engine, queue, lost):
        return 0
    with writing(engine) as connection:
        return connection.execute(sa.update(Clip).where(_kept(queue, lost)).values(_AT_ONCE)).rowcount


def _some_kept(engine: sa.Engine, queue: str, condition: sa.ColumnElement[bool]) -> bool:
    # Most feeders find nothing, and on SQLite there is one writer.
    with reading(engine) as connection:
        return connection.execute(sa.select(Clip.id).where(_kept(queue, condition)).limit(1)).first() is not None


def _kept(queue: str, condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    return sa.and_(state_is("queued", "running"), condition, Clip.run_id.in_(_runs_of(queue)))


def pick(
    engine: sa.Engine, queue: str, chunks: int, limits: Ledger, after: dict[int, int] | None = None
) -> list[Picked]:
    """Mark about so many chunks of clips that are due as `queued`, shared among the runs by their priorities.

    Args:
        after: by run, the last fresh clip picked before, and kept up to date. It spares PostgreSQL the walk over the
            index entries of all clips that have left `pending` since its last vacuum.
    """
    after = {} if after is None else after
    with writing(engine) as connection:
        runs = connection.execute(_runs_with_pending_clips(queue)).all()
        total = sum(run.priority for run in runs)
        picked = []
        for run in runs:
            count = -(-chunks * run.priority // total) * run.chunk_size
            clips = _pick_clips(connection, run.id, count, limits, after)
            picked.append(Picked(run.id, run.chunk_size, tuple(clips)))
        return [some for some in picked if some.clips]


def _pick_clips(
    connection: sa.Connection, run_id: int, count: int, limits: Ledger, after: dict[int, int]
) -> list[PickedClip]:
    again = _mark(connection, _due_again(run_id, count), limits)
    wanted = count - len(again)
    fresh = _mark(connection, _fresh(run_id, wanted, after.get(run_id, 0)), limits) if wanted else []
    if wanted and not fresh and after.get(run_id):
        fresh = _mark(connection, _fresh(run_id, wanted, 0), limits)
    if wanted:
        after[run_id] = fresh[-1].id if fresh else 0
    return again + fresh


def _due_again(run_id: int, count: int) -> sa.Select[int]:
    return _pending(run_id).where(Clip.not_before > 0, Clip.not_before <= _CLOCK).limit(count)


def _fresh(run_id: int, count: int, after: int) -> sa.Select[int]:
    # Compared as a pair, so that PostgreSQL does not walk all ids of all runs instead.
    place, mark = sa.tuple_(Clip.not_before, Clip.id), sa.tuple_(sa.literal(0.0), sa.literal(after))
    return _pending(run_id).where(place > mark, Clip.not_before <= 0).limit(count)


def _pending(run_id: int) -> sa.Select[int]:
    pending = sa.select(Clip.id).where(Clip.run_id == run_id, state_is("pending"))
    return pending.order_by(Clip.not_before, Clip.id)


def _mark(connection: sa.Connection, some: sa.Select[int], limits: Ledger) -> list[PickedClip]:
    due = some.with_for_update(skip_locked=True).cte("due")
    statement = (
        sa.update(Clip)
        .where(Clip.id.in_(sa.select(due.c.id)))
        .values(state="queued", lease_until=now() + limits.queue_lease_s)
        .returning(Clip.id, Clip.display_uri, Clip.crashes)
    )
    return sorted((PickedClip(*row) for row in connection.execute(statement)), key=lambda clip: clip.id)


def _runs_of(queue: str) -> sa.Select[int]:
    return sa.select(Run.id).where(Run.queue == queue)


def _runs_with_pending_clips(queue: str) -> sa.Select[int, int, int]:
    pending = sa.select(RunCount.run_id).where(RunCount.state == "pending").group_by(RunCount.run_id)
    some = Run.id.in_(pending.having(sa.func.sum(RunCount.clips) > 0))
    return sa.select(Run.id, Run.chunk_size, Run.priority).where(Run.queue == queue, some).order_by(Run.id)


# work ----------------------------------------------------------------------------------------------------------------


def claim(engine: sa.Engine, clip_ids: Iterable[int], *, worker: str, limits: Ledger) -> Claim:
    """Take the clips that are still to do; the try is counted before the work, so that a death counts too.

    Clips that are final, running elsewhere or not yet due are left out: a message delivered twice does no harm.
    """
    token = secrets.randbits(63)
    values = {"ids": list(clip_ids), "token": token, "worker": worker, "lease_s": limits.lease_s}
    with writing(engine) as connection:
        return Claim(token, tuple(Claimed(*row) for row in connection.execute(_claim(), values)))


@cache
def _claim() -> sa.Update:
    named = Clip.id.in_(sa.bindparam("ids", expanding=True))
    waiting = (
        sa.select(Clip.id)
        .where(named, state_is("queued", "pending"), Clip.not_before <= now())
        .order_by(Clip.id)
        .with_for_update(skip_locked=True)
        .cte("waiting")
    )
    taken = {"attempts": Clip.attempts + 1, "lease_until": now() + sa.bindparam("lease_s")}
    return (
        sa.update(Clip)
        .where(Clip.id.in_(sa.select(waiting.c.id)))
        .values(state="running", lease_token=sa.bindparam("token"), worker=sa.bindparam("worker"), **taken)
        .returning(Clip.id, Clip.uri, Clip.attempts, Clip.crashes)
    )


def renew(engine: sa.Engine, tokens: Iterable[int], limits: Ledger) -> None:
    """Lengthen the leases of the claims a worker still works on."""
    if held := list(tokens):
        statement = sa.update(Clip).where(Clip.lease_token.in_(held), state_is("running"))
        with writing(engine) as connection:
            connection.execute(statement.values(lease_until=now() + limits.lease_s))


def release(engine: sa.Engine, token: int, delays_s: Mapping[int, float]) -> None:
    """Give clips back untried, each to be taken up again after its delay in seconds."""
    rows = [{"clip_id": clip_id, "pause_s": delay_s} for clip_id, delay_s in delays_s.items()]
    if rows:
        # Only a running clip has a token.
        statement = sa.update(Clip).where(Clip.id == sa.bindparam("clip_id"), Clip.lease_token == token)
        with writing(engine) as connection:
            connection.execute(statement.values(state="pending", attempts=Clip.attempts - 1, **_LATER), rows)


def finish(
    engine: sa.Engine, claim: Claim, outcomes: Sequence[Outcome], label_ids: Sequence[int], limits: Ledger
) -> dict[str, int]:
    """Write results and final states in one transaction, of the clips this claim still holds.

    A transient failure with tries left goes back to `pending` instead, with a pause. Returns how many clips were
    `done`, `failed`, to be `retried`, and `lost` to another worker after the lease had ended.
    """
    tries = {clip.id: clip.attempts for clip in claim.clips}
    with writing(engine) as connection:
        counts = write(connection, claim.token, outcomes, tries, label_ids, limits)
    lost = len(outcomes) - counts.total()
    return {"done": counts["done"], "failed": counts["failed"], "retried": counts["pending"], "lost": lost}


def register_model(engine: sa.Engine, labels: Sequence[str], **identity: Any) -> tuple[int, tuple[int, ...]]:
    """Return the id of a model and of its labels, in the model's order, adding what is new.

    Args:
        labels: the model's label names, by position.
        identity: the columns of `models` that say which model it is.
    """
    same = [getattr(Model, column) == identity[column] for column in ("name", "revision", "sha256")]
    with writing(engine) as connection:
        connection.execute(_insert_new(connection, Model).values(**identity, created_at=now()))
        model_id = connection.execute(sa.select(Model.id).where(*same)).scalar_one()
        rows = [{"model_id": model_id, "position": at, "name": name} for at, name in enumerate(labels)]
        connection.execute(_insert_new(connection, Label), rows)
        ids = sa.select(Label.id).where(Label.model_id == model_id).order_by(Label.position)
        return model_id, tuple(connection.scalars(ids))


def settle_model(engine: sa.Engine, run_id: int, model_id: int) -> int:
    """Make this the run's model unless another worker has said which it is; return the one it is."""
    with writing(engine) as connection:
        connection.execute(sa.update(Run).where(Run.id == run_id, Run.model_id.is_(None)).values(model_id=model_id))
        return connection.execute(sa.select(Run.model_id).where(Run.id == run_id)).scalar_one()  # type: ignore[return-value]


def reuse(engine: sa.Engine, run_id: int, clip_id: int, source: words.Source | None) -> words.Success | None:
    """Return the result that the same bytes already have from the run's model with its options, if there is one.

    Without a source: the result that the clip's URL has in another run, the newest.
    """
    mine, theirs, asked = aliased(Run), aliased(Run), aliased(Clip)
    same = sa.and_(theirs.model_id == mine.model_id, theirs.options == mine.options)
    facts = [getattr(Clip, name) for name in words.AudioFacts.__slots__]
    known = sa.select(Clip.id, Clip.label_ids, Clip.scores, Clip.sha256, Clip.bytes, *facts)
    known = known.join(theirs, theirs.id == Clip.run_id).join(mine, same)
    known = known.where(mine.id == run_id, state_is("done")).limit(1)
    if source:
        content = bytes.fromhex(source.sha256)
        known = known.where(sa.literal_column(CONTENT.text) == content[:7], Clip.sha256 == content)
    else:
        key = sa.select(asked.uri_key).where(asked.id == clip_id).scalar_subquery()
        known = known.where(Clip.uri_key == key, theirs.id != run_id).order_by(theirs.id.desc())
    with reading(engine) as connection:
        found = connection.execute(known).first()
        if found is None:
            return None
        each = sa.select(WindowPrediction).where(WindowPrediction.clip_id == found.id)
        windows = connection.execute(each.order_by(WindowPrediction.start_s)).all()
        ids = {label_id for row in (found, *windows) for label_id in row.label_ids}
        places = sa.select(Label.id, Label.position).where(Label.id.in_(ids))
        positions = dict(connection.execute(places).all())

    def predictions(row: sa.Row[Any]) -> tuple[words.Prediction, ...]:
        pairs = zip(row.label_ids, row.scores, strict=True)
        return tuple(words.Prediction(positions[label_id], score) for label_id, score in pairs)

    return words.Success(
        clip_id,
        words.Source(found.sha256.hex(), found.bytes),
        words.AudioFacts(*found[5:]),
        predictions(found),
        tuple(words.WindowPredictions(row.start_s, row.end_s, predictions(row)) for row in windows),
        reused=True,
    )


# the columns ---------------------------------------------------------------------------------------------------------

NO_LEASE: dict[str, Any] = {"lease_until": None, "lease_token": None}
NO_ERROR: dict[str, Any] = {"error_code": None, "error_stage": None, "error": None}
_LATER: dict[str, Any] = {**NO_LEASE, "not_before": now() + sa.bindparam("pause_s")}
#: Back to work, ahead of what was never begun.
_AT_ONCE: dict[str, Any] = {**NO_LEASE, "state": "pending", "not_before": now()}
#: Read once a statement, so that an index can be used.
_CLOCK = sa.select(now()).scalar_subquery()


def _insert_new(connection: sa.Connection, table: type[Base]) -> Any:
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table).on_conflict_do_nothing()
