"""An open clip in, its audio out in blocks, read by libsndfile or FFmpeg; never by path or name."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import av
import numpy as np
import soundfile

from earmark.core import errors, formats
from workers.decoding import lengths
from workers.decoding.file_views import Blocks, View

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
TIMED = ("mp4", "matroska", "ogg", "wav", "flac")
#: Formats in which libsndfile finds a frame without decoding those before it.
SEEKABLE = ("flac", "mp3", "ogg", "wav")
#: An MP3's frame needs bytes of some frames before it.
EARLIER_S = 1
#: libvorbis counts wrongly from its file's last page on, so that a seek ends before it.
BEFORE_END_S = 30
#: A container's duration and its codec's frames may differ by this much.
CLOCK_S = 0.1
#: libsndfile has read at most this much more of a FLAC or Ogg file than it gives samples of.
READ_AHEAD = 16_384
#: Where two MP3s are joined, a frame needs bytes of one before it that is not there.
LOSABLE_S = {"mp3": CLOCK_S}
#: PyAV raises these for damage, and for lack of memory too.
DAMAGE = (av.error.FFmpegError, OSError, ValueError)


def open_audio(clip: int) -> Audio:
    """Open a file, given by its descriptor, with the reader that suits its format.

    Raises:
        DecodeError: neither reader can open it.
        MemoryError: its header asks for too much memory.
    """
    known = formats.recognise(clip)
    if known.name == "ogg" and len(starts := lengths.ogg_streams(clip)) > 1:
        return Chain(clip, known, starts)
    # Without a count, libsndfile guesses an MP3's length by its first frame and reads no further.
    if known.ffmpeg_first or (known.name == "mp3" and not lengths.mp3_frames(clip)):
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


def open_sparse(clip: int, want: Callable[[int], None]) -> Audio:
    """Open a sparse file to read a stretch of it.

    Raises:
        Unsupported: it has to be read as a whole.
    """
    file = Blocks(clip, want)
    file.bring_end()
    try:
        return Sndfile(clip, formats.recognise(clip), file)
    except soundfile.LibsndfileError as error:
        raise errors.Unsupported(reason=error.error_string) from error


class Audio(ABC):
    """An opened clip, to be read once from front to back.

    Its sample rate and channels are those of the block that was read last.
    """

    def __init__(self, clip: int, known: Format) -> None:
        os.lseek(clip, 0, os.SEEK_SET)
        self.clip, self.format = clip, known
        self.chunks = lengths.chunks(clip, known.name)
        self.length = lengths.declared_length(clip, known.name, self.chunks)
        self.codec = ""
        self.sample_rate = self.channels = 0
        #: Frames by the header; 0: unknown.
        self.declared_frames = 0
        #: A file that gives fewer frames was cut short.
        self.least_frames = 0
        self.damaged = False

    @property
    def holds_floats(self) -> bool:
        """Whether the file itself holds floats, which may be beyond full scale."""
        return self.codec.endswith(("/float", "/double")) or "/pcm_f" in self.codec

    def tags(self) -> dict[str, str]:
        """Return the texts of the file's header that the reader knows."""
        return {}

    def seek(self, frame: int) -> int:  # noqa: ARG002 - of those that can
        """Pass over frames, but not this one, before the first block; return how many."""
        return 0

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

    def __init__(self, clip: int, known: Format, sparse: Blocks | None = None) -> None:
        super().__init__(clip, known)
        self._file = _Sequential(sparse or clip, closefd=False)
        self._is_sparse = sparse is not None
        self._first = 0
        self.codec = f"{self._file.format}/{self._file.subtype}".lower()
        self.sample_rate, self.channels = self._file.samplerate, self._file.channels
        self.declared_frames = self._file.frames if self._file.frames < UNKNOWN_FRAMES else 0
        # The length of other formats is a guess.
        if known.name in ("flac", "mp3"):
            self.least_frames = self.declared_frames

    def seek(self, frame: int) -> int:
        frame -= EARLIER_S * self.sample_rate
        if self.format.name == "ogg":
            frame = min(frame, self.declared_frames - BEFORE_END_S * self.sample_rate)
        if self.format.name in SEEKABLE and 0 < frame < self.declared_frames:
            self._first = self._file.seek(frame)
        return self._first

    def tags(self) -> dict[str, str]:
        # Those of the others are read with more of their names.
        if self.format.name in ("wav", "flac"):
            return {}
        return dict(self._file.copy_metadata())

    def blocks(self) -> Iterator[np.ndarray]:
        frames = self._first
        while not self.damaged and len(block := self._block()):
            frames += len(block)
            yield block
        if self._is_sparse:
            return
        name, end = self.format.name, os.lseek(self.clip, 0, os.SEEK_CUR)
        if self.length and not self.length.is_from_pipe:
            end = self.length.end
        joined = name == "flac" and _begins_again(self.clip, end)
        if joined or self.damaged or lengths.sound_behind(self.clip, name, end):
            yield from self._rest(frames, joined=joined)

    def _rest(self, frames: int, *, joined: bool) -> Iterator[np.ndarray]:
        """Go on with FFmpeg behind the frames that libsndfile gave."""
        try:
            other = Ffmpeg(self.clip, self.format)
        except errors.DecodeError:
            self.damaged = True
            return
        for block in other.blocks():
            self.sample_rate, self.channels = other.sample_rate, other.channels
            if len(block) > frames:
                yield block[frames:]
            frames = max(0, frames - len(block))
        # libsndfile stumbles over what lies between and behind streams.
        stumbled = joined or lengths.ends_in_padding(self.clip)
        self.damaged = other.damaged or (self.damaged and not stumbled)

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


