"""An open clip in, its waveform out, decoded in a pool of disposable child processes that may crash, hang or swell."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from earmark.core import clips, errors
from earmark.core.processes import import_path

if TYPE_CHECKING:
    from earmark.core import settings

START_TIMEOUT_S = 60.0
#: A child whose socket is closed is about to end.
END_S = 1.0
MAX_HEADER_BYTES = 65536
#: Memory given back after each clip and taken again costs 2 ms a clip; a thread per core costs address space.
TUNING = {
    "MALLOC_TRIM_THRESHOLD_": str(32 * 1024**2),
    "MALLOC_MMAP_THRESHOLD_": str(4 * 1024**2),
    "OPENBLAS_NUM_THREADS": "1",
}
#: A decoder does not give back the memory that a waveform so large took.
SWOLLEN_BYTES = 64 * 1024**2
_TIMED_OUT = (-signal.SIGALRM, -signal.SIGXCPU)


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a clip's bytes turned out to hold."""

    waveform: clips.Waveform
    facts: clips.AudioFacts


class Decoders:
    """A pool of decoder processes; as many clips are decoded at once as it has children, and further callers wait."""

    def __init__(self, limits: settings.Audio, processes: int) -> None:
        self._limits = limits
        self._processes = processes
        # The last one to rest is the next at work: what it needs is still in the processor's cache.
        self._idle: queue.LifoQueue[_Decoder | None] = queue.LifoQueue()
        children = [_Decoder(limits) for _ in range(processes)]
        for child in children:
            self._idle.put(child)
        try:
            for child in children:
                child.wait_until_ready()
        except errors.ServiceError:
            self.close()
            raise

    def decode(self, file: BinaryIO, sample_rate: int) -> Decoded:
        """Return the waveform of a file with a descriptor at this rate; a child that dies or hangs costs only this."""
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise errors.NotAudio(kind="a device, a pipe or a folder")
        child = self._idle.get()
        try:
            if child is None:
                raise errors.ServiceError(reason="The decoders are closed.")
            if not child.usable:
                child.stop()
                child = _Decoder(self._limits)
            child.wait_until_ready()
            return child.decode(file.fileno(), sample_rate)
        finally:
            self._idle.put(child)

    def close(self) -> None:
        """Stop the children, each as soon as it has finished its clip."""
        for _ in range(self._processes):
            if child := self._idle.get():
                child.stop()
        self._idle.put(None)


class _Decoder:
    """One child process, which serves one clip at a time, and the socket to it."""

    def __init__(self, limits: settings.Audio) -> None:
        self._clips = 0
        self._swollen = False
        self._limits = limits
        self._ready = False
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "workers.decoding.child", limits.model_dump_json()],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                # The child closes it when it is ready.
                stderr=subprocess.PIPE,
                env=_environment(),
            )

    @property
    def usable(self) -> bool:
        return (
            self._process.poll() is None
            and self._clips < self._limits.clips_per_decoder
            and not self._swollen
        )

    def wait_until_ready(self) -> None:
        if self._ready:
            return
        try:
            self._receive(1, time.monotonic() + START_TIMEOUT_S)
        except OSError as error:
            raise errors.ServiceError(
                reason=f"The audio decoder does not start: {self._last_words()}."
            ) from error
        assert self._process.stderr is not None
        self._process.stderr.close()
        self._ready = True

    def decode(self, descriptor: int, sample_rate: int) -> Decoded:
        self._clips += 1
        try:
            return self._exchange(descriptor, sample_rate)
        except errors.DecoderMemory:
            self.stop()
            raise
        except TimeoutError as error:
            self.stop()
            raise errors.DecoderTimeout(timeout_s=self._limits.decode_timeout_s) from error
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
        ) as error:  # it died, or what it says makes no sense
            raise self._post_mortem() from error

    def stop(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _last_words(self) -> str:
        """Stop a child that did not become ready; return the last line it wrote, or how it ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        status = self._process.poll()
        self._process.kill()
        assert self._process.stderr is not None
        lines = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        self.stop()
        how = (
            f"no answer within {START_TIMEOUT_S:g} s"
            if status is None
            else f"it ended with status {status}"
        )
        return lines[-1].rstrip(".") if lines else how

    def _exchange(self, descriptor: int, sample_rate: int) -> Decoded:
        deadline = time.monotonic() + self._limits.decode_timeout_s
        socket.send_fds(self._socket, [struct.pack("<I", sample_rate)], [descriptor])
        (size,) = struct.unpack("<I", self._receive(4, deadline))
        if size > MAX_HEADER_BYTES:
            raise ValueError(size)
        # JSON, not pickle: a child that hostile bytes have taken over must not be able to run code here.
        header: dict[str, Any] = json.loads(self._receive(size, deadline))
        if "error" in header:
            raise _error(header)
        return self._decoded(header, sample_rate, deadline)

    def _decoded(self, header: dict[str, Any], sample_rate: int, deadline: float) -> Decoded:
        if not 0 <= header["samples"] <= (self._limits.max_duration_s + 1) * sample_rate:
            raise ValueError(header["samples"])
        samples = np.empty(header["samples"], np.float32)
        self._swollen = samples.nbytes > SWOLLEN_BYTES
        self._fill(samples.view(np.uint8).data, deadline)
        return Decoded(clips.Waveform(samples, sample_rate), clips.AudioFacts(**header["facts"]))

    def _receive(self, size: int, deadline: float) -> bytearray:
        buffer = bytearray(size)
        self._fill(memoryview(buffer), deadline)
        return buffer

    def _fill(self, rest: memoryview, deadline: float) -> None:
        while rest:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            received = self._socket.recv_into(rest)
            if not received:
                raise ConnectionResetError
            rest = rest[received:]

    def _post_mortem(self) -> errors.DecodeError:
        self.stop()
        if self._process.returncode in _TIMED_OUT:
            return errors.DecoderTimeout(timeout_s=self._limits.decode_timeout_s)
        return errors.DecoderCrashed()


def _environment() -> dict[str, str]:
    """Return what a child needs to start and nothing else: no token or password is there to be found."""
    libraries = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {**libraries, **TUNING, "PYTHONPATH": os.pathsep.join(import_path())}


def _error(header: dict[str, Any]) -> errors.ClipError:
    kind = errors.BY_CODE[header["error"]]
    if not issubclass(kind, errors.DecodeError):
        raise TypeError(kind)
    return kind(**header["facts"])
