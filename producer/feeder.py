"""Keep the queue topped up from the ledger: due clips in, chunks out, lost clips sent again."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable

import sqlalchemy as sa
from more_itertools import chunked, interleave_evenly, interleave_longest

from db import feeding
from db.feeding import Picked, PickedClip
from db.identity import ledger_id
from earmark.core import broker
from earmark.core.clips import Chunk
from earmark.core.errors import DatabaseError
from earmark.core.options import CHUNK_SIZE
from earmark.core.settings import Settings

#: Batches of a device in a chunk: half of the overhead that one would have.
BATCHES = 2
#: Clips of a chunk at most, whatever a device takes.
MOST_CLIPS = 1000
#: Chunks picked in one transaction, so that it ends within milliseconds.
CHUNKS_AT_ONCE = 16


class Feeder:
    """Moves clips from one database's ledger to one queue.

    Use one per process that submits or works, and call `feed` twice a second. Any number of
    feeders may run at once: they share the ledger's locks. A feeder that dies between marking
    clips as `queued` and sending them loses nothing, as another feeder finds these clips.
    """

    def __init__(self, engine: sa.Engine, settings: Settings) -> None:
        self._engine = engine
        assert settings.broker.queue
        self._queue = settings.broker.queue
        self._high_water = settings.broker.high_water
        self._ledger_settings = settings.ledger
        #: By run id, the id of the last clip picked.
        self._picked: dict[int, int] = {}
        self._settled_at = 0.0
        self._ledger_id: str | None = None
        #: Whether the queue also holds chunks of other ledgers.
        self.shares_queue = False
        #: How many windows a worker in this process scores at once.
        self.batch_windows = 0
        #: Clips taken back from dead workers since this feeder started.
        self.taken_back = 0

    def feed(self) -> int:
        """Take back lost clips, then fill the queue; return how many chunks were sent.

        Filling starts below half of the high-water mark and stops at the mark. The mark is at
        least twice the number of chunks that workers hold, so that a large cluster never finds
        the queue empty, and a small one keeps little in Redis.

        Raises:
            ServiceError: the broker or the database is out of reach.
        """
        if self.batch_windows > CHUNK_SIZE:
            broker.note_batch(self.batch_windows)
        try:
            if time.monotonic() >= self._settled_at:
                self.taken_back += feeding.take_back(self._engine, self._queue)
            waiting = self._take_back_lost()
            return self._fill(waiting, max(self._high_water, 2 * broker.chunks_in_hand()))
        except DatabaseError:
            # Workers could not renew their leases either.
            self._settled_at = time.monotonic() + self._ledger_settings.settle_s
            raise

    def _take_back_lost(self) -> int:
        """Take back `queued` clips that the queue has lost; return how many chunks wait."""
        queue_lease_s = self._ledger_settings.queue_lease_s
        self._ledger_id = self._ledger_id or ledger_id(self._engine)
        if broker.mark_queue(self._ledger_id):
            # Redis has lost the mark, and every chunk with it, however young.
            feeding.take_back_queued(self._engine, self._queue, queue_lease_s)
        waiting = broker.queue_length()
        if not waiting:
            # A worker claims a chunk as soon as it leaves the queue, unless the worker dies first.
            lost_after_s = self._ledger_settings.lost_after_s
            feeding.take_back_queued(self._engine, self._queue, queue_lease_s - lost_after_s)
        if self.shares_queue:
            # The chunks of a ledger that has no workers must not keep this ledger's chunks out.
            own = feeding.queued_chunks(self._engine, self._queue, _chunk_size())
            waiting = min(waiting, own)
        return waiting

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
        picked = feeding.pick(
            self._engine, self._queue, count, self._ledger_settings, self._picked, _chunk_size()
        )
        if not picked:
            return 0
        chunks = list(interleave_evenly([_cut(run) for run in picked]))
        broker.send_chunks(chunks)
        return len(chunks)


def _chunk_size() -> int:
    """Return the size of chunks that fills the batches of the workers."""
    return min(max(CHUNK_SIZE, BATCHES * broker.noted_batch()), MOST_CLIPS)


def _cut(picked: Picked) -> list[Chunk]:
    """Cut the clips picked for one run into chunks."""
    suspects = [clip for clip in picked.clips if clip.crashes]
    innocent = [clip for clip in picked.clips if not clip.crashes]

    # A suspect travels alone, so that it takes no neighbour with it.
    groups = [[clip] for clip in suspects]
    groups += chunked(_interleave_hosts(innocent), picked.chunk_size)
    return [_chunk(picked, clips) for clips in groups]


def _chunk(picked: Picked, clips: list[PickedClip]) -> Chunk:
    named = tuple((clip.id, clip.display_uri) for clip in clips)
    return Chunk(picked.ledger_id, picked.run_id, named, picked.run_name)


def _interleave_hosts(clips: list[PickedClip]) -> Iterable[PickedClip]:
    """Order clips so that neighbours are of different hosts."""
    by_host = defaultdict(list)
    for clip in clips:
        by_host[_host(clip)].append(clip)
    return interleave_longest(*by_host.values())


def _host(clip: PickedClip) -> str:
    return clip.display_uri.partition("://")[2].partition("/")[0]
