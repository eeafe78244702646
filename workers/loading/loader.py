"""The program of a loader process: a chunk's clips in, windows in the worker's memory out."""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import sys
import time
from collections import deque
from heapq import heappop, heappush
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from db.session import connect
from earmark.core import broker, errors
from earmark.core.clips import Part
from earmark.core.processes import end_with_parent, isolate_imports
from workers import logs
from workers.fetching.polite import PoliteFetcher
from workers.loading import messages
from workers.loading.arena import Room
from workers.loading.clip import DealtClip
from workers.loading.copies import Copies
from workers.loading.cutter import Shape
from workers.loading.decodings import Decodings
from workers.loading.downloads import Bell, Downloads
from workers.loading.observed import ObservedFetcher
from workers.loading.process import Job
from workers.loading.report import Report
from workers.loading.spans import Span

if TYPE_CHECKING:
    from earmark.core.settings import Settings
    from workers.loading.downloads import ClipFetcher

#: A clip waits here for its host if it waits for less than this, and is given back otherwise.
PARKED_S = 5.0
#: Deadlines are checked, and the worker hears of this loader, this often.
BEAT_S = 0.5


class Loader:
    """Has the clips that the worker deals fetched and decoded, and tells it about their windows.

    One thread does everything but fetching and look-ups, and never waits for anything but the next
    event. It ends with the connection to its worker.
    """

    def __init__(
        self,
        settings: Settings,
        connection: Connection,
        memory: int,
        copies: Copies,
        decoders: int,
        fetching: int,
        *,
        observed: bool,
    ) -> None:
        self._connection = connection
        self._report = Report(connection, copies)
        engine = connect(settings.database_url, settings.database)
        fetcher: ClipFetcher = (
            ObservedFetcher(settings, self._report.send) if observed else PoliteFetcher(settings)
        )
        self._breaker = fetcher.breaker
        self._backlog: deque[DealtClip] = deque()
        self._parked: list[tuple[float, int, DealtClip]] = []
        self._downloading = 0
        self._at_once = fetching + 2 * decoders
        self._draining = False
        self._beat_at = 0.0
        bell = Bell()
        self._selector = selectors.DefaultSelector()
        self._selector.register(bell, selectors.EVENT_READ, bell.quiet)
        self._selector.register(connection, selectors.EVENT_READ, self._hear)
        self._room = Room(memory)
        self._decodings = Decodings(
            settings.audio, decoders, self._room, self._report, self._selector
        )
        self._downloads = Downloads(fetcher, engine, copies, fetching, bell)
        self._report.send(messages.READY)

    def run(self) -> NoReturn:
        while True:
            events = self._selector.select(self._idle_s())
            for key, _ in events:
                key.data()
            self._take_downloads()
            self._decodings.find_room()
            self._begin_downloads()
            self._decodings.hand_out()
            self._note_hunger()
            self._report.send_rows(at_once=not (events or self._room.is_fed))
            if time.monotonic() >= self._beat_at:
                self._beat()

    def _idle_s(self) -> float:
        if self._report.has_rows and not self._room.is_fed:
            return 0.0
        due_at = self._beat_at
        if self._parked:
            due_at = min(due_at, self._parked[0][0])
        return max(0.0, due_at - time.monotonic())

    # messages --------------------------------------------------------------------------------

    def _hear(self) -> None:
        try:
            message = self._connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(os.EX_OK)
        kind, content = message[:1], message[1:]
        match kind:
            case messages.FREE:
                self._room.free(np.frombuffer(content, messages.OFFSET).tolist())
            case messages.DEAL:
                self._deal(**json.loads(content))
            case messages.RELEASE:
                self._release(json.loads(content))
            case messages.CANCEL:
                self._cancel(json.loads(content))
            case messages.DRAIN:
                self._drain()

    def _deal(self, jobs: list[Any], files: list[Any]) -> None:
        known = [Job(run_id, Shape(*shape), *others) for run_id, shape, *others in jobs]
        for uri, rows in files:
            clips = []
            for deal, clip_id, number, values in rows:
                job = known[number]
                part = Part(*values) if values else None
                span = Span.of(part, job.shape.sample_rate)
                clip = DealtClip(deal, clip_id, uri, job, part, span, held=job.held)
                self._report.clips[deal] = clip
                clips.append(clip)
            first, *first.others = clips
            self._backlog.append(first)
        if self._draining:
            self._drain()

    def _release(self, deals: list[int]) -> None:
        for deal in deals:
            if clip := self._report.clips.get(deal):
                clip.held = False
        self._backlog.extend(self._decodings.released())

    def _cancel(self, deals: list[int]) -> None:
        for deal in deals:
            if clip := self._report.clips.pop(deal, None):
                clip.dropped = True
        self._decodings.drop()
        self._backlog.extend(self._decodings.released())

    def _drain(self) -> None:
        """Give back the clips that are at no decoder."""
        self._draining = True
        begun = self._decodings.begun()
        for clip in list(self._report.clips.values()):
            if clip.deal not in begun:
                clip.put_off(0.0)
                self._report.end(clip)

    def _beat(self) -> None:
        self._beat_at = time.monotonic() + BEAT_S
        self._report.send(messages.BEAT + bytes([self._breaker.open]))
        self._decodings.beat()

    # clips, from their deal to a decoder -----------------------------------------------------

    def _begin_downloads(self) -> None:
        now = time.monotonic()
        while self._parked and self._parked[0][0] <= now:
            self._backlog.append(heappop(self._parked)[2])
        while self._backlog and self._downloading + self._decodings.waiting_clips < self._at_once:
            dealt = self._backlog.popleft()
            if clip := dealt.left(dealt.going):
                self._downloading += 1
                self._downloads.begin(clip)

    def _note_hunger(self) -> None:
        if self._decodings.are_fed:
            self._downloads.hungry.clear()
        else:
            self._downloads.hungry.set()

    def _take_downloads(self) -> None:
        while fetched := self._downloads.take():
            self._downloading -= 1
            clips, going = fetched.together, fetched.going
            if first := fetched.left(going):
                self._decodings.put(first)
            parked = []
            for clip in clips:
                if clip.dropped or clip in going:
                    continue
                if self._is_parked(clip):
                    parked.append(clip)
                else:
                    self._report.end(clip)
            if parked:
                self._park(parked)

    def _is_parked(self, clip: DealtClip) -> bool:
        pause_s = (clip.end or {}).get("postponed", math.inf)
        return not self._draining and 0 < pause_s < PARKED_S

    def _park(self, clips: list[DealtClip]) -> None:
        first, *first.others = clips
        assert first.end is not None
        due_at = time.monotonic() + first.end["postponed"]
        heappush(self._parked, (due_at, first.deal, first))
        for clip in clips:
            clip.end = None


def main() -> NoReturn:
    """Serve the worker whose process, connection and memory the arguments name."""
    isolate_imports()
    worker, descriptor, memory, copies = map(int, sys.argv[1:])
    end_with_parent(worker, signal.SIGKILL)
    # These signals are meant for the worker, which ends this process when it has drained.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection: Connection = Connection(descriptor)
    settings, decoders, fetching, observed = connection.recv()
    logs.set_up(as_json=settings.worker.log_json)
    broker.configure(settings.broker)
    try:
        loader = Loader(
            settings, connection, memory, Copies(copies), decoders, fetching, observed=observed
        )
    except errors.ServiceError as error:
        connection.send_bytes(messages.REFUSED + str(error).encode())
        sys.exit(errors.SERVICE_EXIT)
    loader.run()


if __name__ == "__main__":
    main()
