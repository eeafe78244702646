"""An open clip in, its waveform out, decoded by a pool of disposable child processes."""

from __future__ import annotations

import os
import queue
import stat
import time
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from earmark.core import clips, errors
from earmark.core.sparse_file import SparseFile
from workers.decoding.decoder import BROKEN, Decoder, Piece
from workers.decoding.wire import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from earmark.core import settings


@dataclass(frozen=True, slots=True)
class Decoded:
    """A decoded clip: its waveform and the facts of its file."""

    waveform: clips.Waveform
    facts: clips.AudioFacts


class Decoders:
    """A pool of sandboxed decoder processes for callers that wait, a thread each.

    Use one per process, shared by its threads, and close it. Each decoder is at one clip at a time;
    further callers wait for a free one. A file that crashes, hangs or swells its decoder costs only
    itself, as the pool starts another.

    Raises ServiceError when created if the decoders cannot start.
    """

    def __init__(self, audio_settings: settings.Audio, processes: int) -> None:
        self._settings = audio_settings
        self._processes = processes
        # Last in, first out: the process used last has its data in the processor's cache still.
        self._idle: queue.LifoQueue[Decoder | None] = queue.LifoQueue()
        decoders = [Decoder(audio_settings) for _ in range(processes)]
        for decoder in decoders:
            self._idle.put(decoder)
        try:
            for decoder in decoders:
                decoder.wait_until_ready()
        except errors.ServiceError:
            self.close()
            raise

    def decode(self, file: BinaryIO, sample_rate: int) -> Decoded:
        """Return the mono waveform of a file at `sample_rate` Hz, and the file's facts.

        Raises:
            DecodeError: the file is no audio, is damaged or over a limit, or broke its decoder.
            ServiceError: no decoder can be started, or the pool is closed.
        """
        parts = []
        for piece in self.pieces(file, sample_rate):
            parts.append(piece.samples)
        assert isinstance(piece.end, clips.AudioFacts)
        waveform = clips.Waveform(np.concatenate(parts), sample_rate)
        return Decoded(waveform, piece.end)

    def stretch(self, file: BinaryIO, start_s: float, end_s: float) -> Iterator[Piece]:
        """Yield some seconds as the file has them: the samples of all channels, frame by frame.

        What lies before is passed over where the format allows. A piece may end within a frame.
        """
        bring = file.bring if isinstance(file, SparseFile) else None
        request = Request(
            is_stretch=True, start_s=start_s, end_s=end_s, is_sparse=bring is not None
        )
        return self._pieces(file, request, bring)

    def pieces(
        self, file: BinaryIO, sample_rate: int, channels: int = clips.MIX
    ) -> Iterator[Piece]:
        """Yield the waveform in pieces, as it is decoded; the last one has the file's facts.

        Raises the same errors as `decode`. The time that the caller takes is not the decoder's.
        """
        return self._pieces(file, Request(sample_rate, channels))

    def _pieces(
        self, file: BinaryIO, request: Request, bring: Callable[[int], None] | None = None
    ) -> Iterator[Piece]:
        check_regular(file)
        with self._decoder() as decoder:
            try:
                decoder.begin(file.fileno(), request, bring)
                while (piece := _next(decoder)).end is None:
                    yield piece
            except BROKEN as error:
                raise decoder.post_mortem() from error
            except (GeneratorExit, errors.DownloadError):
                decoder.stop()
                raise
            if isinstance(piece.end, errors.DecoderMemory):
                decoder.stop()
        if isinstance(piece.end, errors.DecodeError):
            raise piece.end
        yield piece

    @contextmanager
    def _decoder(self) -> Iterator[Decoder]:
        decoder = self._idle.get()
        try:
            if decoder is None:
                raise errors.ServiceError(reason="The decoders are closed.")
            if not decoder.usable:
                decoder.stop()
                decoder = Decoder(self._settings)
            decoder.wait_until_ready()
            yield decoder
        finally:
            self._idle.put(decoder)

    def close(self) -> None:
        """Stop the children, each as soon as it has finished its clip."""
        for _ in range(self._processes):
            if decoder := self._idle.get():
                decoder.stop()
        self._idle.put(None)


def check_regular(file: BinaryIO) -> None:
    """Raise NotAudio for an open file that may have no end."""
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise errors.NotAudio(kind="a device, a pipe or a folder")


def _next(decoder: Decoder) -> Piece:
    while True:
        piece = decoder.receive(_room)
        if piece is not None:
            return piece
        left_s = decoder.deadline - time.monotonic()
        if left_s < 0:
            raise TimeoutError
        wait([decoder.socket], left_s)


def _room(count: int, _last: bool) -> np.ndarray:
    return np.empty(count, np.float32)
