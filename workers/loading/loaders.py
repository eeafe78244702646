"""A worker's loader processes: clips dealt to them, their windows passed on, the dead replaced."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import subprocess
import sys
import threading
from collections import defaultdict
from dataclasses import astuple, dataclass
from io import FileIO
from itertools import count
from multiprocessing.connection import Pipe
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

import numpy as np

from earmark.core import errors
from earmark.core.clips import Failure, Postponed, Source, Timings
from earmark.core.settings import cores
from workers import metrics
from workers.loading import arena, copies, messages

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from earmark.core.clips import AudioFacts, Part
    from earmark.core.settings import Settings
    from workers.loading.cutter import Shape

logger = logging.getLogger(__name__)

#: A loader starts within this: its decoders have a minute, all at once.
START_S = 90.0
#: A loader that says nothing for so many checks, though it beats twice a second, hangs.
SILENT_CHECKS = 20
CHECK_EVERY_S = 1.0
#: A clip that was in a loader at so many deaths is suspected of them.
SUSPECT_DEATHS = 2
DECODERS_PER_LOADER = 4
#: A worker ends after so many loaders in a row that do not start, some seconds each.
MOST_FAILED_STARTS = 20


class Loading(Protocol):
    """A clip that is dealt to loaders. It hears from them, on any thread."""

    @property
    def clip_id(self) -> int: ...

    @property
    def uri(self) -> str: ...

    @property
    def part(self) -> Part | None: ...

    def begin(self, dealt: Dealt) -> None:
        """Forget an earlier deal."""

    def decoded(self, dealt: Dealt, facts: Facts) -> None:
        """Take the facts of its file: no windows come after those that are here."""

    def ended(self, dealt: Dealt, end: Failure | Postponed | Known | Suspected) -> None:
        """Take an end without scores."""

    def scored(self, window: LoadedWindow, outcome: Any) -> None:
        """Take the scores of a window, or its error."""


@dataclass(frozen=True, slots=True)
class Facts:
    """A decoded clip, with the seconds that its samples waited for room."""

    source: Source
    audio: AudioFacts
    timings: Timings
    windows: int
    room_ms: float


@dataclass(frozen=True, slots=True)
class Known:
    """A clip that shares the result of another one, which may still be at work."""

    clip_id: int
    source: Source | None
    timings: Timings


@dataclass(frozen=True, slots=True)
class Suspected:
    """A clip that was in loaders as they died."""


@dataclass(frozen=True, slots=True)
class Job:
    """What loaders have to know about the clips of a run."""

    run_id: int
    shape: Shape
    #: Whether URLs are looked up before they are fetched.
    by_url: bool
    #: Whether a clip waits for another one that is at work on the same content.
    joins: bool = True


@dataclass(slots=True, eq=False)
class Dealt:
    """A clip in a loader. Rows name it by its number, which is of this deal only."""

    number: int
    clip: Loading
    job: Job
    loader: _Loader
    #: Of loaders that had it.
    deaths: int
    #: Whether anybody waits for its windows.
    wanted: bool = True

    def cancel(self) -> None:
        """Have its loader stop working on it."""
        self.wanted = False
        if self.loader.dealt.pop(self.number, None):
            self.loader.send(messages.CANCEL + json.dumps([self.number]).encode())


@dataclass(slots=True, eq=False)
class LoadedWindow:
    """A window in the arena of a loader, until it is freed."""

    dealt: Dealt
    offset: int
    samples: np.ndarray
    #: In samples of the clip; `heard` of them are not padding.
    start: int
    heard: int

    @property
    def span(self) -> tuple[float, float]:
        """The seconds of the clip in which it begins and ends."""
        return self.dealt.job.shape.span(self.start, self.heard)


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
    """

    def __init__(self, settings: Settings, queue: Queue) -> None:
        self._queue = queue
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

    def deal(self, job: Job, clips: Iterable[Loading]) -> None:
        """Have clips of one run loaded."""
        self._deal((clip, job, 0) for clip in clips)

    def _deal(self, clips: Iterable[tuple[Loading, Job, int]]) -> None:
        groups: dict[tuple[_Loader, Job], list[Dealt]] = defaultdict(list)
        with self._changing:
            for clip, job, deaths in clips:
                loader = min(self._loaders_for(clip), key=lambda loader: len(loader.dealt))
                dealt = Dealt(next(self._numbers), clip, job, loader, deaths)
                loader.dealt[dealt.number] = dealt
                groups[loader, job].append(dealt)
                clip.begin(dealt)
        for (loader, job), group in groups.items():
            loader.deal(job, group)

    def _loaders_for(self, clip: Loading) -> list[_Loader]:
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

    def _new_loader(self, share: _Share) -> _Loader:
        return _Loader(self._settings, share, self._copies.fileno())

    def _free(self, windows: Iterable[LoadedWindow]) -> None:
        groups: dict[_Loader, list[int]] = defaultdict(list)
        for window in windows:
            groups[window.dealt.loader].append(window.offset)
        for loader, offsets in groups.items():
            loader.send(messages.FREE + np.array(offsets, messages.OFFSET).tobytes())

    # what loaders send -----------------------------------------------------------------------

    def _listen(self, loader: _Loader) -> None:
        threading.Thread(target=self._hear_all, args=(loader,), name="loader", daemon=True).start()

    def _hear_all(self, loader: _Loader) -> None:
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

    def _hear(self, loader: _Loader, message: bytes) -> None:
        loader.silent_checks = 0
        match message[:1]:
            case messages.ROWS:
                self._take_rows(loader, *messages.read_rows(message))
            case messages.ENDED:
                for row in json.loads(message[1:]):
                    _end(loader, *row)
            case messages.BEAT:
                loader.offline = bool(message[1])

    def _take_rows(self, loader: _Loader, clips: list[Any], rows: list[Any]) -> None:
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

    def _try_to_replace(self, loader: _Loader) -> None:
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

    def _replace(self, loader: _Loader) -> None:
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


