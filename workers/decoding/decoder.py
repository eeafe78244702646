"""One decoder process: open clips in, pieces of samples and the facts of each file out."""

from __future__ import annotations

import json
import math
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from earmark.core import clips, errors
from earmark.core.processes import bare_environment
from workers.decoding import wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from earmark.core import settings

START_TIMEOUT_S = 60.0
#: A child that has closed its socket ends within this.
END_S = 1.0
#: Giving memory back after each clip costs 2 ms a clip. OpenBLAS threads cost address space.
TUNING = {
    "MALLOC_TRIM_THRESHOLD_": str(32 * 1024**2),
    "MALLOC_MMAP_THRESHOLD_": str(4 * 1024**2),
    "OPENBLAS_NUM_THREADS": "1",
}
#: Raised when a child dies, or sends an answer that makes no sense.
BROKEN = (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError)
#: A clip of 5 s fits, so that its decoder goes on with the next one before it is received.
SEND_BUFFER_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a clip's samples; the last one has the facts of the file, or its error."""

    samples: np.ndarray
    #: From 1 up; 0 for the mix.
    channel: int
    end: clips.AudioFacts | errors.DecodeError | None


class Decoder:
    """A sandboxed process that decodes the clips it is sent, one after the other.

    No method waits for it but `wait_until_ready`, so that one thread can look after many. Errors of
    `BROKEN` mean that the process is dead or taken over: ask for its `post_mortem`.
    """

    def __init__(self, audio_settings: settings.Audio) -> None:
        self._settings = audio_settings
        self._clips = 0
        #: Of each clip it was sent and has not answered: the samples it may still give.
        self._at_work: deque[float] = deque()
        self._head = bytearray()
        self._channel = 0
        self._end: dict[str, Any] | None = None
        self._samples: np.ndarray | None = None
        self._bring: Callable[[int], None] | None = None
        self._filled = 0
        self.ready = False
        #: The process has to send something before this; `inf` while it has nothing to do, or
        #: waits for memory.
        self.deadline = time.monotonic() + START_TIMEOUT_S
        program = [sys.executable, "-P", "-m", "workers.decoding.child"]
        self.socket, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        with theirs:
            self._process = subprocess.Popen(
                [*program, audio_settings.model_dump_json()],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                # The child closes it when it is ready.
                stderr=subprocess.PIPE,
                env={**TUNING, **bare_environment()},
            )

    @property
    def usable(self) -> bool:
        """Whether it may be given another clip."""
        return self._clips < self._settings.clips_per_decoder and self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Wait for the start of the process; raise ServiceError if it does not start."""
        if self.ready:
            return
        try:
            self.socket.settimeout(max(self.deadline - time.monotonic(), 1e-3))
            self.become_ready()
        except OSError as error:
            raise errors.ServiceError(
                reason=f"The audio decoder does not start: {self.last_words()}."
            ) from error

    def become_ready(self) -> None:
        """Take the sign that the process has started."""
        if not self.socket.recv(1):
            raise ConnectionResetError
        assert self._process.stderr is not None
        self._process.stderr.close()
        self.socket.setblocking(False)
        self.deadline = math.inf
        self.ready = True

    def begin(
        self, descriptor: int, request: wire.Request, bring: Callable[[int], None] | None = None
    ) -> None:
        """Send an open clip. It may still be at the one before.

        `bring` is called with each block of a sparse file that is wanted.
        """
        self._clips += 1
        self._bring = bring
        self._at_work.append(self._most_samples(request))
        if len(self._at_work) == 1:
            self.resume()
        socket.send_fds(self.socket, [wire.REQUEST.pack(*request)], [descriptor])

    def _most_samples(self, request: wire.Request) -> float:
        if request.is_stretch:
            return self._settings.max_samples
        most = (self._settings.max_duration_s + 1) * request.sample_rate
        return most * self._settings.max_channels if request.channels < 0 else most

    def receive(self, room: Callable[[int, bool], np.ndarray | None]) -> Piece | None:
        """Return the next piece of the clip at work, or None if not all of it is here yet.

        `room` gives the array for so many samples, and is told whether they are the clip's last.
        It may return None: then `hold` it until there is room, and call this again.
        """
        try:
            if self._samples is None:
                self._samples = self._make_room(room)
            while self._samples is not None and self._filled < self._samples.nbytes:
                self._fill(self._samples)
        except BlockingIOError:
            return None
        if self._samples is None:
            return None
        return self._piece(self._samples)

    def _make_room(self, room: Callable[[int, bool], np.ndarray | None]) -> np.ndarray | None:
        self._read_head(wire.HEAD.size)
        count, self._channel, size = wire.HEAD.unpack_from(self._head)
        if size > wire.MAX_END_BYTES or count > min(wire.PIECE_SAMPLES, self._at_work[0]):
            raise ValueError(size, count)
        if self._channel > self._settings.max_channels:
            raise ValueError(self._channel)
        self._read_head(wire.HEAD.size + size)
        samples = room(count, size > 0)
        if samples is None:
            return None
        # JSON, not pickle: a child that hostile bytes have taken over must not run code here.
        self._end = json.loads(self._head[wire.HEAD.size :]) if size else None
        self._filled = 0
        return samples

    def _read_head(self, size: int) -> None:
        while len(self._head) < size:
            received = self.socket.recv(size - len(self._head))
            if not received:
                raise ConnectionResetError
            self._head += received

    def _fill(self, samples: np.ndarray) -> None:
        received = self.socket.recv_into(samples.view(np.uint8)[self._filled :].data)
        if not received:
            raise ConnectionResetError
        self._filled += received
        self.resume()

    def _piece(self, samples: np.ndarray) -> Piece | None:
        self._at_work[0] -= len(samples)
        self._samples, self._head = None, bytearray()
        if self._end is None:
            return Piece(samples, self._channel, None)
        if self._bring and "block" in self._end:
            self._bring(int(self._end["block"]))
            self.socket.sendall(wire.BROUGHT)
            return None
        self._at_work.popleft()
        if not self._at_work:
            self.deadline = math.inf
        if "error" in self._end:
            return Piece(samples, self._channel, _error(self._end))
        return Piece(samples, self._channel, _facts(self._end["facts"]))

    def hold(self) -> None:
        """Stop its clock, while nobody takes its samples."""
        self.deadline = math.inf

    def resume(self) -> None:
        """Start its clock again."""
        self.deadline = time.monotonic() + self._settings.decode_timeout_s

    def stop(self) -> None:
        """End the process at once."""
        self.socket.close()
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def post_mortem(self) -> errors.DecodeError:
        """End the process, and return the error of the clip that it was at."""
        late = time.monotonic() > self.deadline
        self.stop()
        if late or self._process.returncode == -signal.SIGALRM:
            return errors.DecoderTimeout(timeout_s=self._settings.decode_timeout_s)
        return errors.DecoderCrashed()

    def last_words(self) -> str:
        """Stop a child that did not become ready; return its last line of output, or its end."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        status = self._process.poll()
        self._process.kill()
        assert self._process.stderr is not None
        lines = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        self.stop()
        if lines:
            return lines[-1].rstrip(".")
        if status is None:
            return f"no answer within {START_TIMEOUT_S:g} s"
        return f"it ended with status {status}"


def _error(end: dict[str, Any]) -> errors.DecodeError:
    kind = errors.BY_CODE[end["error"]]
    if not issubclass(kind, errors.DecodeError):
        raise TypeError(kind)
    return kind(**end["facts"])


def _facts(values: dict[str, Any]) -> clips.AudioFacts:
    """Return the facts of a file; a child that was taken over may send anything."""
    facts = clips.AudioFacts(**values)
    kinds = {"float": float, "int": int, "str": str, "bool": bool}
    for name, kind in clips.AudioFacts.__annotations__.items():
        value: object = getattr(facts, name)
        if type(value) is not kinds[kind]:
            raise TypeError(name)
        if isinstance(value, str):
            value.encode("ascii")
        elif isinstance(value, int | float) and not 0 <= value < 2**31:
            raise ValueError(name)
    if facts.tags and not isinstance(json.loads(facts.tags), dict):
        raise ValueError("tags")
    return facts
