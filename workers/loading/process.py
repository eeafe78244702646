"""One loader process, for the worker that started it, and the clips that are dealt to it."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import astuple, dataclass, replace
from multiprocessing.connection import Pipe
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from earmark.core import errors
from earmark.core.clips import MIX
from workers.loading import arena, messages

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np

    from earmark.core.clips import AudioFacts, Failure, Part, Postponed, Source, Timings
    from earmark.core.settings import Settings
    from workers.loading.cutter import Shape

#: A loader starts within this: its decoders have a minute, all at once.
START_S = 90.0


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


class Observer(Protocol):
    """Sees the steps of a clip in a loader, on any thread."""

    def seen(self, step: str, *facts: Any) -> None:
        """See a request that is `sending`, one that is `answered`, or the file that is `fetched`.

        They come with the URL; with the URL, the status and the headers; and with the bytes, their
        SHA-256 and the format by the first of them.
        """


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

    #: 0: of no run, so that nothing is looked up or shared.
    run_id: int
    shape: Shape
    #: Whether URLs are looked up before they are fetched.
    by_url: bool
    #: The channels to decode.
    channels: int = MIX
    #: Whether a clip waits for another one that is at work on the same content.
    joins: bool = True
    #: Whether the file of a clip is kept, and not heard until it is released.
    held: bool = False


@dataclass(slots=True, eq=False)
class Dealt:
    """A clip in a loader. Rows name it by its number, which is of this deal only."""

    number: int
    clip: Loading
    job: Job
    loader: LoaderProcess
    #: Of loaders that had it.
    deaths: int
    #: Whether anybody waits for its windows.
    wanted: bool = True

    def release(self) -> None:
        """Have its file heard, which was kept."""
        self.job = replace(self.job, held=False)
        if self.number in self.loader.dealt:
            self.loader.send(messages.RELEASE + json.dumps([self.number]).encode())

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
    #: From 1 up; 0 for the mix.
    channel: int = 0

    @property
    def span(self) -> tuple[float, float]:
        """The seconds of the clip in which it begins and ends."""
        return self.dealt.job.shape.span(self.start, self.heard)


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a worker's means that one loader has."""

    samples: int
    decoders: int
    fetching: int


class LoaderProcess:
    """One loader process, the memory it shares, and the clips it has."""

    def __init__(
        self, settings: Settings, share: Share, copies: int, *, observed: bool = False
    ) -> None:
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
        self.send(pickle.dumps((settings, share.decoders, share.fetching, observed)))
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

    def deal(self, groups: Iterable[Sequence[Dealt]]) -> None:
        """Send clips, those of each file in a group."""
        jobs: dict[Job, int] = {}
        files = []
        for group in groups:
            clips = []
            for dealt in group:
                job = jobs.setdefault(dealt.job, len(jobs))
                part = dealt.clip.part
                clips.append((dealt.number, dealt.clip.clip_id, job, part and astuple(part)))
            files.append((dealt.clip.uri, clips))
        content = {"jobs": list(map(astuple, jobs)), "files": files}
        self.send(messages.DEAL + json.dumps(content).encode())

    def window(
        self, dealt: Dealt, offset: int, samples: int, start: int, heard: int, channel: int
    ) -> LoadedWindow:
        end = offset + samples
        if not heard <= samples <= end <= len(self._memory):
            raise ValueError(offset, samples, heard)
        return LoadedWindow(dealt, offset, self._memory[offset:end], start, heard, channel)

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
