"""Keep the queue topped up from the ledger: due clips in, chunks out; what was lost on the way is found again."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from more_itertools import chunked, interleave_longest

from db import ledger
from earmark import broker
from earmark.clips import Chunk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import sqlalchemy as sa

    from db.ledger import Picked, PickedClip
    from earmark.settings import Settings


def feed(engine: sa.Engine, settings: Settings) -> int:
    """Take back what was lost, then fill the queue to its high-water mark; return how many chunks were sent.

    Several feeders may run at once. A feeder that dies between marking and sending leaves `queued` clips whose
    lease ends.

    Raises:
        ServiceError: the broker or the database is out of reach.
    """
    queue, limits = settings.broker.queue, settings.ledger
    ledger.take_back(engine, queue)
    waiting = broker.queue_length()
    if waiting == 0 and broker.chunks_in_hand() == 0:
        ledger.take_back_queued(engine, queue, limits)
    if waiting > settings.broker.high_water // 2:
        return 0
    picked = ledger.pick(engine, queue, settings.broker.high_water - waiting, limits)
    chunks = list(interleave_longest(*(_cut(part) for part in picked)))
    broker.send_chunks(chunks)
    return len(chunks)


def _cut(picked: Picked) -> Iterator[Chunk]:
    # A clip that was there when a worker died travels alone, so that it can take no neighbour with it.
    alone = [[clip] for clip in picked.clips if clip.crashes]
    together = chunked(_hosts_interleaved(clip for clip in picked.clips if not clip.crashes), picked.chunk_size)
    for clips in [*alone, *together]:
        yield Chunk(picked.run_id, tuple((clip.id, clip.display_uri) for clip in clips))


def _hosts_interleaved(clips: Iterable[PickedClip]) -> Iterable[PickedClip]:
    by_host = groupby(sorted(clips, key=_host), key=_host)
    return interleave_longest(*[list(group) for _, group in by_host])


def _host(clip: PickedClip) -> str:
    return clip.display_uri.partition("://")[2].partition("/")[0]
