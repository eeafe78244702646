"""An open clip in, its audio out in blocks, read by libsndfile or FFmpeg; never by path or name."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING

import av
import numpy as np
import soundfile

from earmark.core import errors, formats

if TYPE_CHECKING:
    from collections.abc import Iterator

    from earmark.core.formats import Format

#: Blocks that stay in the processor's cache, where the resampler is fastest.
BLOCK_FRAMES = 65536
#: FLAC is read in smaller steps: libsndfile gives nothing of a step that holds damage.
FLAC_FRAMES = 8192
#: libsndfile gives a length above this if it knows none.
UNKNOWN_FRAMES = 2**62
#: libsndfile's error code.
OUT_OF_MEMORY = 17
#: Formats whose header tells their length. For others, FFmpeg guesses.
TIMED = ("mp4", "matroska", "asf", "ogg", "wav", "flac")
#: A container's duration and its codec's frames may differ by this much.
CLOCK_S = 0.1
#: PyAV raises these for damage, and for lack of memory too.
DAMAGE = (av.error.FFmpegError, OSError, ValueError)


def open_audio(clip: int) -> Audio:
    """Open a file, given by its descriptor, with the reader that suits its format.

    Raises:
        DecodeError: neither reader can open it.
        MemoryError: its header asks for too much memory.
    """
    known = formats.recognise(clip)
    # Without a count, libsndfile guesses an MP3's length by its first frame and reads no further.
    if known.ffmpeg_first or (known.name == "mp3" and not formats.counts_mp3_frames(clip)):
        return Ffmpeg(clip, known)
    try:
        return Sndfile(clip, known)
    except soundfile.LibsndfileError as error:
        if error.code == OUT_OF_MEMORY:
            raise MemoryError from error
        refusal = error.error_string.rstrip(".")
    try:
        return Ffmpeg(clip, known)
    except errors.DecodeError:
        if known is formats.UNKNOWN:
            raise errors.NotAudio(kind=formats.describe(clip)) from None
        raise errors.Corrupt(reason=refusal) from None


class Audio(ABC):
    """An opened clip, to be read once from front to back."""

    def __init__(self, clip: int, known: Format) -> None:
        os.lseek(clip, 0, os.SEEK_SET)
        self.clip, self.format = clip, known
        self.codec = ""
        self.sample_rate = self.channels = 0
        #: Frames by the header; 0: unknown.
        self.declared_frames = 0
        #: A file that gives fewer frames was cut short.
        self.least_frames = 0
        self.damaged = False

    @abstractmethod
    def blocks(self) -> Iterator[np.ndarray]:
        """Yield float32 samples, shape (frames, channels)."""

    def count(self) -> Iterator[int]:
        """Yield the number of frames up to the end of each packet, without decoding any."""
        place = os.lseek(self.clip, 0, os.SEEK_CUR)
        try:
            yield from Ffmpeg(self.clip, self.format).packet_ends()
        except errors.DecodeError:  # then only decoding tells the length
            return
        finally:
            os.lseek(self.clip, place, os.SEEK_SET)


class _Sequential(soundfile.SoundFile):  # type: ignore[misc]  # it comes without types
    """Reads without a seek after each block: it changes MP3 samples, and some formats lack it."""

    def seekable(self) -> bool:
        return False


class Sndfile(Audio):
    """Audio read by libsndfile."""

    def __init__(self, clip: int, known: Format) -> None:
        super().__init__(clip, known)
        self._file = _Sequential(clip, closefd=False)
        self.codec = f"{self._file.format}/{self._file.subtype}".lower()
        self.sample_rate, self.channels = self._file.samplerate, self._file.channels
        self.declared_frames = self._file.frames if self._file.frames < UNKNOWN_FRAMES else 0
        # The length of other formats is a guess.
        if known.name == "flac" or formats.counts_mp3_frames(clip):
            self.least_frames = self.declared_frames

    def blocks(self) -> Iterator[np.ndarray]:
        while not self.damaged and len(block := self._block()):
            yield block

    def _block(self) -> np.ndarray:
        block = np.empty((BLOCK_FRAMES, self.channels), np.float32)
        step = FLAC_FRAMES if self.format.name == "flac" else BLOCK_FRAMES
        done = 0
        try:
            while count := self._file.buffer_read_into(block[done : done + step].data, "float32"):
                done += count
        except soundfile.LibsndfileError:
            self.damaged = True
        return block[:done]


class Ffmpeg(Audio):
    """Audio read by FFmpeg, with the one demuxer for the file's first bytes."""

    def __init__(self, clip: int, known: Format) -> None:
        super().__init__(clip, known)
        file = io.FileIO(clip, closefd=False)
        # Else PyAV would pass the descriptor's number as a name. FFmpeg takes hints from names.
        file.name = "clip"
        try:
            self._container = av.open(
                file,
                "r",
                format=known.demuxer,
                options={"protocol_whitelist": ""},
                metadata_errors="ignore",
            )
        except av.error.MemoryError as error:  # nothing is decoded yet, so the header asks for it
            reason = "its header asks for more memory than a clip may have"
            raise errors.Corrupt(reason=reason) from error
        except DAMAGE as error:
            raise errors.Corrupt(reason=str(getattr(error, "strerror", error))) from error
        if not self._container.streams.audio:
            raise errors.Unsupported(reason="it holds no audio track")
        self._stream = self._container.streams.audio[0]
        self._describe(self._stream.codec_context)

    def _describe(self, codec: av.AudioCodecContext | None) -> None:
        if codec is None:
            raise errors.Unsupported(reason="its codec is unknown")
        self.codec = f"{self.format.name}/{codec.name}"
        self.sample_rate, self.channels = codec.sample_rate, codec.channels
        self.declared_frames = int(self._declared_s() * self.sample_rate)
        self.least_frames = self.declared_frames - int(CLOCK_S * self.sample_rate)

    def _declared_s(self) -> float:
        if self.format.name not in TIMED:
            return 0.0
        if self._stream.duration and self._stream.time_base:
            return float(self._stream.duration * self._stream.time_base)
        if len(self._container.streams) > 1:  # a video track may be longer
            return 0.0
        return (self._container.duration or 0) / av.time_base

    def blocks(self) -> Iterator[np.ndarray]:
        # A codec's frames are short: handling each one would cost more than decoding it.
        queue = av.AudioFifo()
        with self._noting_damage():
            for packet in self._packets():
                self.damaged |= packet.is_corrupt
                with self._noting_damage():  # the next packet may be whole
                    self._decode(packet, queue)
                if queue.samples >= BLOCK_FRAMES and (frame := queue.read()):
                    yield _samples(frame)
            if frame := queue.read():
                yield _samples(frame)

    def packet_ends(self) -> Iterator[int]:
        time = 0
        frames_per_tick = float((self._stream.time_base or 0) * self.sample_rate)
        for packet in self._packets():
            time += packet.duration or 0
            yield int(time * frames_per_tick)

    def _packets(self) -> Iterator[av.Packet[av.AudioStream]]:
        try:
            yield from self._container.demux(self._stream)
        except DAMAGE:  # or lack of memory: a packet is as large as the file says
            self.damaged = True

    def _decode(self, packet: av.Packet[av.AudioStream], queue: av.AudioFifo) -> None:
        for frame in packet.decode():
            if not queue.samples_written:
                self.channels = frame.layout.nb_channels
            if (frame.sample_rate, frame.layout.nb_channels) != (self.sample_rate, self.channels):
                raise errors.Unsupported(reason="its sample rate or its channels change on the way")
            frame.pts = None
            queue.write(frame)

    @contextmanager
    def _noting_damage(self) -> Iterator[None]:
        try:
            yield
        except MemoryError:
            raise
        except DAMAGE:
            self.damaged = True


#: Divisors of integer samples, as in libsndfile.
_SCALES = {"uint8": 2**7, "int16": 2**15, "int32": 2**31}


def _samples(frame: av.AudioFrame) -> np.ndarray:
    array = frame.to_ndarray()
    array = array.T if frame.format.is_planar else array.reshape(-1, frame.layout.nb_channels)
    samples = array.astype(np.float32)
    if array.dtype == np.uint8:
        samples -= 128
    return samples / np.float32(_SCALES.get(array.dtype.name, 1))
