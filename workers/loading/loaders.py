"""A worker's loader processes: clips dealt to them, their windows passed on, the dead replaced."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections import defaultdict
from io import FileIO
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

import numpy as np

from earmark.core import errors
from earmark.core.clips import Failure, Part, Postponed, Source, Timings
from earmark.core.settings import cores
from workers import metrics
from workers.loading import arena, copies, messages
from workers.loading.process import Dealt, Facts, Known, LoaderProcess, Share, Suspected

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from earmark.core.settings import Settings
    from workers.loading.process import Job, LoadedWindow, Loading, Observer

logger = logging.getLogger(__name__)

#: A loader that says nothing for so many checks, though it beats twice a second, hangs.
SILENT_CHECKS = 20
CHECK_EVERY_S = 1.0
#: A clip that was in a loader at so many deaths is suspected of them.
SUSPECT_DEATHS = 2
DECODERS_PER_LOADER = 4
#: A worker ends after so many loaders in a row that do not start, some seconds each.
MOST_FAILED_STARTS = 20


class Queue(Protocol):
    """Takes loaded windows to the models."""

    def put(self, windows: list[LoadedWindow]) -> list[LoadedWindow]:
        """Queue windows, and return those that cannot be."""

    def take_back(self, clips: Iterable[Loading]) -> list[LoadedWindow]:
        """Return the waiting windows of clips that nobody wants, among the queues of these."""


class Loaders:
    """The loader processes of a worker.

    Use one per worker, `wait_until_ready`, and close it. `deal` clips: each hears what becomes of
    it. Their windows go to the queue as they come, and `scored` takes what a model made of them,
    which frees their memory. A loader that dies or hangs is replaced; its clips are dealt again.
    With an `observer` they fetch without the limits that workers share.
    """

    def __init__(self, settings: Settings, queue: Queue, observer: Observer | None = None) -> None:
        self._queue = queue
        self._observer = observer
        self._numbers = count(1)
        self._changing = threading.Lock()
        self._closed = threading.Event()
        self._died = threading.Event()
        self._draining = False
        #: Loaders in a row that did not start.
        self._failed_starts = 0
        shares = _shares(settings)
        #: Loaders that ask one host, and the settings with the connections of each.
        self._per_host, self._settings = _manners(settings, len(shares))
        self._copies = FileIO(arena.new_memory(copies.SIZE))
        self._loaders = [self._new_loader(share) for share in shares]

    def wait_until_ready(self) -> None:
        """Wait for the start of the loaders, once; a model can be loaded meanwhile.

        Raises:
            ServiceError: one of them cannot start.
        """
        try:
            for loader in self._loaders:
                loader.wait_until_ready()
        except errors.ServiceError:
            self.close()
            raise
        for loader in self._loaders:
            self._listen(loader)
        # A thread that lives on, since Linux ends a child with the thread that started it.
        threading.Thread(target=self._look_after, name="loaders", daemon=True).start()

    @property
    def offline(self) -> bool:
        """Whether the network of this worker seems to be down."""
        return any(loader.offline for loader in self._loaders)

    def deal(self, clips: Iterable[tuple[Loading, Job]]) -> None:
        """Have clips loaded; those of one file share its download, and its decoding at a rate."""
        self._deal((clip, job, 0) for clip, job in clips)

    def _deal(self, clips: Iterable[tuple[Loading, Job, int]]) -> None:
        files: dict[tuple[Any, ...], list[tuple[Loading, Job, int]]] = defaultdict(list)
        for clip, job, deaths in clips:
            place = (clip.part or Part()).place
            files[clip.uri, place].append((clip, job, deaths))
        groups: dict[LoaderProcess, list[list[Dealt]]] = defaultdict(list)
        with self._changing:
            for together in files.values():
                usable = self._loaders_for(together[0][0])
                loader = min(usable, key=lambda loader: len(loader.dealt))
                group = []
                for clip, job, deaths in together:
                    dealt = Dealt(next(self._numbers), clip, job, loader, deaths)
                    loader.dealt[dealt.number] = dealt
                    group.append(dealt)
                    clip.begin(dealt)
                groups[loader].append(group)
        for loader, dealt_to_it in groups.items():
            loader.deal(dealt_to_it)

    def _loaders_for(self, clip: Loading) -> list[LoaderProcess]:
        """Return the loaders that may ask a clip's host; of a container's members, one has all."""
        host = clip.uri.partition("://")[2].partition("/")[0].lower()
        place, count = host, self._per_host
        if clip.part is not None and clip.part.member is not None:
            place, count = clip.uri, 1
        if not place:
            return self._loaders
        first = crc32(host.encode("utf-8", "surrogateescape"))
        if count == 1:
            first += crc32(place.encode("utf-8", "surrogateescape")) % self._per_host
        return [self._loaders[(first + more) % len(self._loaders)] for more in range(count)]

    def drain(self) -> None:
        """Have all clips given back that are at no decoder yet, now and from now on."""
        with self._changing:
            first, self._draining = not self._draining, True
        if first:
            for loader in self._loaders:
                loader.send(messages.DRAIN)

    def scored(self, windows: Iterable[Any], outcomes: Iterable[Any]) -> None:
        """Tell clips about the scores of queued windows, whose tags are ours, and free these."""
        loaded = []
        for window, outcome in zip(windows, outcomes, strict=True):
            loaded.append(window.tag)
            if window.tag.dealt.wanted:
                window.tag.dealt.clip.scored(window.tag, outcome)
        self._free(loaded)

    def forget(self, clips: Iterable[Loading]) -> None:
        """Take the windows of clips out of the queue that nobody wants any more."""
        self._free(self._queue.take_back(clips))

    def close(self) -> None:
        """End the loaders and their decoders at once."""
        self._closed.set()
        self._died.set()
        for loader in self._loaders:
            loader.stop()
        self._copies.close()

    def _new_loader(self, share: Share) -> LoaderProcess:
        observed = self._observer is not None
        return LoaderProcess(self._settings, share, self._copies.fileno(), observed=observed)

    def _free(self, windows: Iterable[LoadedWindow]) -> None:
        groups: dict[LoaderProcess, list[int]] = defaultdict(list)
        for window in windows:
            groups[window.dealt.loader].append(window.offset)
        for loader, offsets in groups.items():
            loader.send(messages.FREE + np.array(offsets, messages.OFFSET).tobytes())

    # what loaders send -----------------------------------------------------------------------

    def _listen(self, loader: LoaderProcess) -> None:
        threading.Thread(target=self._hear_all, args=(loader,), name="loader", daemon=True).start()

    def _hear_all(self, loader: LoaderProcess) -> None:
        try:
            loader.wait_until_ready()
            while True:
                self._hear(loader, loader.receive())
        except errors.ServiceError as error:
            logger.warning("%s", error, extra={"action": "loader_not_started"})
        except (EOFError, OSError):
            pass
        except Exception:
            logger.exception("a loader sends nonsense", extra={"action": "loader_broken"})
        loader.dead = True
        self._died.set()

    def _hear(self, loader: LoaderProcess, message: bytes) -> None:
        loader.silent_checks = 0
        match message[:1]:
            case messages.ROWS:
                self._take_rows(loader, *messages.read_rows(message))
            case messages.ENDED:
                for row in json.loads(message[1:]):
                    _end(loader, *row)
            case messages.BEAT:
                loader.offline = bool(message[1])
            case messages.SEEN:
                assert self._observer is not None
                self._observer.seen(*json.loads(message[1:]))

    def _take_rows(self, loader: LoaderProcess, clips: list[Any], rows: list[Any]) -> None:
        windows = []
        for number, *place in rows:
            dealt = loader.dealt.get(number)
            if dealt is None:
                loader.send(messages.FREE + np.array(place[:1], messages.OFFSET).tobytes())
            else:
                windows.append(loader.window(dealt, *place))
        for row in clips:
            # From here on it does not need its loader: its windows are all in memory.
            if dealt := loader.dealt.pop(row[0], None):
                dealt.clip.decoded(dealt, _facts(row))
        self._free(self._queue.put(windows))

    # loaders that die ------------------------------------------------------------------------

    def _look_after(self) -> None:
        while not self._closed.is_set():
            self._died.wait(CHECK_EVERY_S)
            self._died.clear()
            for loader in self._loaders:
                loader.silent_checks += loader.ready
                if loader.dead:
                    self._try_to_replace(loader)
                elif loader.silent_checks > SILENT_CHECKS:
                    logger.error("a loader hangs", extra={"action": "loader_hangs"})
                    loader.kill()

    def _try_to_replace(self, loader: LoaderProcess) -> None:
        try:
            self._replace(loader)
        except OSError as error:  # no memory, no process, a full disk: it may pass
            logger.warning(
                "a loader cannot be started: %s", error, extra={"action": "loader_not_started"}
            )
            self._failed_starts += 1
        if self._failed_starts > MOST_FAILED_STARTS:
            logger.critical("no loader can be started; the worker ends")
            os._exit(errors.BROKEN_EXIT)

    def _replace(self, loader: LoaderProcess) -> None:
        if self._closed.is_set():
            return
        logger.error(
            "a loader died (%s); another one takes its clips", loader.stop(),
            extra={"action": "loader_died"},
        )  # fmt: skip
        fresh = self._new_loader(loader.share)
        self._failed_starts = 0 if loader.ready else self._failed_starts + 1
        with self._changing:
            self._loaders[self._loaders.index(loader)] = fresh
            lost = list(loader.dealt.values())
            loader.dealt.clear()
        self._listen(fresh)
        if self._draining:
            fresh.send(messages.DRAIN)
        again = []
        for dealt in lost:
            dealt.wanted = False
            deaths = dealt.deaths + loader.ready
            if deaths < SUSPECT_DEATHS:
                again.append((dealt.clip, dealt.job, deaths))
            else:
                dealt.clip.ended(dealt, Suspected())
        self.forget([dealt.clip for dealt in lost])
        self._deal(again)


def _shares(settings: Settings) -> list[Share]:
    worker = settings.worker
    decoders = worker.decoders or cores()
    loaders = min(worker.loaders or max(1, decoders // DECODERS_PER_LOADER), decoders)
    samples = int(worker.in_flight_bytes) // loaders // arena.SAMPLE
    fetching = math.ceil(worker.clips_in_flight / loaders)
    shares = []
    for place in range(loaders):
        share = decoders // loaders + (place < decoders % loaders)
        shares.append(Share(samples, share, fetching))
    return shares


def _manners(settings: Settings, loaders: int) -> tuple[int, Settings]:
    """Divide a worker's connections to a host among as many loaders as can have some.

    With robots.txt it is one, which then asks for the file once.
    """
    most = settings.fetch.host_concurrency
    per_host = 1
    if not settings.fetch.robots:
        for number in range(1, min(loaders, most) + 1):
            if number * (most // number) >= per_host * (most // per_host):
                per_host = number
    each = most // per_host
    return per_host, settings.changed(fetch={"host_concurrency": each})


def _facts(row: Sequence[Any]) -> Facts:
    _, windows, size, sha256, fetch_ms, wait_ms, decode_ms, room_ms, *_ = row
    metrics.decoder_wait(wait_ms / 1000)
    timings = Timings(fetch_ms, decode_ms)
    return Facts(Source(sha256.decode(), size), messages.facts_of(row), timings, windows, room_ms)


def _end(
    loader: LoaderProcess,
    number: int,
    end: dict[str, Any],
    source: list[Any] | None,
    fetch_ms: float,
    decode_ms: float,
) -> None:
    dealt = loader.dealt.pop(number, None)
    if dealt is None:
        return
    clip, timings = dealt.clip, Timings(fetch_ms, decode_ms)
    content = Source(*source) if source else None
    if "known" in end:
        clip.ended(dealt, Known(end["known"], content, timings))
    elif "postponed" in end:
        clip.ended(dealt, Postponed(clip.clip_id, end["postponed"]))
    else:
        error = errors.BY_CODE[end["error"]](**end["facts"])
        clip.ended(dealt, Failure(clip.clip_id, error, content, timings))
