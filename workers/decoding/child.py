"""What runs in a disposable decoder process: open clips in, one at a time, samples or a named error out."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
import tempfile
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import soundfile
import soxr

from earmark.core import clips, errors
from workers.decoding import formats, readers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from earmark.core import settings

#: The one free descriptor: the clip takes it, so nothing can be opened while a clip is decoded.
CLIP = 3
READY = b"+"
#: Times full scale; float files of scaled integers and of garbage lie far above it.
MAX_AMPLITUDE = 1000.0
#: Samples beyond the declared ones, of all channels, before it is counted how many are yet to come.
MAX_UNDECLARED = 2**20
PR_SET_NO_NEW_PRIVS = 38


def main() -> None:
    # The settings as plain values: importing pydantic would double the time a new decoder takes to start.
    limits = cast("settings.Audio", SimpleNamespace(**json.loads(sys.argv[1])))
    parent = socket.socket(fileno=0)
    warm_up()
    confine(limits.decode_memory)
    parent.sendall(READY)
    serve(parent, limits)


def warm_up() -> None:
    """Have both readers load all they load on first use, which they cannot once nothing can be opened."""
    with tempfile.TemporaryFile() as file:
        soundfile.write(file, np.zeros((800, 2)), 8000, format="WAV")
        for reader in (readers.Sndfile, readers.Ffmpeg):
            audio = reader(file.fileno(), formats.recognise(file.fileno()))
            list(resample(map(downmix, audio.blocks()), audio.sample_rate, 16000))


def confine(max_memory: int) -> None:
    """Give up, for good, all that decoding does not need."""
    for name in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # meant for the worker, which ends us when it has drained
        signal.signal(name, signal.SIG_IGN)
    os.closerange(CLIP, 256)
    allowances = dict.fromkeys(
        (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC), 0
    )
    allowances[resource.RLIMIT_NOFILE] = CLIP + 1
    if sys.platform == "linux":  # elsewhere it is refused
        allowances[resource.RLIMIT_AS] = max_memory
        ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for what, most in allowances.items():
        limit = _at_most(most, resource.getrlimit(what)[1])
        resource.setrlimit(what, (limit, limit))
    os.dup2(1, 2)


def _at_most(limit: int, hard: int) -> int:
    """Return a limit that the process may set: a hard limit cannot be raised."""
    return limit if hard == resource.RLIM_INFINITY else min(limit, hard)


def serve(parent: socket.socket, limits: settings.Audio) -> None:
    """Decode what the parent sends until the parent is gone."""
    while request := socket.recv_fds(parent, 4, 1)[0]:
        (sample_rate,) = struct.unpack("<I", request)
        _end_in(limits.decode_timeout_s + 1)
        try:
            reply(parent, sample_rate, limits)
        except ConnectionError:
            return
        _end_in(0)
        os.close(CLIP)


def _end_in(seconds: float) -> None:
    """Have the kernel end this process then, even if the parent no longer lives to do so; 0 calls it off."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + seconds + 1), hard))


def reply(parent: socket.socket, sample_rate: int, limits: settings.Audio) -> None:
    blocks: list[np.ndarray] = []
    try:
        blocks, facts = decode(CLIP, sample_rate, limits)
        header = {"samples": sum(map(len, blocks)), "facts": dataclasses.asdict(facts)}
    except errors.DecodeError as error:
        header = {"error": error.code, "facts": error.facts}
    except MemoryError:
        blocks = []
        header = {"error": errors.DecoderMemory.code, "facts": {}}
    text = json.dumps(header).encode()
    parent.sendall(struct.pack("<I", len(text)) + text)
    for block in blocks:
        parent.sendall(block.data)


