"""A list in, a run out: the run's row, its clips in bulk, the first feed of the queue."""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from operator import itemgetter
from threading import Lock
from typing import TYPE_CHECKING, Any

from more_itertools import sliced, spy

from db import access, ledger, results, schema
from db.identity import with_queue
from db.listed import Listed, listed
from db.session import connect
from earmark import broker
from earmark.errors import ServiceError, UsageError
from earmark.options import RunOptions
from earmark.settings import Settings
from producer.feeder import Feeder
from producer.lists import InputFormat, Tally
from producer.sources import read_clips

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import sqlalchemy as sa

    from earmark.clips import Clip

#: Rows a transaction: large enough to be cheap, small enough that workers write in between.
ROWS_AT_ONCE = 10_000
#: Rows sorted before they are written: several of them then fall on one page of the index of keys.
ROWS_SORTED = 200_000
CHARS_SORTED = 64 * 1024**2
#: PostgreSQL takes longer for a row than we do, and takes two at a time from two connections; SQLite has one writer.
WRITERS = {"sqlite": 1, "postgresql": 2}
#: How long a thread waits for Python while another has it. The writer asks some ten times a statement: at Python's
#: own 5 ms it would wait longer for the reader than for the database.
TURN_S = 0.0005
#: One message costs a worker 1.5 ms: a sixteenth of it a clip.
CHUNK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Submitted:
    """A run, what became of the lines of its list, and a way to wait for it and read from it."""

    run_id: int
    tally: Tally
    added: int
    engine: sa.Engine = field(repr=False, compare=False)

    @property
    def clips(self) -> int:
        return self.tally.clips

    @property
    def blank(self) -> int:
        return self.tally.blank

    @property
    def known(self) -> int:
        """Clips the run had already: duplicates in the list, or a list submitted before."""
        return self.clips - self.added

    def report(self) -> list[str]:
        """Return sentences on the list's lines, where they were not simply one new clip each."""
        tally = self.tally
        counts = {
            "known already": self.known,
            "blank or comment": tally.blank,
            "refused": tally.refused,
            "header or further line of a cell": tally.extra if self.known or tally.blank or tally.refused else 0,
        }
        told = [f"{count} {what}" for what, count in counts.items() if count]
        examples = [f"  {refused}" for refused in tally.examples]
        more = tally.refused - len(examples)
        return [
            *([f"Of the list's {tally.lines} lines: {self.added} new, {', '.join(told)}."] if told else []),
            *examples,
            *([f"  and {more} more"] if more else []),
        ]

    def progress(self) -> results.Progress:
        """Return how far the run has come."""
        return results.progress(self.engine, self.run_id)

    def wait(self, timeout_s: float | None = None) -> results.Progress:
        """Return what the run came to, once every clip is final; its clips are worked on by workers elsewhere.

        Raises:
            TimeoutError: it is still going after so many seconds.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not (state := self.progress()).finished:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"{state.final} of {state.total} clips are final after {timeout_s} s.")
            time.sleep(0.5)
        return state

    def results(self, **conditions: Any) -> Iterator[dict[str, Any]]:
        """Yield the clips that are done, each with its best label; conditions as in db.results.results."""
        return results.rows(self.engine, results.results(self.run_id, **conditions))

    def failures(self) -> Iterator[dict[str, Any]]:
        """Yield the clips that failed, each with the reason."""
        return results.rows(self.engine, results.failures(self.run_id))


def submit(
    sources: Iterable[str] | str,
    engine: sa.Engine | None = None,
    settings: Settings | None = None,
    *,
    options: RunOptions | None = None,
    name: str | None = None,
    input_format: InputFormat = "auto",
    url_col: str = "url",
    chunk_size: int = CHUNK_SIZE,
    priority: int = 1,
    limit: int | None = None,
    reuse_urls: bool = False,
) -> Submitted:
    """Record every clip of the sources as a row, then start to queue them; workers do the rest.

    Args:
        engine: where the ledger is; default: the database of the settings.
        settings: default: those of the environment.
        name: an existing run of that name gets what is new in the list and goes on.
        priority: the run's share of the workers, in proportion to that of other runs.
        reuse_urls: take the result a URL has in another run of the same model and options, without a download.

    Raises:
        UsageError: a source cannot be read, or holds no clip at all.
        ServiceError: the database or the broker is out of reach, or the database can only be read.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    if engine is None or settings is None:
        settings = settings or Settings()
        engine = engine or _open(settings)
    access.check_writable(engine)
    tally = Tally()
    first, clips = spy(islice(read_clips(sources, input_format=input_format, url_col=url_col, tally=tally), limit))
    if not first:
        reasons = "".join(f" {refused}." for refused in tally.examples)
        raise UsageError(reason=f"There is no clip in {', '.join(sources)}.{reasons}")
    how: dict[str, Any] = {"chunk_size": chunk_size, "priority": priority, "reuse_urls": reuse_urls}
    settings = with_queue(settings, engine)
    broker.configure(settings.broker)
    broker.check()
    assert settings.broker.queue
    run_id = ledger.open_run(engine, name, options or RunOptions(), queue=settings.broker.queue, **how)
    added = _add(clips, run_id, engine, settings)
    return Submitted(run_id, tally, added, engine)


