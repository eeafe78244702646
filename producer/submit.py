"""A list in, a run out: the run's row, its clips in bulk, the first feed of the queue."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import TypedDict, Unpack

import sqlalchemy as sa
from more_itertools import spy

from db import access, bulk_insert, known_rows, passes, worker_registry
from db.bulk_insert import Listed, listed
from db.identity import with_queue
from db.known_rows import KnownRows
from db.worker_registry import WorkerUp
from earmark.core import broker
from earmark.core.clips import KEY_BYTES, Clip
from earmark.core.errors import UsageError
from earmark.core.options import Duplicates, Listing, RunOptions
from earmark.core.settings import Fetch, Settings
from producer.feeder import Feeder
from producer.sources import read_clips
from producer.tally import Tally

#: The first clips of a list show whether the workers may read its files.
LOOKED_AT = 100
#: Rows a transaction: many enough to be cheap, few enough that workers can write in between.
ROWS_AT_ONCE = 10_000
#: Rows sorted by key before they are written, so that several fall on one page of the key index.
ROWS_SORTED = 200_000
CHARS_SORTED = 64 * 1024**2
#: Connections that write. PostgreSQL takes longer to insert a row than we take to read it, and
#: inserts over two connections at once. SQLite allows one writer.
WRITERS = {"sqlite": 1, "postgresql": 2}
#: Thread switch interval (GIL) while a list is submitted. The writer takes the GIL about ten times
#: a statement; at Python's 5 ms it would wait longer for the reader than for the database.
SWITCH_INTERVAL_S = 0.0005


class KeptOptions(TypedDict, total=False):
    """What is kept with the run besides its options."""

    #: Clips in a message; default: as many as the workers' devices score at once.
    chunk_size: int | None
    #: The run's share of the workers, relative to the priorities of other runs.
    priority: int
    #: Without a download, take the result that the URL has in another run of the same model and
    #: options.
    reuse_urls: bool
    #: The share of failures on every worker at which the run pauses; 1: never.
    stop_at: float


@dataclass(frozen=True, slots=True)
class Submitted:
    """Runs, and the counts of their list: new clips, known ones, refused lines."""

    #: Several if they are done in one pass.
    run_ids: list[int]
    tally: Tally
    added: int
    #: How the rows of known clips differed from them.
    differing: KnownRows = field(default_factory=KnownRows)
    #: Whether clips whose file had changed went back to work.
    again: bool = False

    @property
    def run_id(self) -> int:
        return self.run_ids[0]

    @property
    def known(self) -> int:
        """Clips that the run had already: duplicates in the list, or a list submitted before."""
        return self.tally.clips - self.added

    def report(self) -> list[str]:
        """Return sentences about the list's lines; none if each line was one new clip."""
        tally = self.tally
        counts = {
            "known already": self.known,
            "blank or comment": tally.blank,
            "not audio": tally.not_audio,
            "refused": tally.refused,
        }
        if any(counts.values()):
            counts["header or further line of a cell"] = tally.extra
        parts = [f"{count} {kind}" for kind, count in counts.items() if count]
        lines = []
        if parts:
            new = f"{self.added} new"
            lines.append(f"Of {tally.lines} lines or files: {', '.join([new, *parts])}.")
        lines += [f"  {refused}" for refused in tally.examples]
        more = tally.refused + tally.passed_over - len(tally.examples)
        if more:
            lines.append(f"  and {more} more")
        return [*tally.notes, *lines, *self._remarks()]

    def _remarks(self) -> list[str]:
        differing, tally = self.differing, self.tally
        done = "went back to work" if self.again else "keep their results; --again redoes them"
        remarks = {
            f"Files that are not there: {tally.missing}, the first at {tally.tried}; names are"
            " relative to the list's folder, or to --base.": tally.missing,
            f"Rows with other columns for a clip that is known, dropped: {differing.other_columns};"
            " --duplicates keep makes each row a clip of its own.": differing.other_columns,
            f"Clips that have a new URL now: {differing.fresh_urls}; `earmark retry` takes up those"
            " that had failed.": differing.fresh_urls,
            f"Files that changed since they were classified: {differing.changed_files}; they"
            f" {done}.": differing.changed_files,
        }
        return [remark for remark, count in remarks.items() if count]


def submit(
    sources: str | Iterable[str | Clip],
    engine: sa.Engine,
    settings: Settings,
    *,
    options: RunOptions | Sequence[RunOptions] | None = None,
    name: str | None = None,
    listing: Listing | None = None,
    duplicates: Duplicates = "merge",
    again: bool = False,
    limit: int | None = None,
    tell: Callable[[str], None] | None = None,
    **kept: Unpack[KeptOptions],
) -> Submitted:
    """Record every clip of the sources as a row, then start to queue them for workers.

    Args:
        options: of several models, each makes a run of its own, and one pass serves all.
        name: if a run of this name exists, the list's new clips are added to it.
        duplicates: `keep` makes each row a clip of its own, with about 100 bytes in memory.
        again: clips whose local file has changed go back to work.
        tell: gets a sentence if no worker that is up may read the files of the list.

    Raises:
        UsageError: a source cannot be read, or no source holds a clip.
        ServiceError: the database or the broker is out of reach, or the database is read-only.
    """
    access.check_writable(engine)
    tally = Tally()
    first, clips = _read(sources, listing, limit, tally, settings.fetch)
    settings = with_queue(settings, engine)
    queue = str(settings.broker.queue)
    broker.configure(settings.broker)
    broker.check()
    if tell and (sentence := unreadable(first, worker_registry.up(engine, queue))):
        tell(sentence)
    run_ids = passes.open_runs(engine, name, options or RunOptions(), queue=queue, **kept)
    writer = _Writer(run_ids, engine, Feeder(engine, settings), settings.ledger.feed_every_s, again)
    added = _add(map(listed, clips) if duplicates == "merge" else _each_row(clips), writer)
    return Submitted(run_ids, tally, added, writer.differing, again)