@dataclass(frozen=True, slots=True)
class _Share:
    """The part of a worker's means that one loader has."""

    samples: int
    decoders: int
    fetching: int


def _shares(settings: Settings) -> list[_Share]:
    worker = settings.worker
    decoders = worker.decoders or cores()
    loaders = min(worker.loaders or max(1, decoders // DECODERS_PER_LOADER), decoders)
    samples = int(worker.in_flight_bytes) // loaders // arena.SAMPLE
    fetching = math.ceil(worker.clips_in_flight / loaders)
    shares = []
    for place in range(loaders):
        share = decoders // loaders + (place < decoders % loaders)
        shares.append(_Share(samples, share, fetching))
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


class _Loader:
    """One loader process, the memory it shares, and the clips it has."""

    def __init__(self, settings: Settings, share: _Share, copies: int) -> None:
        self.share = share
        #: By number.
        self.dealt: dict[int, Dealt] = {}
        self.ready = self.dead = self.offline = False
        self.silent_checks = 0
        descriptor = arena.new_memory(share.samples)
        self._connection, theirs = Pipe()
        try:
            self._memory = arena.mapped(descriptor)
            self._process = _start(theirs.fileno(), descriptor, copies)
        finally:
            theirs.close()
            os.close(descriptor)
        # A thread of its own, so that nobody waits for a loader that hangs.
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self.send(pickle.dumps((settings, share.decoders, share.fetching)))
        threading.Thread(target=self._send_all, name="loader-send", daemon=True).start()

    def wait_until_ready(self) -> None:
        """Wait until it has started; raise ServiceError if it does not start."""
        if self.ready:
            return
        try:
            message = self._connection.recv_bytes() if self._connection.poll(START_S) else b""
        except (EOFError, OSError):
            message = b""
        if message[:1] == messages.REFUSED:
            raise errors.ServiceError(reason=message[1:].decode())
        if message[:1] != messages.READY:
            raise errors.ServiceError(reason=f"A loader does not start: {self.stop()}.")
        self.ready = True

    def receive(self) -> bytes:
        return self._connection.recv_bytes()

    def send(self, message: bytes) -> None:
        self._outbox.put(message)

    def deal(self, job: Job, clips: Sequence[Dealt]) -> None:
        rows = []
        for dealt in clips:
            clip = dealt.clip
            part = None if clip.part is None else astuple(clip.part)
            rows.append((dealt.number, clip.clip_id, clip.uri, part))
        content = {
            "clips": rows, "run_id": job.run_id, "shape": job.shape, "by_url": job.by_url,
            "joins": job.joins,
        }  # fmt: skip
        self.send(messages.DEAL + json.dumps(content).encode())

    def window(
        self, dealt: Dealt, offset: int, samples: int, start: int, heard: int
    ) -> LoadedWindow:
        end = offset + samples
        if not heard <= samples <= end <= len(self._memory):
            raise ValueError(offset, samples, heard)
        return LoadedWindow(dealt, offset, self._memory[offset:end], start, heard)

    def kill(self) -> None:
        """End the process; its end is heard as that of any other."""
        self._process.kill()

    def stop(self) -> str:
        """End the process if it lives, and return how it ended."""
        self._process.kill()
        status = self._process.wait()
        self._outbox.put(None)
        return f"it ended with status {status}"

    def _send_all(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._connection.send_bytes(message)
        except OSError:  # it is dead, which is heard on the other side
            return


def _start(*descriptors: int) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-P", "-m", "workers.loading.loader", str(os.getpid())]
    return subprocess.Popen(
        [*program, *map(str, descriptors)],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def _facts(row: Sequence[Any]) -> Facts:
    _, windows, size, sha256, fetch_ms, wait_ms, decode_ms, room_ms, *_ = row
    metrics.decoder_wait(wait_ms / 1000)
    timings = Timings(fetch_ms, decode_ms)
    return Facts(Source(sha256.decode(), size), messages.facts_of(row), timings, windows, room_ms)


def _end(
    loader: _Loader,
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