def _open(settings: Settings) -> sa.Engine:
    if settings.broker.url is None:
        raise ServiceError(reason="No broker is known: set EARMARK_BROKER__URL.")
    engine = connect(settings.database_url, settings.database)
    if engine.dialect.name == "sqlite":
        schema.upgrade(engine)
    return engine


def _add(clips: Iterable[Clip], run_id: int, engine: sa.Engine, settings: Settings) -> int:
    writing = _Writing(run_id, engine, Feeder(engine, settings), settings.ledger.feed_every_s)
    # One window is written while the next is read and hashed: the database need not wait for that.
    writers = ThreadPoolExecutor(WRITERS[engine.dialect.name])
    written: list[Future[int]] = []
    added = 0
    try:
        with _short_turns():
            for window in chain(_windows(clips), [[]]):
                added += sum(some.result() for some in written)
                written = [writers.submit(writing.write, rows) for rows in sliced(window, ROWS_AT_ONCE)]
                # What is written goes, while the next window comes.
                window.clear()
    finally:
        writers.shutdown(cancel_futures=True)
    writing.feeder.feed()
    return added


@contextmanager
def _short_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@dataclass(slots=True)
class _Writing:
    """Writes rows in the order they come, and feeds the queue in between."""

    run_id: int
    engine: sa.Engine
    feeder: Feeder
    feed_every_s: float
    fed: float = float("-inf")
    feeding: Lock = field(default_factory=Lock)
    mostly_known: bool = False

    def write(self, rows: list[Listed]) -> int:
        new = ledger.add_listed(self.engine, self.run_id, rows, mostly_known=self.mostly_known)
        self.mostly_known = new < len(rows) / 2
        with self.feeding:
            if time.monotonic() - self.fed > self.feed_every_s:
                self.feeder.feed()
                self.fed = time.monotonic()
        return new


def _windows(clips: Iterable[Clip]) -> Iterator[list[Listed]]:
    # The first keeps the list's order; those after it are sorted, and grow, so that work begins at once.
    all_rows, most = map(listed, clips), ROWS_AT_ONCE
    yield _taken(all_rows, most)
    while rows := _taken(all_rows, most := min(most * 3, ROWS_SORTED)):
        rows.sort(key=itemgetter(0))
        yield rows


def _taken(all_rows: Iterator[Listed], most: int) -> list[Listed]:
    rows, chars = [], 0
    for row in islice(all_rows, most):
        rows.append(row)
        chars += len(row[1]) + len(row[2] or "")
        if chars > CHARS_SORTED:
            break
    return rows
