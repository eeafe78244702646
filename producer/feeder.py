"""Keep the queue topped up from the ledger: due clips in, chunks out; what was lost on the way is found again."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from more_itertools import chunked, interleave_evenly, interleave_longest

from db import ledger
from earmark import broker
from earmark.clips import Chunk

if TYPE_CHECKING:
    from collections.abc import Iterable

    import sqlalchemy as sa

    from db.ledger import Picked, PickedClip
    from earmark.settings import Settings

#: Chunks picked in one transaction: few enough that it is short.
CHUNKS_AT_ONCE = 16
#: By database and run, the last clip picked.
_picked: WeakKeyDictionary[sa.Engine, dict[int, int]] = WeakKeyDictionary()


def feed(engine: sa.Engine, settings: Settings) -> int:
    """Take back what was lost, then fill the queue to its high mark if it is below the low one; return chunks sent.

    The marks grow with what workers hold, so that a large cluster finds enough and a small one makes Redis hold little.
    Several feeders may run at once. A feeder that dies between marking and sending leaves `queued` clips whose
    lease ends.

    Raises:
        ServiceError: the broker or the database is out of reach.
    """
    ledger.take_back(engine, settings.broker.queue)
    waiting, in_hand = broker.queue_length(), broker.chunks_in_hand()
    _take_back_wiped(engine, settings, idle=waiting == in_hand == 0)
    high = max(settings.broker.high_water, 2 * in_hand)
    sent = 0
    while waiting + sent <= (high if sent else high // 2):
        chunks = _top_up(engine, settings, min(CHUNKS_AT_ONCE, high - waiting - sent))
        sent += chunks
        if not chunks:
            break
    return sent


def _take_back_wiped(engine: sa.Engine, settings: Settings, *, idle: bool) -> None:
    limits = settings.ledger
    if broker.mark_queue():
        # Redis has forgotten the mark, and so every chunk, however young.
        ledger.take_back_queued(engine, settings.broker.queue, limits.model_copy(update={"lost_after_s": -1.0}))
    elif idle:
        ledger.take_back_queued(engine, settings.broker.queue, limits)


def _top_up(engine: sa.Engine, settings: Settings, count: int) -> int:
    if count <= 0:
        return 0
    after = _picked.setdefault(engine, {})
    picked = ledger.pick(engine, settings.broker.queue, count, settings.ledger, after)
    chunks = list(interleave_evenly([_cut(part) for part in picked])) if picked else []
    broker.send_chunks(chunks)
    return len(chunks)


def _cut(picked: Picked) -> list[Chunk]:
    # A clip that was there when a worker died travels alone, so that it can take no neighbour with it.
    alone = [[clip] for clip in picked.clips if clip.crashes]
    together = chunked(_hosts_interleaved(clip for clip in picked.clips if not clip.crashes), picked.chunk_size)
    return [Chunk(picked.run_id, tuple((clip.id, clip.display_uri) for clip in clips)) for clips in [*alone, *together]]


def _hosts_interleaved(clips: Iterable[PickedClip]) -> Iterable[PickedClip]:
    by_host = groupby(sorted(clips, key=_host), key=_host)
    return interleave_longest(*[list(group) for _, group in by_host])


def _host(clip: PickedClip) -> str:
    return clip.display_uri.partition("://")[2].partition("/")[0]
