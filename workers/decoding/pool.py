"""An open clip in, its waveform out, decoded by a pool of disposable child processes."""

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
#: A child that has closed its socket ends within this.
END_S = 1.0
MAX_HEADER_BYTES = 65536
#: Giving memory back after each clip costs 2 ms a clip. OpenBLAS threads cost address space.
TUNING = {
    "MALLOC_TRIM_THRESHOLD_": str(32 * 1024**2),
    "MALLOC_MMAP_THRESHOLD_": str(4 * 1024**2),
    "OPENBLAS_NUM_THREADS": "1",
}
#: A decoder keeps the memory of a waveform this large, so it is replaced afterwards.
SWOLLEN_BYTES = 64 * 1024**2
#: Raised when a child dies, or sends an answer that makes no sense.
_BROKEN = (OSError, ValueError, KeyError, TypeError)
_TIMED_OUT = (-signal.SIGALRM, -signal.SIGXCPU)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A decoded clip: its waveform and the facts of its file."""

    waveform: clips.Waveform
    facts: clips.AudioFacts


class Decoders:
    """A pool of sandboxed decoder processes, for untrusted files.

    Use one per worker, shared by its threads, and close it. Each process decodes one clip at a
    time; further callers wait for a free one. A file that crashes, hangs or swells its process
    costs only itself, as the pool starts another.

    Raises ServiceError when created if the decoders cannot start.
    """

    def __init__(self, audio_settings: settings.Audio, processes: int) -> None:
        self._settings = audio_settings
        self._processes = processes
        # Last in, first out: the process used last has its data in the processor's cache still.
        self._idle: queue.LifoQueue[_Decoder | None] = queue.LifoQueue()
        children = [_Decoder(audio_settings) for _ in range(processes)]
        for child in children:
            self._idle.put(child)
        try:
            for child in children:
                child.wait_until_ready()
        except errors.ServiceError:
            self.close()
            raise

    def decode(self, file: BinaryIO, sample_rate: int) -> Decoded:
        """Return the mono waveform of a file at `sample_rate` Hz, and the file's facts.

        Raises:
            DecodeError: the file is no audio, is damaged or over a limit, or broke its decoder.
            ServiceError: no decoder can be started, or the pool is closed.
        """
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise errors.NotAudio(kind="a device, a pipe or a folder")
        child = self._idle.get()
        try:
            if child is None:
                raise errors.ServiceError(reason="The decoders are closed.")
            if not child.usable:
                child.stop()
                child = _Decoder(self._settings)
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

    def __init__(self, audio_settings: settings.Audio) -> None:
        self._clips = 0
        self._swollen = False
        self._settings = audio_settings
        self._ready = False
        program = [sys.executable, "-P", "-m", "workers.decoding.child"]
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*program, audio_settings.model_dump_json()],
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
            and self._clips < self._settings.clips_per_decoder
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
            raise errors.DecoderTimeout(timeout_s=self._settings.decode_timeout_s) from error
        except _BROKEN as error:
            raise self._post_mortem() from error

    def stop(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _last_words(self) -> str:
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

    def _exchange(self, descriptor: int, sample_rate: int) -> Decoded:
        deadline = time.monotonic() + self._settings.decode_timeout_s
        socket.send_fds(self._socket, [struct.pack("<I", sample_rate)], [descriptor])
        (size,) = struct.unpack("<I", self._receive(4, deadline))
        if size > MAX_HEADER_BYTES:
            raise ValueError(size)
        # JSON, not pickle: a child that hostile bytes have taken over must not run code here.
        header: dict[str, Any] = json.loads(self._receive(size, deadline))
        if "error" in header:
            raise _error(header)
        return self._decoded(header, sample_rate, deadline)

    def _decoded(self, header: dict[str, Any], sample_rate: int, deadline: float) -> Decoded:
        if not 0 <= header["samples"] <= (self._settings.max_duration_s + 1) * sample_rate:
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
            return errors.DecoderTimeout(timeout_s=self._settings.decode_timeout_s)
        return errors.DecoderCrashed()


def _environment() -> dict[str, str]:
    """Return a child's environment: what it needs to start, and no token or password."""
    environment = {**TUNING, "PYTHONPATH": os.pathsep.join(import_path())}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment


def _error(header: dict[str, Any]) -> errors.ClipError:
    kind = errors.BY_CODE[header["error"]]
    if not issubclass(kind, errors.DecodeError):
        raise TypeError(kind)
    return kind(**header["facts"])
