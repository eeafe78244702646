"""Everything that changes what is known about a clip: submitted, queued, claimed, finished, given back.

A clip's state moves pending -> queued -> running -> done | failed | cancelled. Each function is one transaction;
times are the database's clock, so no machine's own clock matters.
"""

from __future__ import annotations

import random
import secrets
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from db.models import Base, Clip, Label, Model, Prediction, Run, WindowPrediction
from db.session import now, writing
from earmark.clips import Failure, Success, display_uri, uri_key
from earmark.errors import Cancelled, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from earmark import clips as words
    from earmark.clips import Outcome
    from earmark.errors import ClipError
    from earmark.options import RunOptions
    from earmark.settings import Ledger


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
    # Spelled into the statement, because a partial index is not used for a bound parameter.
    return Clip.state.in_([sa.literal(state, literal_execute=True) for state in states])


# submit --------------------------------------------------------------------------------------------------------------


def open_run(engine: sa.Engine, name: str | None, options: RunOptions, *, queue: str, chunk_size: int) -> int:
    """Return the id of the run of that name, made now unless it exists; a run without a name gets `run-<id>`.

    Raises:
        UsageError: a run of that name exists with other options: its results would not be comparable.
    """
    with writing(engine) as connection:
        found = connection.execute(sa.select(Run.id, Run.options).where(Run.name == name)).first()
        if found is None:
            return _insert_run(connection, name, options, queue, chunk_size)
        if found.options != options.as_json():
            raise UsageError(reason=f"The run {name!r} exists with other options; use another --name.")
        connection.execute(sa.update(Run).where(Run.id == found.id).values(queue=queue))
        return int(found.id)


def _insert_run(connection: sa.Connection, name: str | None, options: RunOptions, queue: str, chunk_size: int) -> int:
    values = {"options": options.as_json(), "queue": queue, "chunk_size": chunk_size, "created_at": now()}
    temporary = name or f"run-{secrets.token_hex(8)}"
    run_id = connection.execute(sa.insert(Run).values(name=temporary, **values).returning(Run.id)).scalar_one()
    if name is None:
        connection.execute(sa.update(Run).where(Run.id == run_id).values(name=f"run-{run_id}"))
    return run_id


def add_clips(engine: sa.Engine, run_id: int, clips: Iterable[words.Clip]) -> int:
    """Add clips to a run as `pending`, passing over those it has already; return how many were new."""
    rows = [
        {
            "run_id": run_id,
            "uri": clip.uri,
            "display_uri": display_uri(clip.uri),
            "uri_key": uri_key(clip.uri),
            "meta": dict(clip.meta) or None,
            "state": "pending",
        }
        for clip in clips
    ]
    if not rows:
        return 0
    with writing(engine) as connection:
        new = connection.execute(_insert_new(connection, Clip), rows, execution_options={"preserve_rowcount": True})
        return new.rowcount


def retry_failed(engine: sa.Engine, run_id: int, codes: Iterable[str] = ()) -> int:
    """Put a run's failed clips (all, or those with these error codes) back to `pending`; return how many."""
    statement = sa.update(Clip).where(Clip.run_id == run_id, state_is("failed"))
    if wanted := list(codes):
        statement = statement.where(Clip.error_code.in_(wanted))
    fresh = {"attempts": 0, "crashes": 0, "not_before": 0.0, "finished_at": None}
    with writing(engine) as connection:
        return connection.execute(statement.values(state="pending", **fresh, **NO_ERROR)).rowcount


def cancel(engine: sa.Engine, run_id: int) -> int:
    """Make a run's waiting clips `cancelled`; those being worked on still end by themselves."""
    final = {**NO_LEASE, **_error_values(Cancelled()), "finished_at": now()}
    statement = sa.update(Clip).where(Clip.run_id == run_id, state_is("pending", "queued"))
    with writing(engine) as connection:
        return connection.execute(statement.values(state="cancelled", **final)).rowcount


# feed ----------------------------------------------------------------------------------------------------------------


