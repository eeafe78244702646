"""The program of a decoder process: open clips in, one at a time, samples or a named error out."""

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
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import soundfile
import soxr

from earmark.core import clips, errors, formats
from workers.decoding import readers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from earmark.core import settings

#: The one free descriptor. The clip takes it, so nothing can be opened while a clip is decoded.
CLIP = 3
READY = b"+"
#: Times full scale. Float files that hold scaled integers or garbage lie far above it.
MAX_AMPLITUDE = 1000.0
#: Samples of all channels beyond the declared ones, before the rest of the file is counted.
MAX_UNDECLARED = 2**20
PR_SET_NO_NEW_PRIVS = 38


def main() -> None:
    # The settings as plain values: importing pydantic would double a decoder's start-up time.
    audio_settings = cast("settings.Audio", SimpleNamespace(**json.loads(sys.argv[1])))
    parent = socket.socket(fileno=0)
    warm_up()
    confine(audio_settings.decode_memory)
    parent.sendall(READY)
    serve(parent, audio_settings)


def warm_up() -> None:
    """Have both readers load their libraries, which they cannot do once nothing can be opened."""
    with tempfile.TemporaryFile() as file:
        soundfile.write(file, np.zeros((800, 2)), 8000, format="WAV")
        for reader in (readers.Sndfile, readers.Ffmpeg):
            audio = reader(file.fileno(), formats.recognise(file.fileno()))
            list(resample(map(downmix, audio.blocks()), audio.sample_rate, 16000))


def confine(max_memory: int) -> None:
    """Give up, for good, every right that decoding does not need."""
    # These signals are meant for the worker, which ends this process when it has drained.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.closerange(CLIP, 256)
    if sys.platform == "linux":  # other systems refuse RLIMIT_AS
        ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _limit(resource.RLIMIT_AS, max_memory)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NPROC, 0)
    _limit(resource.RLIMIT_NOFILE, CLIP + 1)
    os.dup2(1, 2)


def _limit(kind: int, most: int) -> None:
    """Set a resource limit; it stays lower where the hard limit is, which cannot be raised."""
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(kind, (most, most))


def serve(parent: socket.socket, audio_settings: settings.Audio) -> None:
    """Decode the clips that the parent sends, until the parent is gone."""
    while request := socket.recv_fds(parent, 4, 1)[0]:
        (sample_rate,) = struct.unpack("<I", request)
        _end_in(audio_settings.decode_timeout_s + 1)
        try:
            reply(parent, sample_rate, audio_settings)
        except ConnectionError:
            return
        _end_in(0)
        os.close(CLIP)


def _end_in(seconds: float) -> None:
    """Have the kernel end this process after so long, even if the parent is dead; 0 cancels."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + seconds + 1), hard))


def reply(parent: socket.socket, sample_rate: int, audio_settings: settings.Audio) -> None:
    blocks: list[np.ndarray] = []
    try:
        blocks, facts = decode(CLIP, sample_rate, audio_settings)
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
    clip: int, sample_rate: int, audio_settings: settings.Audio
) -> tuple[list[np.ndarray], clips.AudioFacts]:
    """Return an open file's mono samples at this rate, in blocks, and the facts of the file."""
    audio = readers.open_audio(clip)
    meter = _Meter(audio, audio_settings)
    mono = meter.watch(map(downmix, audio.blocks()))
    blocks = list(resample(mono, audio.sample_rate, sample_rate))
    return blocks, meter.facts()


class _Meter:
    """Counts and checks the samples that pass; raises a DecodeError for those over a limit."""

    def __init__(self, audio: readers.Audio, audio_settings: settings.Audio) -> None:
        lowest, highest = audio_settings.min_sample_rate, audio_settings.max_sample_rate
        if not lowest <= audio.sample_rate <= highest:
            raise errors.Unsupported(reason=f"a sample rate of {audio.sample_rate:,} Hz")
        if not 1 <= audio.channels <= audio_settings.max_channels:
            raise errors.Unsupported(reason=f"{audio.channels:,} channels")
        self._audio, self._settings = audio, audio_settings
        by_samples_s = audio_settings.max_samples / (audio.sample_rate * audio.channels)
        self._longest_s, self._setting = min(
            (audio_settings.max_duration_s, "EARMARK_AUDIO__MAX_DURATION_S"),
            (by_samples_s, "EARMARK_AUDIO__MAX_SAMPLES"),
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
            if math.isnan(peak) or peak > MAX_AMPLITUDE:
                raise _not_finite(peak)
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
        if duration_s < self._settings.min_duration_s:
            raise errors.TooShort(min_duration_s=self._settings.min_duration_s)
        silent = not self._peak
        return clips.AudioFacts(
            duration_s, audio.sample_rate, audio.channels, audio.codec, truncated, silent
        )


def _not_finite(peak: float) -> errors.NotFinite:
    if math.isfinite(peak):
        return errors.NotFinite(reason=f"{peak:g} times full scale")
    return errors.NotFinite(reason="not a number, or infinite")


def downmix(block: np.ndarray) -> np.ndarray:
    """Average the channels of a block: (frames, channels) in, (frames,) out."""
    channels = block.shape[1]
    if channels == 1:
        return block[:, 0]
    # mean(axis=1) gives the same bits and takes ten times as long.
    mono = block[:, 0] + block[:, 1]
    for channel in range(2, channels):
        mono += block[:, channel]
    mono /= channels
    return cast("np.ndarray", mono)


def resample(
    blocks: Iterable[np.ndarray], source_rate: int, sample_rate: int
) -> Iterator[np.ndarray]:
    """Resample block by block to the same bits that librosa.resample gives for the whole clip."""
    if source_rate == sample_rate:
        yield from blocks
        return
    stream = soxr.ResampleStream(source_rate, sample_rate, 1, dtype="float32", quality="HQ")
    frames = done = 0
    for block in blocks:
        frames += len(block)
        output = stream.resample_chunk(block)
        done += len(output)
        yield output
    output = stream.resample_chunk(np.empty(0, np.float32), last=True)
    done += len(output)
    yield output
    yield np.zeros(math.ceil(frames * (float(sample_rate) / source_rate)) - done, np.float32)


if __name__ == "__main__":
    main()
