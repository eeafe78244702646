"""Keep the queue topped up from the ledger: due clips in, chunks out; what was lost on the way is found again."""

from __future__ import annotations

import time
from itertools import groupby
from typing import TYPE_CHECKING

from more_itertools import chunked, interleave_evenly, interleave_longest

from db import feeding
from db.identity import ledger_id
from earmark.core import broker
from earmark.core.clips import Chunk
from earmark.core.errors import DatabaseError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import sqlalchemy as sa

    from db.feeding import Picked, PickedClip
    from earmark.core.settings import Settings

#: Chunks picked in one transaction: few enough that it takes no more than some milliseconds.
CHUNKS_AT_ONCE = 16


class Feeder:
    """Moves clips from one database's ledger to one queue; several may run at once, in any processes.

    One that dies between marking and sending leaves `queued` clips that another finds lost.
    """

    def __init__(self, engine: sa.Engine, settings: Settings) -> None:
        self._engine = engine
        assert settings.broker.queue
        self._queue = settings.broker.queue
        self._high_water = settings.broker.high_water
        self._limits = settings.ledger
        #: By run, the last clip picked.
        self._picked: dict[int, int] = {}
        self._settled_at = 0.0
        self._ledger_id: str | None = None
        #: Whether other ledgers' chunks are in the queue too.
        self.shares_queue = False
        #: Clips whose lease had ended, so far.
        self.taken_back = 0

    def feed(self) -> int:
        """Take back what was lost, then fill the queue to its high mark if it is below the low one; return chunks sent.

        The marks grow with what workers hold, so that a large cluster finds enough and a small one makes Redis hold
        little.

        Raises:
            ServiceError: the broker or the database is out of reach.
        """
        try:
            if time.monotonic() >= self._settled_at:
                self.taken_back += feeding.take_back(self._engine, self._queue)
            waiting = self._take_back_lost()
            return self._fill(waiting, max(self._high_water, 2 * broker.chunks_in_hand()))
        except DatabaseError:
            # Workers could not renew their leases either.
            self._settled_at = time.monotonic() + self._limits.settle_s
            raise

    def _take_back_lost(self) -> int:
        """Return how many chunks wait, having taken back the clips that a queue without them should hold."""
        self._ledger_id = self._ledger_id or ledger_id(self._engine)
        if broker.mark_queue(self._ledger_id):
            # Redis has forgotten the mark, and so every chunk, however young.
            feeding.take_back_queued(self._engine, self._queue, self._limits.queue_lease_s)
        waiting = broker.queue_length()
        if not waiting:
            # A chunk that left the queue is claimed at once, unless its worker died first.
            feeding.take_back_queued(
                self._engine, self._queue, self._limits.queue_lease_s - self._limits.lost_after_s
            )
        # Else the chunks of a ledger without workers would keep this ledger's out.
        return (
            min(waiting, feeding.queued_chunks(self._engine, self._queue))
            if self.shares_queue
            else waiting
        )

    def _fill(self, waiting: int, high: int) -> int:
        sent = 0
        while waiting + sent <= (high if sent else high // 2):
            chunks = self._top_up(min(CHUNKS_AT_ONCE, high - waiting - sent))
            sent += chunks
            if not chunks:
                break
        return sent

    def _top_up(self, count: int) -> int:
        if count <= 0:
            return 0
        picked = feeding.pick(self._engine, self._queue, count, self._limits, self._picked)
        chunks = list(interleave_evenly([_cut(part) for part in picked])) if picked else []
        broker.send_chunks(chunks)
        return len(chunks)


def _cut(picked: Picked) -> list[Chunk]:
    # A clip that was there when a worker died travels alone, so that it can take no neighbour with it.
    alone = [[clip] for clip in picked.clips if clip.crashes]
    together = chunked(
        _hosts_interleaved(clip for clip in picked.clips if not clip.crashes), picked.chunk_size
    )
    return [_chunk(picked, clips) for clips in [*alone, *together]]


def _chunk(picked: Picked, clips: list[PickedClip]) -> Chunk:
    return Chunk(
        picked.ledger_id, picked.run_id, tuple((clip.id, clip.display_uri) for clip in clips)
    )


def _hosts_interleaved(clips: Iterable[PickedClip]) -> Iterable[PickedClip]:
    by_host = groupby(sorted(clips, key=_host), key=_host)
    return interleave_longest(*[list(group) for _, group in by_host])


def _host(clip: PickedClip) -> str:
    return clip.display_uri.partition("://")[2].partition("/")[0]
