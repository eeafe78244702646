"""What runs and workers change: open a run, claim its clips, finish or release them.

A clip's state moves pending -> queued -> running -> done | failed | cancelled. A queued or running
clip has a lease. Each function is one transaction. Times are from the database's clock, so that no
machine's own clock matters.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from db import brake, outcomes
from db.claims import Claim, Claimed
from db.dialects import dialect_of, now
from db.models import Base, Clip, Label, Lease, LedgerIdentity, Model, Run
from db.session import execute, writing
from earmark.core.clips import Chunk, Outcome, Part, State
from earmark.core.errors import UsageError
from earmark.core.options import STOP_AT, RunOptions
from earmark.core.settings import Ledger

# An unfinished clip is found by `not_before`, which is null once it is final: the state would lead
# PostgreSQL to an index by state, which it takes for almost empty.
INSERT_LEASES = """
INSERT INTO leases (clip_id, run_id, until, token, worker)
SELECT id, run_id, {now} + :lease_s, :token, :worker FROM clips
WHERE id IN {ids} AND not_before <= {now} + CASE WHEN run_id = :run_id THEN 0 ELSE :ahead_s END
AND EXISTS (
    SELECT 1 FROM runs WHERE runs.id = clips.run_id AND paused IS NULL
    AND (runs.id = :run_id OR pass_id = (SELECT pass_id FROM runs WHERE id = :run_id))
)
AND :ledger_id = (SELECT id FROM ledger)
ORDER BY id
ON CONFLICT (clip_id) DO UPDATE
SET until = excluded.until, token = excluded.token, worker = excluded.worker
WHERE leases.token IS NULL OR leases.token = excluded.token RETURNING clip_id
"""
#: Those clips of the other runs of a pass that are the same as clips that are due. A suspect is
#: worked on alone, in each run. SQLite keeps to the order of cross joins: most runs have no pass,
#: and end with the first.
SELECT_SAME_CLIPS = """
SELECT same.id FROM runs mine CROSS JOIN runs theirs CROSS JOIN clips own CROSS JOIN clips same
WHERE mine.id = :run_id AND mine.pass_id IS NOT NULL
AND theirs.pass_id = mine.pass_id AND theirs.id <> mine.id
AND own.id IN {ids} AND own.crashes = 0 AND own.not_before <= {now}
AND same.run_id = theirs.id AND same.uri_key = own.uri_key AND same.crashes = 0
"""
#: A clip is taken along however long it would pause, so that it is fetched once for all runs.
AHEAD_S = 1e9
SELECT_LEASED = """
SELECT c.id, c.run_id, c.uri, c.attempts + 1 AS attempts, c.crashes, c.given_back_by,
c.start_s, c.end_s, c.member, c.member_offset, c.member_bytes, c.packing,
CASE WHEN r.follows IS NOT NULL THEN coalesce((
    SELECT first.id FROM clips first WHERE first.run_id = r.follows AND first.uri_key = c.uri_key
), 0) END AS first
FROM clips c JOIN runs r ON r.id = c.run_id
WHERE c.id IN {ids} AND c.not_before IS NOT NULL ORDER BY c.id
"""
WHOLE = Part()


class OtherLedgerError(Exception):
    """The chunk is of another ledger: its ids are those of other clips there."""

    def __init__(self, ledger_id: str) -> None:
        super().__init__(ledger_id)
        #: The ledger of this database.
        self.ledger_id = ledger_id


class NoSuchRunError(Exception):
    """The chunk is of this ledger, which does not have its run."""


def open_run(
    engine: sa.Engine,
    name: str | None,
    options: RunOptions,
    *,
    queue: str,
    chunk_size: int | None = None,
    priority: int = 1,
    reuse_urls: bool = False,
    stop_at: float = STOP_AT,
) -> int:
    """Return the id of the run of that name, made now unless it exists.

    A run without a name gets `run-<id>`. One that is paused goes on.

    Args:
        stop_at: the share of failures at which the brake pauses the run; 1: never.

    Raises:
        UsageError: a run of that name has other options: its results would not be comparable.
    """
    changing = {"queue": queue, "priority": priority, "reuse_urls": reuse_urls, "stop_at": stop_at}
    values = {**changing, "options": options.as_json(), "chunk_size": chunk_size or 0}
    with writing(engine) as connection:
        if name is None:
            return _insert_unnamed(connection, values)
        run = _find_or_insert(connection, name, values)
        kept = RunOptions.from_json(run.options)
        if kept != options:
            raise UsageError(
                reason=f"The run {name!r} exists with another {_differing(kept, options)};"
                " use another --name."
            )
        connection.execute(sa.update(Run).where(Run.id == run.id).values(**changing))
        brake.let_go(connection, run.id)
        return int(run.id)


def _differing(kept: RunOptions, options: RunOptions) -> str:
    names = RunOptions.__slots__
    return ", ".join(name for name in names if getattr(kept, name) != getattr(options, name))


def _find_or_insert(connection: sa.Connection, name: str, values: dict[str, Any]) -> sa.Row[Any]:
    named = sa.select(Run.id, Run.options).where(Run.name == name)
    run = connection.execute(named).first()
    if run is not None:
        return run
    # Another submission may insert the same name now: the statement then waits and inserts nothing.
    connection.execute(_insert_new(connection, Run).values(name=name, created_at=now(), **values))
    return connection.execute(named).one()


def _insert_unnamed(connection: sa.Connection, values: dict[str, Any]) -> int:
    row = sa.insert(Run).values(name=f"run-{secrets.token_hex(8)}", created_at=now(), **values)
    run_id = connection.execute(row.returning(Run.id)).scalar_one()
    connection.execute(sa.update(Run).where(Run.id == run_id).values(name=f"run-{run_id}"))
    return int(run_id)


def new_token() -> int:
    """Return a token for one claim."""
    return secrets.randbits(63)


def claim(
    engine: sa.Engine, chunk: Chunk, *, worker: str, limits: Ledger, token: int | None = None
) -> Claim:
    """Take the clips of a chunk's run that are still to do, and the same clips of its pass.

    Clips that are final, running elsewhere, not yet due or of another run are left out. So a
    message that is delivered twice does no harm.

    Args:
        token: a claim whose answer was lost with the connection is repeated with its token, and
            gets the same clips.

    Raises:
        OtherLedgerError: the chunk is of another ledger.
        NoSuchRunError: the ledger does not have the chunk's run.
    """
    token = new_token() if token is None else token
    ids = [clip_id for clip_id, _ in chunk.clips]
    lease = {
        "run_id": chunk.run_id,
        "ledger_id": chunk.ledger_id,
        "token": token,
        "worker": worker,
        "lease_s": limits.lease_s,
        "ahead_s": AHEAD_S,
    }
    with writing(engine) as connection:
        same = execute(connection, SELECT_SAME_CLIPS, run_id=chunk.run_id, ids=ids).scalars()
        leased = execute(connection, INSERT_LEASES, ids=[*ids, *same], **lease).scalars().all()
        if not leased:
            _check_origin(connection, chunk)
        # Read once they are leased: a moment before, another worker may have finished them.
        rows = execute(connection, SELECT_LEASED, ids=leased).all()
        if finished := set(leased) - {row.id for row in rows}:
            outcomes.release(connection, token, finished)
        return Claim(token, tuple(_claimed(row) for row in rows), chunk.run_id)


def _claimed(row: sa.Row[Any]) -> Claimed:
    part = Part.of(row._asdict())
    return Claimed(
        row.id,
        row.uri,
        row.attempts,
        row.crashes,
        row.given_back_by,
        None if part == WHOLE else part,
        row.run_id,
        row.first,
    )


def _check_origin(connection: sa.Connection, chunk: Chunk) -> None:
    here = str(connection.execute(sa.select(LedgerIdentity.id)).scalar_one())
    if chunk.ledger_id != here:
        raise OtherLedgerError(here)
    if connection.execute(sa.select(Run.id).where(Run.id == chunk.run_id)).first() is None:
        raise NoSuchRunError


def renew(engine: sa.Engine, tokens: Iterable[int], limits: Ledger) -> None:
    """Lengthen the leases of the claims a worker still works on."""
    if held := list(tokens):
        statement = sa.update(Lease).where(Lease.token.in_(held))
        with writing(engine) as connection:
            connection.execute(statement.values(until=now() + limits.lease_s))


def release(engine: sa.Engine, token: int, delays_s: Mapping[int, float]) -> None:
    """Give clips back untried, each to be taken up again after its delay in seconds."""
    if not delays_s:
        return
    later = sa.update(Clip).where(Clip.id == sa.bindparam("clip_id"))
    later = later.values(not_before=now() + sa.bindparam("pause_s"))
    with writing(engine) as connection:
        held = outcomes.held(connection, token, delays_s)
        rows = [{"clip_id": clip_id, "pause_s": delays_s[clip_id]} for clip_id in held]
        if rows:
            connection.execute(later, rows)
        outcomes.release(connection, token, delays_s)


def finish(
    engine: sa.Engine,
    claim: Claim,
    ended: Sequence[Outcome],
    label_ids: Sequence[int],
    limits: Ledger,
) -> dict[str, int]:
    """Write results and final states of the clips that this claim still holds, in one transaction.

    A transient failure with tries left goes back to `pending` instead, with a pause. Returns how
    many clips were `done`, `failed`, to be `retried`, `given_back` to other workers, and `lost` to
    another worker after the lease had ended.
    """
    claimed = {clip.id: clip for clip in claim.clips}
    with writing(engine) as connection:
        counts = outcomes.write(connection, claim.token, ended, claimed, label_ids, limits)
    lost = len(ended) - counts.total()
    return {
        "done": counts[State.done],
        "failed": counts[State.failed],
        "retried": counts[State.pending],
        "given_back": counts["given_back"],
        "lost": lost,
    }


def register_model(
    engine: sa.Engine, labels: Sequence[str], **identity: Any
) -> tuple[int, tuple[int, ...]]:
    """Return the id of a model and of its labels, in the model's order, adding what is new.

    Args:
        labels: the model's label names, by position.
        identity: the columns of `models` that identify it.
    """
    same = (
        Model.name == identity["name"],
        Model.revision == identity["revision"],
        Model.sha256 == identity["sha256"],
    )
    with writing(engine) as connection:
        connection.execute(_insert_new(connection, Model).values(**identity, created_at=now()))
        model_id = connection.execute(sa.select(Model.id).where(*same)).scalar_one()
        rows = []
        for position, name in enumerate(labels):
            rows.append({"model_id": model_id, "position": position, "name": name})
        connection.execute(_insert_new(connection, Label), rows)
        ids = sa.select(Label.id).where(Label.model_id == model_id).order_by(Label.position)
        return model_id, tuple(connection.scalars(ids))


def settle_model(engine: sa.Engine, run_id: int, model_id: int) -> int:
    """Make this the run's model, unless another worker has settled it; return the run's model."""
    unsettled = sa.update(Run).where(Run.id == run_id, Run.model_id.is_(None))
    settled = sa.select(Run.model_id).where(Run.id == run_id)
    with writing(engine) as connection:
        connection.execute(unsettled.values(model_id=model_id))
        return connection.execute(settled).scalar_one()  # type: ignore[return-value]


def _insert_new(connection: sa.Connection, table: type[Base]) -> Any:
    return dialect_of(connection).insert(table).on_conflict_do_nothing()
