"""The workers that are up: what they may read, and why some of them take no chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from db.dialects import dialect_of, now
from db.models import Worker
from db.session import fetch, writing

#: A worker that was not seen for so long is not up: six of its beats.
UP_S = 30.0
#: Its row is deleted after this.
FORGET_S = 3600.0


@dataclass(frozen=True, slots=True)
class Pause:
    """Why a worker takes no chunks; the run is the one whose clips it fails, if it is that."""

    reason: str
    run_id: int | None = None


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A worker that is up."""

    name: str
    file_roots: tuple[str, ...]
    pause: Pause | None
    #: Since its pause began.
    paused_s: float


def beat(
    engine: sa.Engine, name: str, queue: str, file_roots: Sequence[str], pause: Pause | None
) -> None:
    """Note that a worker is up, and whether it pauses."""
    changing: dict[str, Any] = {
        "seen_at": now(),
        "paused": pause and pause.reason,
        "paused_run_id": pause and pause.run_id,
        "paused_at": sa.null(),
    }
    row = {"name": name, "queue": queue, "file_roots": list(file_roots), **changing}
    if pause:
        row["paused_at"] = now()
        # The pause has begun with the first beat that told it.
        changing["paused_at"] = sa.func.coalesce(Worker.paused_at, now())
    with writing(engine) as connection:
        insert = dialect_of(connection).insert(Worker).values(**row)
        connection.execute(
            insert.on_conflict_do_update(index_elements=[Worker.name], set_=changing)
        )
        connection.execute(sa.delete(Worker).where(Worker.seen_at < now() - FORGET_S))


def leave(engine: sa.Engine, name: str) -> None:
    """Note that a worker has ended."""
    with writing(engine) as connection:
        connection.execute(sa.delete(Worker).where(Worker.name == name))


def up(engine: sa.Engine, queue: str) -> list[WorkerUp]:
    """Return the workers of a queue that are up, by name."""
    statement = sa.select(Worker.__table__, (now() - Worker.paused_at).label("paused_s"))
    statement = statement.where(Worker.seen_at > now() - UP_S, Worker.queue == queue)
    workers = []
    for row in fetch(engine, statement.order_by(Worker.name)):
        pause = Pause(row.paused, row.paused_run_id) if row.paused else None
        workers.append(WorkerUp(row.name, tuple(row.file_roots), pause, row.paused_s or 0.0))
    return workers