def take_back(engine: sa.Engine, queue: str) -> int:
    """Put clips whose lease has ended back to `pending`; return how many.

    A worker that let a lease end has died with the clip: that counts as a crash, and the try does not.
    """
    ended = sa.and_(Clip.lease_until < now(), Clip.run_id.in_(_runs_of(queue)))
    lost = {"crashes": Clip.crashes + 1, "attempts": Clip.attempts - 1}
    with writing(engine) as connection:
        crashed = sa.update(Clip).where(state_is("running"), ended).values(state="pending", **lost, **NO_LEASE)
        stale = sa.update(Clip).where(state_is("queued"), ended).values(state="pending", **NO_LEASE)
        return connection.execute(crashed).rowcount + connection.execute(stale).rowcount


def take_back_queued(engine: sa.Engine, queue: str, limits: Ledger) -> int:
    """Put clips that the (now empty) queue should still hold back to `pending`; return how many."""
    sent_long_ago = Clip.lease_until < now() + (limits.queue_lease_s - limits.lost_after_s)
    lost = sa.update(Clip).where(state_is("queued"), sent_long_ago, Clip.run_id.in_(_runs_of(queue)))
    with writing(engine) as connection:
        return connection.execute(lost.values(state="pending", **NO_LEASE)).rowcount