def decode(
    clip: int, sample_rate: int, limits: settings.Audio
) -> tuple[list[np.ndarray], clips.AudioFacts]:
    """Return the mono samples of an open file at this rate, in blocks, and what it was before."""
    audio = readers.open_audio(clip)
    meter = _Meter(audio, limits)
    mono = meter.watch(map(downmix, audio.blocks()))
    blocks = list(resample(mono, audio.sample_rate, sample_rate))
    return blocks, meter.facts()


class _Meter:
    """Counts the samples that pass, and stops what must not."""

    def __init__(self, audio: readers.Audio, limits: settings.Audio) -> None:
        if not limits.min_sample_rate <= audio.sample_rate <= limits.max_sample_rate:
            raise errors.Unsupported(reason=f"a sample rate of {audio.sample_rate:,} Hz")
        if not 1 <= audio.channels <= limits.max_channels:
            raise errors.Unsupported(reason=f"{audio.channels:,} channels")
        self._audio, self._limits = audio, limits
        self._longest_s, self._setting = min(
            (limits.max_duration_s, "EARMARK_AUDIO__MAX_DURATION_S"),
            (
                limits.max_samples / (audio.sample_rate * audio.channels),
                "EARMARK_AUDIO__MAX_SAMPLES",
            ),
        )
        self._frames, self._peak = 0, 0.0
        self._refuse_longer(audio.declared_frames)
        self._count_from = audio.declared_frames + MAX_UNDECLARED / audio.channels

    def watch(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            self._frames += len(block)
            self._refuse_longer(self._frames)
            if self._frames > self._count_from:
                self._count_from = math.inf
                for frames in self._audio.count():
                    self._refuse_longer(frames)
            peak = float(max(block.max(), -block.min()))
            if not peak <= MAX_AMPLITUDE:
                reason = (
                    f"{peak:g} times full scale"
                    if math.isfinite(peak)
                    else "not a number, or infinite"
                )
                raise errors.NotFinite(reason=reason)
            self._peak = max(self._peak, peak)
            yield block

    def _refuse_longer(self, frames: int) -> None:
        if frames > self._longest_s * self._audio.sample_rate:
            raise errors.TooLong(max_duration_s=self._longest_s, setting=self._setting)

    def facts(self) -> clips.AudioFacts:
        audio, frames = self._audio, self._frames
        truncated = audio.damaged or frames < audio.least_frames
        truncated = truncated or formats.is_cut_short(audio.clip, audio.format.name)
        if truncated and not frames:
            raise errors.Corrupt(reason="none of it can be decoded")
        duration_s = frames / audio.sample_rate
        if duration_s < self._limits.min_duration_s:
            raise errors.TooShort(min_duration_s=self._limits.min_duration_s)
        silent = not self._peak
        return clips.AudioFacts(
            duration_s, audio.sample_rate, audio.channels, audio.codec, truncated, silent
        )


def downmix(block: np.ndarray) -> np.ndarray:
    """Average the channels of a (frames, channels) block."""
    channels = block.shape[1]
    if channels == 1:
        return block[:, 0]
    mono = block[:, 0] + block[:, 1]  # mean(axis=1) takes ten times as long and gives the same bits
    for channel in range(2, channels):
        mono += block[:, channel]
    mono /= channels
    return cast("np.ndarray", mono)


def resample(
    blocks: Iterable[np.ndarray], source_rate: int, sample_rate: int
) -> Iterator[np.ndarray]:
    """Resample block by block to the very bits librosa.resample gives for the whole."""
    if source_rate == sample_rate:
        yield from blocks
        return
    stream = soxr.ResampleStream(source_rate, sample_rate, 1, dtype="float32", quality="HQ")
    frames = done = 0
    for block in chain(blocks, [None]):
        output = stream.resample_chunk(
            np.empty(0, np.float32) if block is None else block, last=block is None
        )
        frames += 0 if block is None else len(block)
        done += len(output)
        yield output
    yield np.zeros(math.ceil(frames * (float(sample_rate) / source_rate)) - done, np.float32)


if __name__ == "__main__":
    main()
