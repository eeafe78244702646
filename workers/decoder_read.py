"""An open clip in, its audio out in blocks: libsndfile first, FFmpeg for what it lacks; never a path or a name."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Protocol

import av
import numpy as np
import soundfile

from earmark import errors
from workers import decoder_formats

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workers.decoder_formats import Format

#: Small, because libsndfile gives nothing of a block in which it meets damage.
READ_FRAMES = 8192
UNKNOWN_FRAMES = 2**62
OUT_OF_MEMORY = 17
LOST_TAIL_S = 0.1
#: Formats whose header says how long they are; the length of others is FFmpeg's guess.
TIMED = ("mp4", "matroska", "asf", "ogg", "wav", "flac")


class Audio(Protocol):
    """An opened clip, to be read once from front to back."""

    codec: str
    sample_rate: int
    channels: int
    #: What the header says; 0: nothing.
    declared_frames: int

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield float32 samples, shape (frames, channels)."""

    def is_cut_short(self, frames: int) -> bool:
        """Say, after reading so many frames, whether the file declares more than it holds."""


def open_audio(clip: int) -> Audio:
    """Open a file by the reader that is best at its format, or by the other one."""
    found = decoder_formats.recognise(clip)
    if found.ffmpeg_first:
        return Ffmpeg(clip, found)
    try:
        return Sndfile(clip, found)
    except soundfile.LibsndfileError as error:
        if error.code == OUT_OF_MEMORY:
            raise MemoryError from error
        return _second_try(clip, found, error)


def _second_try(clip: int, found: Format, error: soundfile.LibsndfileError) -> Audio:
    try:
        return Ffmpeg(clip, found)
    except errors.DecodeError:
        if found is decoder_formats.UNKNOWN:
            raise errors.NotAudio(kind=decoder_formats.describe(clip)) from None
        raise errors.Corrupt(reason=error.error_string.rstrip(".")) from error


class _Sequential(soundfile.SoundFile):  # type: ignore[misc]  # it comes without types
    """Reads without a seek after each block, which changes the samples of an MP3 and which some formats cannot do."""

    def seekable(self) -> bool:
        return False


class Sndfile:
    """Audio read by libsndfile."""

    def __init__(self, clip: int, found: Format) -> None:
        os.lseek(clip, 0, os.SEEK_SET)
        self._clip, self._format = clip, found
        self._file = _Sequential(clip, closefd=False)
        self._damaged = False
        self.codec = f"{self._file.format}/{self._file.subtype}".lower()
        self.sample_rate = self._file.samplerate
        self.channels = self._file.channels
        self.declared_frames = self._file.frames if self._file.frames < UNKNOWN_FRAMES else 0

    def blocks(self) -> Iterator[np.ndarray]:
        try:
            while len(block := self._file.read(out=np.empty((READ_FRAMES, self.channels), np.float32))):
                yield block
        except soundfile.LibsndfileError:
            self._damaged = True

    def is_cut_short(self, frames: int) -> bool:
        # The others compute the number of frames from the size of the file, or guess it.
        counted = self._format.name == "flac" or decoder_formats.counts_mp3_frames(self._clip)
        return (
            self._damaged
            or (counted and frames < self.declared_frames)
            or decoder_formats.is_cut_short(self._clip, self._format.name)
        )


class Ffmpeg:
    """Audio read by FFmpeg, with the one demuxer that the file's first bytes ask for."""

    def __init__(self, clip: int, found: Format) -> None:
        os.lseek(clip, 0, os.SEEK_SET)
        self._clip, self._format = clip, found
        self._damaged = False
        self._container = _open_container(clip, found)
        if not self._container.streams.audio:
            raise errors.Unsupported(reason="it holds no audio track")
        self._stream = self._container.streams.audio[0]
        codec = self._stream.codec_context
        if codec is None:
            raise errors.Unsupported(reason="its codec is unknown")
        self.codec = f"{self._container.format.name.split(',')[0]}/{codec.name}"
        self.sample_rate = codec.sample_rate
        self.channels = codec.channels
        self.declared_frames = int(self._declared_s() * self.sample_rate)

    def _declared_s(self) -> float:
        if self._format.name not in TIMED:
            return 0.0
        if self._stream.duration and self._stream.time_base:
            return max(0.0, float(self._stream.duration * self._stream.time_base))
        alone = len(self._container.streams) == 1
        return max(0, self._container.duration or 0) / av.time_base if alone else 0.0

    def blocks(self) -> Iterator[np.ndarray]:
        for packet in self._packets():
            try:
                for frame in packet.decode():
                    if frame.sample_rate != self.sample_rate:
                        raise errors.Unsupported(reason="its sample rate changes on the way")
                    yield _samples(frame)
            except av.error.FFmpegError as error:
                self._note(error)

    def _packets(self) -> Iterator[av.Packet[av.AudioStream]]:
        try:
            for packet in self._container.demux(self._stream):
                self._damaged |= packet.is_corrupt
                yield packet
        except av.error.FFmpegError as error:
            self._note(error)

    def _note(self, error: av.error.FFmpegError) -> None:
        if isinstance(error, MemoryError):
            raise error
        self._damaged = True

    def is_cut_short(self, frames: int) -> bool:
        lost = self.declared_frames - frames > LOST_TAIL_S * self.sample_rate
        return self._damaged or lost or decoder_formats.is_cut_short(self._clip, self._format.name)


def _open_container(clip: int, found: Format) -> av.container.InputContainer:
    file = io.FileIO(clip, closefd=False)
    file.name = "clip"  # FFmpeg guesses from names, and reads playlists by them
    options = {"format_whitelist": found.demuxer or decoder_formats.UNKNOWN_DEMUXERS, "protocol_whitelist": ""}
    try:
        return av.open(file, "r", format=found.demuxer or None, options=options, metadata_errors="ignore")
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        raise errors.Corrupt(reason=error.strerror) from error


#: What integers are divided by, as libsndfile does; unsigned bytes are centred first.
_SCALES = {"uint8": 2**7, "int16": 2**15, "int32": 2**31, "int64": 2**63}


def _samples(frame: av.AudioFrame) -> np.ndarray:
    array = frame.to_ndarray()
    array = array.T if frame.format.is_planar else array.reshape(-1, frame.layout.nb_channels)
    scale = np.float32(_SCALES.get(array.dtype.name, 1))
    samples = array.astype(np.float32)
    if array.dtype == np.uint8:
        samples -= scale
    return samples / scale if scale != 1 else samples
