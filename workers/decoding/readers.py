"""An open clip in, its audio out in blocks: by libsndfile, or by FFmpeg for what that lacks; never by path or name."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING

import av
import numpy as np
import soundfile

from earmark.core import errors
from workers.decoding import formats

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workers.decoding.formats import Format

#: The resampler is quickest with blocks that stay in the processor's cache.
BLOCK_FRAMES = 65536
#: libsndfile gives nothing of a FLAC block in which it meets damage.
FLAC_FRAMES = 8192
UNKNOWN_FRAMES = 2**62
OUT_OF_MEMORY = 17
#: Formats whose header says how long they are; the length of others is FFmpeg's guess.
TIMED = ("mp4", "matroska", "asf", "ogg", "wav", "flac")
#: A container's clock and its codec's frames may differ by this much.
CLOCK_S = 0.1
#: What PyAV raises for damage, and for lack of memory too.
DAMAGE = (av.error.FFmpegError, OSError, ValueError)


def open_audio(clip: int) -> Audio:
    """Open a file by the reader that is best at its format, or else by the other one."""
    found = formats.recognise(clip)
    # libsndfile guesses how long other MP3s are by their first frame, and reads no further.
    if found.ffmpeg_first or (found.name == "mp3" and not formats.counts_mp3_frames(clip)):
        return Ffmpeg(clip, found)
    try:
        return Sndfile(clip, found)
    except soundfile.LibsndfileError as error:
        if error.code == OUT_OF_MEMORY:
            raise MemoryError from error
        refusal = error.error_string.rstrip(".")
    try:
        return Ffmpeg(clip, found)
    except errors.DecodeError:
        if found is formats.UNKNOWN:
            raise errors.NotAudio(kind=formats.describe(clip)) from None
        raise errors.Corrupt(reason=refusal) from None


class Audio(ABC):
    """An opened clip, to be read once from front to back."""

    def __init__(self, clip: int, found: Format) -> None:
        os.lseek(clip, 0, os.SEEK_SET)
        self.clip, self.format = clip, found
        self.codec = ""
        self.sample_rate = self.channels = 0
        #: What the header says; 0: nothing.
        self.declared_frames = 0
        #: A file that gives fewer has lost its end.
        self.least_frames = 0
        self.damaged = False

    @abstractmethod
    def blocks(self) -> Iterator[np.ndarray]:
        """Yield float32 samples, shape (frames, channels)."""

    def count(self) -> Iterator[int]:
        """Yield, packet by packet, how many frames the clip has up to there; nothing is decoded for it."""
        place = os.lseek(self.clip, 0, os.SEEK_CUR)
        try:
            yield from Ffmpeg(self.clip, self.format).packet_ends()
        except errors.DecodeError:  # then what is decoded has to tell
            return
        finally:
            os.lseek(self.clip, place, os.SEEK_SET)


class _Sequential(soundfile.SoundFile):  # type: ignore[misc]  # it comes without types
    """Reads without a seek after each block, which changes the samples of an MP3 and which some formats cannot do."""

    def seekable(self) -> bool:
        return False


class Sndfile(Audio):
    """Audio read by libsndfile."""

    def __init__(self, clip: int, found: Format) -> None:
        super().__init__(clip, found)
        self._file = _Sequential(clip, closefd=False)
        self.codec = f"{self._file.format}/{self._file.subtype}".lower()
        self.sample_rate, self.channels = self._file.samplerate, self._file.channels
        self.declared_frames = self._file.frames if self._file.frames < UNKNOWN_FRAMES else 0
        if found.name == "flac" or formats.counts_mp3_frames(
            clip
        ):  # in others it is no more than a guess
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
    """Audio read by FFmpeg, with the one demuxer that the file's first bytes ask for."""

    def __init__(self, clip: int, found: Format) -> None:
        super().__init__(clip, found)
        file = io.FileIO(clip, closefd=False)
        file.name = "clip"  # else PyAV passes on the number; FFmpeg takes hints from names
        try:
            self._container = av.open(
                file,
                "r",
                format=found.demuxer,
                options={"protocol_whitelist": ""},
                metadata_errors="ignore",
            )
        except (
            av.error.MemoryError
        ) as error:  # nothing is decoded yet: it is the header that asks for so much
            raise errors.Corrupt(
                reason="its header asks for more memory than a clip may have"
            ) from error
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
        alone = len(self._container.streams) == 1  # a picture may go on for longer
        return (self._container.duration or 0) / av.time_base if alone else 0.0

    def blocks(self) -> Iterator[np.ndarray]:
        queue = (
            av.AudioFifo()
        )  # a codec's frames are so short that handling each would cost more than decoding it
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
        except DAMAGE:  # even where it is memory that lacks: a packet is as large as the file says
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


#: What integers are divided by, as in libsndfile.
_SCALES = {"uint8": 2**7, "int16": 2**15, "int32": 2**31}


def _samples(frame: av.AudioFrame) -> np.ndarray:
    array = frame.to_ndarray()
    array = array.T if frame.format.is_planar else array.reshape(-1, frame.layout.nb_channels)
    samples = array.astype(np.float32)
    if array.dtype == np.uint8:
        samples -= 128
    return samples / np.float32(_SCALES.get(array.dtype.name, 1))
