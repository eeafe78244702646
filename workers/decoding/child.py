"""The program of a decoder process: open clips in, one at a time, samples or a named error out."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import math
import os
import resource
import signal
import socket
import sys
import tempfile
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import soundfile
import soxr

from earmark.core import clips, errors, formats, recorded
from earmark.core.processes import limit
from workers.decoding import lengths, readers, tags, wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from earmark.core import settings

    #: Samples in blocks, and the facts of the file once all blocks have been taken.
    Decoding = tuple[Iterator[np.ndarray], Callable[[], clips.AudioFacts]]

#: The one free descriptor. The clip takes it, so nothing can be opened while a clip is decoded.
CLIP = 3
READY = b"+"
#: Times full scale. Float files that hold scaled integers or garbage lie far above it.
MAX_AMPLITUDE = 1000.0
#: Samples of all channels beyond the declared ones, before the rest of the file is counted.
MAX_UNDECLARED = 2**20
#: The mix of channels that have nothing in common has their energy; of those that cancel, less.
CANCELLED = 0.05
#: The mean energy of a sample 80 dB below full scale.
INAUDIBLE = 1e-8
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
        limit(resource.RLIMIT_AS, max_memory)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_NPROC, 0)
    limit(resource.RLIMIT_NOFILE, CLIP + 1)
    os.dup2(1, 2)


def serve(parent: socket.socket, audio_settings: settings.Audio) -> None:
    """Decode the clips that the parent sends, until the parent is gone."""
    while request := socket.recv_fds(parent, wire.REQUEST.size, 1)[0]:
        sample_rate, start_s, end_s = wire.REQUEST.unpack(request)
        _end_in(audio_settings.decode_timeout_s + 1)
        try:
            if sample_rate:
                reply(parent, partial(decode, CLIP, sample_rate), audio_settings)
            else:
                reply(parent, partial(stretch, CLIP, start_s, end_s), audio_settings)
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


def reply(
    parent: socket.socket,
    start: Callable[[settings.Audio], Decoding],
    audio_settings: settings.Audio,
) -> None:
    """Send the clip in pieces, as it is decoded, and its facts or its error with the last one."""
    samples: list[np.ndarray] = []
    end: dict[str, Any]
    try:
        blocks, facts = start(audio_settings)
        for samples, last in wire.pieces(blocks):
            if not last:
                _send(parent, samples, None, audio_settings)
        end = {"facts": dataclasses.asdict(facts())}
    except errors.DecodeError as error:
        samples, end = [], {"error": error.code, "facts": error.facts}
    except MemoryError:
        samples, end = [], {"error": errors.DecoderMemory.code, "facts": {}}
    _send(parent, samples, end, audio_settings)


def _send(
    parent: socket.socket,
    samples: list[np.ndarray],
    end: dict[str, Any] | None,
    audio_settings: settings.Audio,
) -> None:
    # The parent takes a piece when it has memory for it, and that time is not the decoder's.
    _end_in(0)
    parent.sendall(wire.head(sum(map(len, samples)), end))
    for block in samples:
        parent.sendall(block.data)
    if end is None:
        _end_in(audio_settings.decode_timeout_s + 1)


def decode(clip: int, sample_rate: int, audio_settings: settings.Audio) -> Decoding:
    """Return an open file's mono samples at this rate, in blocks as they are decoded.

    The function returns the facts of the file once all blocks have been taken.
    """
    audio = readers.open_audio(clip)
    meter = _Meter(audio, audio_settings)
    blocks = at_rate(audio, meter.watch(audio.blocks()), sample_rate)
    return blocks, meter.facts


def stretch(clip: int, start_s: float, end_s: float, audio_settings: settings.Audio) -> Decoding:
    """Return some seconds of an open file as it has them: all channels, frame by frame.

    The facts have nothing but its sample rate, channels and codec, and how much there was.
    """
    audio = readers.open_audio(clip)
    meter = _Meter(audio, audio_settings)
    rate, channels = audio.sample_rate, audio.channels
    start, end = round(start_s * rate), round(end_s * rate)
    count = 0

    def frames() -> Iterator[np.ndarray]:
        nonlocal count
        position = audio.seek(start)
        for block in audio.blocks():
            meter.check(block)
            if position >= end or (audio.sample_rate, audio.channels) != (rate, channels):
                return
            wanted = block[max(0, start - position) : end - position]
            position += len(block)
            count += len(wanted)
            yield wanted.ravel()

    return frames(), lambda: clips.AudioFacts(count / rate, rate, channels, audio.codec)


def at_rate(
    audio: readers.Audio, blocks: Iterable[np.ndarray], sample_rate: int
) -> Iterator[np.ndarray]:
    """Resample blocks to one rate, although the file's own may change on the way."""
    for source_rate, stretch in itertools.groupby(blocks, lambda _: audio.sample_rate):
        yield from resample(stretch, source_rate, sample_rate)