def pick(engine: sa.Engine, queue: str, chunks: int, limits: Ledger) -> list[Picked]:
    """Mark about so many chunks of clips that are due as `queued`, shared evenly among the runs that have some."""
    with writing(engine) as connection:
        runs = connection.execute(_runs_with_due_clips(queue)).all()
        share = -(-chunks // max(1, len(runs)))
        return [
            Picked(run.id, run.chunk_size, _pick_clips(connection, run.id, share * run.chunk_size, limits))
            for run in runs
        ]


def _pick_clips(connection: sa.Connection, run_id: int, count: int, limits: Ledger) -> tuple[PickedClip, ...]:
    due = (
        sa.select(Clip.id)
        .where(Clip.run_id == run_id, _DUE)
        .order_by(Clip.not_before, Clip.id)
        .limit(count)
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    statement = (
        sa.update(Clip)
        .where(Clip.id.in_(sa.select(due.c.id)))
        .values(state="queued", lease_until=now() + limits.queue_lease_s)
        .returning(Clip.id, Clip.display_uri, Clip.crashes)
    )
    return tuple(sorted((PickedClip(*row) for row in connection.execute(statement)), key=lambda clip: clip.id))


def _runs_of(queue: str) -> sa.Select[int]:
    return sa.select(Run.id).where(Run.queue == queue)


def _runs_with_due_clips(queue: str) -> sa.Select[int, int]:
    due = sa.exists().where(Clip.run_id == Run.id, _DUE)
    return sa.select(Run.id, Run.chunk_size).where(Run.queue == queue, due).order_by(Run.id)


# work ----------------------------------------------------------------------------------------------------------------


def claim(engine: sa.Engine, clip_ids: Iterable[int], *, worker: str, limits: Ledger) -> Claim:
    """Take the clips that are still to do; the try is counted before the work, so that a death counts too.

    Clips that are final, running elsewhere or not yet due are left out: a message delivered twice does no harm.
    """
    token = secrets.randbits(63)
    waiting = (
        sa.select(Clip.id)
        .where(Clip.id.in_(list(clip_ids)), state_is("queued", "pending"), Clip.not_before <= now())
        .order_by(Clip.id)
        .with_for_update(skip_locked=True)
        .cte("waiting")
    )
    statement = (
        sa.update(Clip)
        .where(Clip.id.in_(sa.select(waiting.c.id)))
        .values(
            state="running",
            attempts=Clip.attempts + 1,
            lease_until=now() + limits.lease_s,
            lease_token=token,
            worker=worker,
        )
        .returning(Clip.id, Clip.uri, Clip.attempts, Clip.crashes)
    )
    with writing(engine) as connection:
        return Claim(token, tuple(Claimed(*row) for row in connection.execute(statement)))


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
        held = set(connection.scalars(_held(claim.token, [outcome.clip_id for outcome in outcomes])))
        mine = [outcome for outcome in outcomes if outcome.clip_id in held]
        done = [outcome for outcome in mine if isinstance(outcome, Success)]
        failures = [outcome for outcome in mine if isinstance(outcome, Failure)]
        retried = [failure for failure in failures if _another_try(failure, tries[failure.clip_id], limits)]
        failed = [failure for failure in failures if failure not in retried]
        _update(connection, [_done_values(success) for success in done], _FINAL | NO_ERROR)
        _update(connection, [_failed_values(failure) for failure in failed], _FINAL)
        _update(connection, [_retry_values(failure, tries[failure.clip_id], limits) for failure in retried], _LATER)
        _insert_predictions(connection, done, label_ids)
    lost = len(outcomes) - len(mine)
    return {"done": len(done), "failed": len(failed), "retried": len(retried), "lost": lost}


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


# the columns ---------------------------------------------------------------------------------------------------------

NO_LEASE: dict[str, Any] = {"lease_until": None, "lease_token": None}
NO_ERROR: dict[str, Any] = {"error_code": None, "error_stage": None, "error": None}
_FINAL: dict[str, Any] = {**NO_LEASE, "finished_at": now()}
_LATER: dict[str, Any] = {**NO_LEASE, "not_before": now() + sa.bindparam("pause_s")}
_DUE = sa.and_(state_is("pending"), Clip.not_before <= now())


def _held_by(token: int) -> sa.ColumnElement[bool]:
    return sa.and_(Clip.lease_token == token, state_is("running"))


def _held(token: int, clip_ids: Iterable[int]) -> sa.Select[int]:
    return sa.select(Clip.id).where(Clip.id.in_(list(clip_ids)), _held_by(token)).order_by(Clip.id).with_for_update()


def _update(connection: sa.Connection, rows: list[dict[str, Any]], same_for_all: dict[str, Any]) -> None:
    if rows:
        own: dict[str, Any] = {
            column: sa.bindparam(column) for column in rows[0] if column not in ("clip_id", "pause_s")
        }
        statement = sa.update(Clip).where(Clip.id == sa.bindparam("clip_id"))
        connection.execute(statement.values(**own, **same_for_all), rows)


def _done_values(success: Success) -> dict[str, Any]:
    facts, timings = asdict(success.facts), asdict(success.timings)
    return {"clip_id": success.clip_id, "state": "done", **asdict(success.source), **facts, **timings}


def _failed_values(failure: Failure) -> dict[str, Any]:
    source = asdict(failure.source) if failure.source else {"sha256": None, "bytes": None}
    return {
        "clip_id": failure.clip_id,
        "state": "failed",
        **source,
        **asdict(failure.timings),
        **_error_values(failure.error),
    }


def _retry_values(failure: Failure, tries: int, limits: Ledger) -> dict[str, Any]:
    pause_s = _pause_s(failure.error, tries, limits)
    return {"clip_id": failure.clip_id, "state": "pending", "pause_s": pause_s, **_error_values(failure.error)}


def _error_values(error: ClipError) -> dict[str, Any]:
    return {"error_code": error.code, "error_stage": error.stage, "error": str(error)}


def _another_try(failure: Failure, tries: int, limits: Ledger) -> bool:
    return failure.error.transient and tries < limits.max_attempts


def _pause_s(error: ClipError, tries: int, limits: Ledger) -> float:
    # Half the pause is chance, so that clips that failed together do not come back together.
    backoff = limits.retry_base_s * 2 ** (tries - 1) * random.uniform(0.5, 1.5)  # noqa: S311 - not a secret
    return float(min(limits.retry_cap_s, max(backoff, error.facts.get("retry_after_s") or 0.0)))


def _insert_predictions(connection: sa.Connection, done: list[Success], label_ids: Sequence[int]) -> None:
    rows = [{"clip_id": success.clip_id, **row} for success in done for row in _ranked(success.predictions, label_ids)]
    windows = [
        {"clip_id": success.clip_id, "start_s": window.start_s, "end_s": window.end_s, **row}
        for success in done
        for window in success.windows
        for row in _ranked(window.predictions, label_ids)
    ]
    for table, values in ((Prediction, rows), (WindowPrediction, windows)):
        if values:
            connection.execute(sa.insert(table), values)


def _ranked(predictions: Iterable[words.Prediction], label_ids: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {"rank": rank, "label_id": label_ids[prediction.label], "score": prediction.score}
        for rank, prediction in enumerate(predictions, 1)
    ]


def _insert_new(connection: sa.Connection, table: type[Base]) -> Any:
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table).on_conflict_do_nothing()