def _read(
    sources: str | Iterable[str | Clip],
    listing: Listing | None,
    limit: int | None,
    tally: Tally,
    fetch: Fetch,
) -> tuple[list[Clip], Iterator[Clip]]:
    """Return the first clips of the sources, and all of them."""
    sources = [sources] if isinstance(sources, str) else list(sources)
    first, clips = spy(islice(read_clips(sources, listing, tally, fetch), limit), LOOKED_AT)
    if not first:
        reasons = "".join(f" {refused}." for refused in tally.examples)
        raise UsageError(reason=f"There is no clip in {', '.join(map(str, sources))}.{reasons}")
    return first, clips


def unreadable(clips: Iterable[Clip], up: Sequence[WorkerUp]) -> str | None:
    """Return a sentence if there are workers, and none of them may read a file among the clips."""
    for clip in clips:
        if up and clip.uri.startswith("/") and not any(_may_read(worker, clip) for worker in up):
            return (
                f"None of the {len(up)} workers that are up may read {clip.uri}: set"
                " EARMARK_FETCH__FILE_ROOTS to a folder above it where they run."
            )
    return None


def _may_read(worker: WorkerUp, clip: Clip) -> bool:
    return any(Path(clip.uri).is_relative_to(root) for root in worker.file_roots)


def _each_row(clips: Iterable[Clip]) -> Iterator[Listed]:
    """Yield the rows of a list, each with a key of its own."""
    seen: Counter[bytes] = Counter()
    for clip in clips:
        key, uri, meta, part, renews_url = listed(clip)
        # By its columns, not by its place: a list may be extended or put into another order.
        columns = _digest(key + (meta or "").encode())
        seen[columns] += 1
        yield _digest(columns + seen[columns].to_bytes(8)), uri, meta, part, renews_url


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=KEY_BYTES).digest()


def _add(rows: Iterable[Listed], writer: _Writer) -> int:
    # One window is written while the next one is read and hashed.
    threads = ThreadPoolExecutor(WRITERS[writer.engine.dialect.name])
    writes: list[Future[int]] = []
    added = 0
    try:
        with _short_switch_interval():
            for window in _windows(rows):
                added += sum(write.result() for write in writes)
                writes = [threads.submit(writer.write, batch) for batch in _batches(window)]
                # The writers hold the rows now, and free each batch once it is written.
                window.clear()
            added += sum(write.result() for write in writes)
    finally:
        threads.shutdown(cancel_futures=True)
    writer.feeder.feed()
    return added


@contextmanager
def _short_switch_interval() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@dataclass(slots=True)
class _Writer:
    """Writes rows from several threads, and feeds the queue in between."""

    run_ids: list[int]
    engine: sa.Engine
    feeder: Feeder
    feed_every_s: float
    again: bool
    differing: KnownRows = field(default_factory=KnownRows)
    fed: float = float("-inf")
    feeding: Lock = field(default_factory=Lock)
    mostly_known: bool = False

    def write(self, rows: list[Listed]) -> int:
        added = compared = dict.fromkeys(self.run_ids, rows)
        if self.mostly_known:
            added, compared = {}, {}
            for run_id in self.run_ids:
                unlike = known_rows.unlike(self.engine, run_id, rows)
                added[run_id], compared[run_id] = unlike
        counts = bulk_insert.add(self.engine, added)
        new = max(counts.values())
        self.mostly_known = new < len(rows) / 2
        differing = KnownRows()
        for run_id in self.run_ids:
            if counts[run_id] < len(compared[run_id]):
                differing = known_rows.settle(
                    self.engine, run_id, compared[run_id], again=self.again
                )
        with self.feeding:
            self.differing.add(differing)
            if time.monotonic() - self.fed > self.feed_every_s:
                self.feeder.feed()
                self.fed = time.monotonic()
        return new


def _windows(rows: Iterable[Listed]) -> Iterator[list[Listed]]:
    """Yield rows in growing windows: the first in the list's order, the others sorted by key."""
    all_rows = iter(rows)
    size = ROWS_AT_ONCE
    # Workers can begin with the first window at once.
    yield _take(all_rows, size)
    while True:
        size = min(size * 3, ROWS_SORTED)
        window = _take(all_rows, size)
        if not window:
            return
        window.sort(key=itemgetter(0))
        yield window


def _batches(window: list[Listed]) -> list[list[Listed]]:
    """Divide a window into transactions; rows of one clip stay together, the first in front."""
    batches = []
    start = 0
    while start < len(window):
        end = min(start + ROWS_AT_ONCE, len(window))
        while end < len(window) and window[end][0] == window[end - 1][0]:
            end += 1
        batches.append(window[start:end])
        start = end
    return batches


def _take(all_rows: Iterator[Listed], most: int) -> list[Listed]:
    rows, chars = [], 0
    for row in islice(all_rows, most):
        rows.append(row)
        chars += len(row[1]) + len(row[2] or "")
        if chars > CHARS_SORTED:
            break
    return rows