class _Meter:
    """Counts and checks the samples that pass; raises a DecodeError for those over a limit."""

    def __init__(self, audio: readers.Audio, audio_settings: settings.Audio) -> None:
        self._audio, self._settings = audio, audio_settings
        self._rate, self._channels = audio.sample_rate, audio.channels
        self._refuse_kind()
        self._source_rate, self._source_channels = self._rate, self._channels
        #: Frames at this sample rate, seconds at earlier ones, samples of all channels.
        self._frames, self._earlier_s, self._samples = 0, 0.0, 0
        self._all_frames = 0
        self._silent, self._over_scale, self._cancelling = True, False, False
        self._refuse_longer(audio.declared_frames)
        self._count_from = audio.declared_frames + MAX_UNDECLARED / audio.channels

    def watch(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the mix of the channels of each block."""
        for block in blocks:
            yield self._mix(block, self.check(block))

    def check(self, block: np.ndarray) -> float:
        """Count a block, and refuse it if need be; return its energy."""
        if (self._audio.sample_rate, self._audio.channels) != (self._rate, self._channels):
            self._change()
        self._count(block)
        samples = block.ravel(order="K")
        energy = float(samples @ samples)
        self._check(samples, energy)
        return energy

    def _change(self) -> None:
        self._earlier_s, self._frames = self._seconds(0), 0
        self._rate, self._channels = self._audio.sample_rate, self._audio.channels
        self._refuse_kind()

    def _count(self, block: np.ndarray) -> None:
        self._refuse_longer(len(block))
        self._frames += len(block)
        self._all_frames += len(block)
        self._samples += block.size
        if self._all_frames > self._count_from:
            self._count_from = math.inf
            for frames in self._audio.count():
                self._refuse_longer(frames - self._all_frames)

    def _mix(self, block: np.ndarray, energy: float) -> np.ndarray:
        mono = downmix(block)
        if block.shape[1] == 1 or not cancels(block, mono, energy):
            return mono
        self._cancelling = True
        return loud_channel(block)

    def _check(self, samples: np.ndarray, energy: float) -> None:
        # The energy of samples takes a third of the time of their peak, and tells most of it.
        self._silent = self._silent and not energy and not samples.any()
        if energy < MAX_AMPLITUDE**2 and not self._audio.holds_floats:
            return
        peak = float(max(samples.max(), -samples.min()))
        if math.isnan(peak) or peak > MAX_AMPLITUDE:
            raise _not_finite(peak)
        self._over_scale |= peak > 1 and self._audio.holds_floats

    def _seconds(self, more: int) -> float:
        return self._earlier_s + (self._frames + more) / self._rate

    def _refuse_longer(self, more: int) -> None:
        """Refuse so many more frames if they are too many."""
        longest_s, most = self._settings.max_duration_s, self._settings.max_samples
        if self._seconds(more) > longest_s:
            raise errors.TooLong(max_duration_s=longest_s, setting="EARMARK_AUDIO__MAX_DURATION_S")
        if self._samples + more * self._channels > most:
            longest_s = most / (self._rate * self._channels)
            raise errors.TooLong(max_duration_s=longest_s, setting="EARMARK_AUDIO__MAX_SAMPLES")

    def _refuse_kind(self) -> None:
        limits = self._settings
        reason = f"a sample rate of {self._rate:,} Hz"
        if self._rate < limits.min_sample_rate:
            raise errors.Unsupported(reason=f"{reason} (EARMARK_AUDIO__MIN_SAMPLE_RATE)")
        if self._rate > limits.max_sample_rate:
            raise errors.Unsupported(reason=f"{reason} (EARMARK_AUDIO__MAX_SAMPLE_RATE)")
        if not 1 <= self._channels <= limits.max_channels:
            reason = f"{self._channels:,} channels (EARMARK_AUDIO__MAX_CHANNELS)"
            raise errors.Unsupported(reason=reason)

    def facts(self) -> clips.AudioFacts:
        audio = self._audio
        truncated = audio.damaged or self._all_frames < audio.least_frames
        truncated = truncated or lengths.is_cut_short(audio.clip, audio.format.name, audio.length)
        if truncated and not self._all_frames:
            raise errors.Corrupt(reason="none of it can be decoded")
        duration_s = self._seconds(0)
        if duration_s < self._settings.min_duration_s:
            raise errors.TooShort(
                min_duration_s=self._settings.min_duration_s,
                setting="EARMARK_AUDIO__MIN_DURATION_S",
            )
        found = tags.read(audio.clip, audio.format.name, audio.tags())
        time, source = recorded.by_tags(found)
        return clips.AudioFacts(
            duration_s,
            self._source_rate,
            self._source_channels,
            audio.codec,
            truncated=truncated,
            silent=self._silent,
            over_scale=self._over_scale,
            cancelling=self._cancelling,
            tags=json.dumps(found) if found else "",
            recorded_at=time,
            recorded_from=source,
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


def cancels(block: np.ndarray, mono: np.ndarray, energy: float) -> bool:
    """Return whether the channels of a block, (frames, channels), cancel each other in its mix."""
    mixed = float(mono @ mono) * block.shape[1] ** 2
    return mixed < CANCELLED * energy and energy > INAUDIBLE * len(block)


def loud_channel(block: np.ndarray) -> np.ndarray:
    """Return the first channel that has half the energy of the loudest."""
    energies = np.einsum("ij,ij->j", block, block)
    return np.ascontiguousarray(block[:, np.argmax(energies >= energies.max() / 2)])


def resample(
    blocks: Iterable[np.ndarray], source_rate: int, sample_rate: int
) -> Iterator[np.ndarray]:
    """Resample block by block to the same bits that librosa.resample gives for the whole clip."""
    if source_rate == sample_rate:
        yield from blocks
        return
    # A low rate gives many samples for one.
    step = min(readers.BLOCK_FRAMES, readers.BLOCK_FRAMES * source_rate // sample_rate + 1)
    stream = soxr.ResampleStream(source_rate, sample_rate, 1, dtype="float32", quality="HQ")
    frames = done = 0
    for block in blocks:
        frames += len(block)
        for start in range(0, len(block), step):
            output = stream.resample_chunk(block[start : start + step])
            done += len(output)
            yield output
    output = stream.resample_chunk(np.empty(0, np.float32), last=True)
    done += len(output)
    yield output
    yield np.zeros(math.ceil(frames * (float(sample_rate) / source_rate)) - done, np.float32)


if __name__ == "__main__":
    main()
