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
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import soundfile
import soxr

from earmark.core import clips, errors, formats
from earmark.core.processes import limit
from workers.decoding import readers, wire
from workers.decoding.meter import Meter, downmix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from earmark.core import settings

    #: The channel of some samples, these in blocks, and whether they are the last.
    Piece = tuple[int, list[np.ndarray], bool]
    #: A clip in pieces, and the facts of its file once all pieces have been taken.
    Decoding = tuple[Iterator[Piece], Callable[[], clips.AudioFacts]]

#: The one free descriptor. The clip takes it, so nothing can be opened while a clip is decoded.
CLIP = 3
READY = b"+"
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
    while received := socket.recv_fds(parent, wire.REQUEST.size, 1)[0]:
        request = wire.Request(*wire.REQUEST.unpack(received))
        _end_in(audio_settings.decode_timeout_s + 1)
        start = partial(_decode, request.sample_rate, request.channels)
        if request.is_stretch:
            want = partial(_want, parent) if request.is_sparse else None
            start = partial(stretch, CLIP, request, want)
        try:
            reply(parent, start, audio_settings)
        except ConnectionError:
            return
        _end_in(0)
        os.close(CLIP)


def _end_in(seconds: float) -> None:
    """Have the kernel end this process after so long, even if the parent is dead; 0 cancels."""
    # No limit of processor time beside it: the kernel counts whole ticks against that, which on a
    # busy machine are seconds more than were used.
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _want(parent: socket.socket, block: int) -> None:
    """Have the parent bring a block of the clip."""
    parent.sendall(wire.head(0, 0, {"block": block}))
    if not parent.recv(1):
        os._exit(os.EX_OK)


def reply(
    parent: socket.socket,
    start: Callable[[settings.Audio], Decoding],
    audio_settings: settings.Audio,
) -> None:
    """Send the clip in pieces, as it is decoded, and its facts or its error with the last one."""
    channel, samples = 0, list[np.ndarray]()
    end: dict[str, Any]
    try:
        pieces, facts = start(audio_settings)
        for channel, samples, last in pieces:
            if not last:
                _send(parent, samples, channel, None, audio_settings)
        end = {"facts": dataclasses.asdict(facts())}
    except errors.DecodeError as error:
        samples, end = [], {"error": error.code, "facts": error.facts}
    except MemoryError:
        samples, end = [], {"error": errors.DecoderMemory.code, "facts": {}}
    _send(parent, samples, channel, end, audio_settings)


def _decode(sample_rate: int, channels: int, audio_settings: settings.Audio) -> Decoding:
    parts, meter = decode(CLIP, sample_rate, audio_settings, channels)
    pieces = wire.pieces(parts)
    if channels != clips.MIX_UNLESS_CANCELLING:
        return pieces, meter.facts
    # Nothing has been sent yet, so that it can begin again.
    first = list(itertools.islice(pieces, 1))
    if meter.cancelling:
        return _decode(sample_rate, clips.EACH, audio_settings)
    return itertools.chain(first, pieces), meter.facts


def _send(
    parent: socket.socket,
    samples: list[np.ndarray],
    channel: int,
    end: dict[str, Any] | None,
    audio_settings: settings.Audio,
) -> None:
    # The parent takes a piece when it has memory for it, and that time is not the decoder's.
    _end_in(0)
    parent.sendall(wire.head(sum(map(len, samples)), channel, end))
    for block in samples:
        parent.sendall(block.data)
    if end is None:
        _end_in(audio_settings.decode_timeout_s + 1)


def decode(
    clip: int, sample_rate: int, audio_settings: settings.Audio, channels: int = clips.MIX
) -> tuple[Iterator[tuple[int, np.ndarray]], Meter]:
    """Return an open file's samples at this rate, in blocks of one channel as they are decoded.

    The meter knows the facts of the file once all blocks have been taken.
    """
    audio = readers.open_audio(clip)
    meter = Meter(audio, audio_settings, channels)
    blocks = at_rate(audio, meter.watch(audio.blocks()), sample_rate)
    return by_channel(blocks, max(channels, 0)), meter


def stretch(
    clip: int,
    request: wire.Request,
    want: Callable[[int], None] | None,
    audio_settings: settings.Audio,
) -> Decoding:
    """Return some seconds of an open file as it has them: all channels, frame by frame.

    The facts have nothing but its sample rate, channels and codec, and how much there was.

    Args:
        want: brings a block of a sparse file.
    """
    audio = readers.open_sparse(clip, want) if want else readers.open_audio(clip)
    meter = Meter(audio, audio_settings, clips.MIX)
    rate, channels = audio.sample_rate, audio.channels
    start, end = round(request.start_s * rate), round(request.end_s * rate)
    count = 0

    def frames() -> Iterator[tuple[int, np.ndarray]]:
        nonlocal count
        position = audio.seek(start)
        for block in audio.blocks():
            meter.check(block)
            if position >= end or (audio.sample_rate, audio.channels) != (rate, channels):
                return
            wanted = block[max(0, start - position) : end - position]
            position += len(block)
            count += len(wanted)
            yield 0, wanted.ravel()

    def facts() -> clips.AudioFacts:
        return clips.AudioFacts(count / rate, rate, channels, audio.codec)

    return wire.pieces(frames()), facts


def at_rate(
    audio: readers.Audio, blocks: Iterable[np.ndarray], sample_rate: int
) -> Iterator[np.ndarray]:
    """Resample blocks to one rate, although the file's own and its channels may change."""

    def kind(block: np.ndarray) -> tuple[int, tuple[int, ...]]:
        return audio.sample_rate, block.shape[1:]

    for (source_rate, shape), stretch in itertools.groupby(blocks, kind):
        yield from resample(stretch, source_rate, sample_rate, shape)


def by_channel(blocks: Iterable[np.ndarray], channel: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield blocks with their channel: this one's, (frames,), or several, (frames, channels).

    A channel that is not there all the time has silence in its place.
    """
    ends: Counter[int] = Counter()
    for block in blocks:
        if block.ndim == 1:
            yield channel, block
            continue
        begin = ends[1]
        for number, samples in enumerate(block.T, 1):
            while missing := min(begin - ends[number], readers.BLOCK_FRAMES):
                yield number, np.zeros(missing, np.float32)
                ends[number] += missing
            yield number, np.ascontiguousarray(samples)
            ends[number] += len(block)


def resample(
    blocks: Iterable[np.ndarray], source_rate: int, sample_rate: int, shape: tuple[int, ...] = ()
) -> Iterator[np.ndarray]:
    """Resample block by block to the same bits that librosa.resample gives for the whole clip.

    Args:
        shape: of one frame: `(channels,)`, or empty for blocks of shape (frames,).
    """
    if source_rate == sample_rate:
        yield from blocks
        return
    # A low rate gives many samples for one.
    step = min(readers.BLOCK_FRAMES, readers.BLOCK_FRAMES * source_rate // sample_rate + 1)
    channels = math.prod(shape)
    stream = soxr.ResampleStream(source_rate, sample_rate, channels, dtype="float32", quality="HQ")
    frames = done = 0
    for block in blocks:
        frames += len(block)
        for start in range(0, len(block), step):
            output = stream.resample_chunk(block[start : start + step])
            done += len(output)
            yield output
    output = stream.resample_chunk(np.empty((0, *shape), np.float32), last=True)
    done += len(output)
    yield output
    missing = math.ceil(frames * (float(sample_rate) / source_rate)) - done
    yield np.zeros((missing, *shape), np.float32)


if __name__ == "__main__":
    main()
