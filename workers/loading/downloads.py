"""Threads that fetch the clips of a loader, and one that looks up which have a result already."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict, deque
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

from more_itertools import chunked

from db import reuse
from earmark.core.errors import DatabaseError, ServiceError
from workers import logs
from workers.decoding.pool import check_regular

if TYPE_CHECKING:
    import sqlalchemy as sa

    from earmark.core.clips import Part
    from workers.fetching.breaker import Breaker
    from workers.fetching.fetch import Fetched
    from workers.loading.clip import DealtClip
    from workers.loading.copies import Copies

logger = logging.getLogger(__name__)

#: Clips that one statement looks up.
LOOKED_UP_AT_ONCE = 64
#: A statement for several clips costs hardly more than for one, so they wait for each other as long
#: as the decoders have enough to do.
GATHER_S = 0.1


class ClipFetcher(Protocol):
    """Fetches a clip; a worker's is a `PoliteFetcher`."""

    @property
    def breaker(self) -> Breaker: ...

    def fetch(self, uri: str, part: Part | None = None) -> Fetched: ...

    def close(self) -> None: ...


class Bell:
    """Wakes the thread that waits for its descriptor."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self._ringing = False

    def fileno(self) -> int:
        return self._read

    def ring(self) -> None:
        if not self._ringing:
            self._ringing = True
            os.write(self._write, b"!")

    def quiet(self) -> None:
        """Take the signal; look for its cause afterwards."""
        self._ringing = False
        os.read(self._read, 1)


class Downloads:
    """Fetches clips and looks up their results, in threads; it rings when clips are through.

    Clips that it gives back have a file, or an `end`.
    """

    def __init__(
        self, fetcher: ClipFetcher, engine: sa.Engine, copies: Copies, threads: int, bell: Bell
    ) -> None:
        self._fetcher = fetcher
        self._engine = engine
        self._copies = copies
        self._bell = bell
        self._to_fetch: SimpleQueue[DealtClip] = SimpleQueue()
        self._to_look_up: SimpleQueue[DealtClip] = SimpleQueue()
        self._through: deque[DealtClip] = deque()
        #: Set while decoders may soon have nothing to do.
        self.hungry = threading.Event()
        targets = [self._fetch_clips] * threads + [self._look_up_clips]
        for target in targets:
            threading.Thread(target=target, daemon=True).start()

    def begin(self, clip: DealtClip) -> None:
        if clip.job.by_url or clip.source is not None:
            self._to_look_up.put(clip)
        else:
            self._to_fetch.put(clip)

    def take(self) -> DealtClip | None:
        """Return a clip that is through, if there is one."""
        return self._through.popleft() if self._through else None

    def _fetch_clips(self) -> None:
        while True:
            clip = self._to_fetch.get()
            began = time.perf_counter()
            with logs.about(run_id=clip.job.run_id):
                self._fetch(clip)
            fetch_ms = (time.perf_counter() - began) * 1000
            for each in clip.together:
                each.source, each.fetch_ms = clip.source, fetch_ms
            if clip.going and clip.job.run_id:
                self._to_look_up.put(clip)
            else:
                self._pass(clip)

    def _fetch(self, clip: DealtClip) -> None:
        try:
            fetched = self._fetcher.fetch(clip.uri, clip.part)
            clip.file, clip.source = fetched.file, fetched.source
            check_regular(clip.file)
        except Exception as error:
            clip.end_by(error)

    def _look_up_clips(self) -> None:
        while True:
            clips = [self._to_look_up.get()]
            self.hungry.wait(GATHER_S)
            try:
                while len(clips) < LOOKED_UP_AT_ONCE:
                    clips.append(self._to_look_up.get_nowait())
            except Empty:
                pass
            for (run_id, _), group in _by_run(clips).items():
                with logs.about(run_id=run_id):
                    for some in chunked(group, LOOKED_UP_AT_ONCE):
                        self._look_up(run_id, some)
            for clip in clips:
                if clip.source is None and clip.going and not clip.is_held:
                    self._to_fetch.put(clip)
                else:
                    self._pass(clip)

    def _look_up(self, run_id: int, clips: list[DealtClip]) -> None:
        try:
            known = self._known(run_id, clips)
        except ServiceError as error:
            for clip in clips:
                clip.end_by(error)
            return
        for clip in clips:
            first = known.get(clip.id)
            if first is None and clip.source is not None:
                first = self._copies.first(clip)
            if first is not None:
                clip.end = {"known": first}

    def _known(self, run_id: int, clips: list[DealtClip]) -> dict[int, int]:
        """Look up results; any failure of this is the database's, never a clip's."""
        sources = {clip.id: clip.source for clip in clips}
        try:
            try:
                return reuse.known(self._engine, run_id, sources)
            except DatabaseError:
                # The connection may have ended in the pool. All have been replaced by now.
                return reuse.known(self._engine, run_id, sources)
        except ServiceError:
            raise
        except Exception as error:
            logger.exception(
                "a look-up in the database failed unexpectedly", extra={"action": "lookup_failed"}
            )
            reason = f"The look-up of a clip's result failed: {error!r}"
            raise DatabaseError(reason=reason, bug=True) from error

    def _pass(self, clip: DealtClip) -> None:
        self._through.append(clip)
        self._bell.ring()


def _by_run(clips: list[DealtClip]) -> dict[tuple[int, bool], list[DealtClip]]:
    """Return the clips to look up of each run, those with and without a source apart."""
    groups = defaultdict(list)
    for clip in clips:
        for each in clip.going:
            if not each.held:
                groups[each.job.run_id, each.source is None].append(each)
    return groups
