"""A list in, a run out: the run's row, its clips in bulk, the first feed of the queue."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from more_itertools import chunked, spy

from db import ledger
from earmark.errors import UsageError
from earmark.options import RunOptions
from producer.feeder import feed
from producer.sources import InputFormat, Tally, read_clips

if TYPE_CHECKING:
    from collections.abc import Iterable

    import sqlalchemy as sa

    from earmark.settings import Settings

#: Rows a transaction: large enough to be cheap, small enough that workers write in between.
ROWS_AT_ONCE = 2000
#: One message costs a worker 1.5 ms: a sixteenth of it a clip.
CHUNK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Submitted:
    """What became of a list: clips + blank lines are its lines."""

    run_id: int
    clips: int
    added: int
    blank: int

    @property
    def known(self) -> int:
        """Clips the run had already: duplicates in the list, or a list submitted before."""
        return self.clips - self.added


def submit(
    sources: Iterable[str],
    engine: sa.Engine,
    settings: Settings,
    *,
    options: RunOptions | None = None,
    name: str | None = None,
    input_format: InputFormat = "auto",
    url_col: str = "url",
    chunk_size: int = CHUNK_SIZE,
    limit: int | None = None,
) -> Submitted:
    """Record every clip of the sources as a row, then start to queue them.

    Args:
        name: an existing run of that name gets what is new in the list and goes on.

    Raises:
        UsageError: a source cannot be read, or holds no clip at all.
        ServiceError: the database or the broker is out of reach.
    """
    tally = Tally()
    clips = read_clips(sources, input_format=input_format, url_col=url_col, tally=tally)
    first, clips = spy(islice(clips, limit))
    if not first:
        raise UsageError(reason=f"There is no clip in {', '.join(sources)}.")
    options = options or RunOptions()
    run_id = ledger.open_run(engine, name, options, queue=settings.broker.queue, chunk_size=chunk_size)
    count = added = 0
    for batch in chunked(clips, ROWS_AT_ONCE):
        count += len(batch)
        added += ledger.add_clips(engine, run_id, batch)
        feed(engine, settings)
    return Submitted(run_id, count, added, tally.blank)
