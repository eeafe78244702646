"""The identity of a ledger, and the queue that is named after it."""

from __future__ import annotations

import sqlalchemy as sa

from db.models import LedgerIdentity, Run
from db.session import fetch, fetch_column, writing
from earmark.core.settings import Settings

#: The queue of every ledger in Earmark 0.1.0.
OLD_QUEUE = "clips"
#: Two of a thousand ledgers on one Redis share these characters with a probability of 1 in 10,000.
#: Their messages still have different identities.
NAME_CHARS = 8


def ledger_id(engine: sa.Engine) -> str:
    """Return the identity of a database's ledger: random, and never changed."""
    (identity,) = fetch_column(engine, sa.select(LedgerIdentity.id))
    return str(identity)


def own_queue(ledger_id: str) -> str:
    """Return the queue of a ledger, so that several ledgers can share a Redis."""
    return f"{OLD_QUEUE}-{ledger_id[:NAME_CHARS]}"


def with_queue(settings: Settings, engine: sa.Engine) -> Settings:
    """Return the settings with the ledger's own queue, unless they name a queue.

    Runs that Earmark 0.1.0 put on the queue of all ledgers move to the ledger's own.
    """
    if settings.broker.queue:
        return settings
    queue = own_queue(ledger_id(engine))
    _move_old_runs(engine, queue)
    return settings.changed(broker={"queue": queue})


def has_runs(engine: sa.Engine) -> bool:
    """Say whether anything was ever submitted to this ledger and is still there."""
    return bool(fetch(engine, sa.select(Run.id).limit(1)))


def _move_old_runs(engine: sa.Engine, queue: str) -> None:
    old = Run.queue == OLD_QUEUE
    if fetch(engine, sa.select(Run.id).where(old).limit(1)):
        with writing(engine) as connection:
            connection.execute(sa.update(Run).where(old).values(queue=queue))