def _begins_again(clip: int, end: int) -> bool:
    return lengths.find(clip, lengths.FLAC, max(4, end - READ_AHEAD)) is not None


class Ffmpeg(Audio):
    """Audio read by FFmpeg, with the one demuxer for the file's first bytes."""

    def __init__(self, clip: int, known: Format, start: int = 0, stop: int = 0) -> None:
        super().__init__(clip, known)
        #: Where the last packet ends of which sound came.
        self._end = 0
        file = self._open(start, stop or os.fstat(clip).st_size)
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

    def _open(self, start: int, stop: int) -> View:
        """Return the file, as it would be if its writer had come to write down its length."""
        length, corrected = self.length, (0, b"")
        self._is_endless = length is not None and length.is_from_pipe
        unfinished = lengths.is_unfinished(self.clip, self.format.name, length)
        if length and (self._is_endless or unfinished):
            corrected = length.corrected(stop)
        file = View(self.clip, start, stop, *corrected)
        file.seek(0)
        return file

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
        queue, kind = av.AudioFifo(), None
        for frame in self._frames():
            if kind != (kind := (frame.sample_rate, frame.layout.nb_channels, frame.format.name)):
                if rest := queue.read():
                    yield _samples(rest)
                queue = av.AudioFifo()
                self.sample_rate, self.channels = kind[:2]
            frame.pts = None
            queue.write(frame)
            if queue.samples >= BLOCK_FRAMES and (whole := queue.read()):
                yield _samples(whole)
        if rest := queue.read():
            yield _samples(rest)

    def _frames(self) -> Iterator[av.AudioFrame]:
        lost_s = 0.0
        for packet in self._packets():
            # The last packet of a file that declares no end is half of one.
            self.damaged |= packet.is_corrupt and not self._is_endless
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except DAMAGE:  # the next packet may be whole
                lost_s += self._seconds(packet)
                continue
            if frames and packet.size:
                self.damaged |= lost_s > LOSABLE_S.get(self.format.name, 0.0)
                self._end = max(self._end, (packet.pos or 0) + packet.size)
            yield from frames
        self.damaged |= self._leaves_sound(lost_s)

    def tags(self) -> dict[str, str]:
        return {**self._stream.metadata, **self._container.metadata}

    def _seconds(self, packet: av.Packet[av.AudioStream]) -> float:
        return float((packet.duration or 0) * (packet.time_base or 0)) or CLOCK_S

    def _leaves_sound(self, lost_s: float) -> bool:
        """Return whether something was lost at the end, or lies behind it."""
        if lengths.sound_behind(self.clip, self.format.name, self._end):
            return True
        return lost_s > 0 and not lengths.is_padding(self.clip, self._end)

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
            self.damaged |= not lengths.is_padding(self.clip, self._end)


class Chain(Audio):
    """Ogg streams that follow each other in a file, each with its own sample rate and channels."""

    def __init__(self, clip: int, known: Format, starts: list[int]) -> None:
        self._spans = list(zip(starts, [*starts[1:], os.fstat(clip).st_size], strict=True))
        first = Ffmpeg(clip, known, *self._spans[0])
        super().__init__(clip, known)
        self.codec = first.codec
        self.sample_rate, self.channels = first.sample_rate, first.channels

    def blocks(self) -> Iterator[np.ndarray]:
        for start, stop in self._spans:
            try:
                part = Ffmpeg(self.clip, self.format, start, stop)
            except errors.DecodeError:
                self.damaged = True
                continue
            for block in part.blocks():
                self.sample_rate, self.channels = part.sample_rate, part.channels
                yield block
            self.damaged |= part.damaged


#: Divisors of integer samples, as in libsndfile.
_SCALES = {"uint8": 2**7, "int16": 2**15, "int32": 2**31}


def _samples(frame: av.AudioFrame) -> np.ndarray:
    try:
        array = frame.to_ndarray()
    except ValueError:
        reason = f"its samples are of the kind {frame.format.name}"
        raise errors.Unsupported(reason=reason) from None
    array = array.T if frame.format.is_planar else array.reshape(-1, frame.layout.nb_channels)
    samples = array.astype(np.float32)
    if array.dtype == np.uint8:
        samples -= 128
    return samples / np.float32(_SCALES.get(array.dtype.name, 1))
