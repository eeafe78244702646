"""A loader's decoders: fetched files in, windows in the worker's memory out."""

from __future__ import annotations

import logging
import math
import selectors
import time
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from earmark.core import errors
from earmark.core.clips import AudioFacts
from workers.decoding.decoder import BROKEN
from workers.decoding.wire import Request
from workers.loading.clip import SERVICE_PAUSE_S
from workers.loading.cutter import Cut
from workers.loading.decoding import Decoding

if TYPE_CHECKING:
    from earmark.core.settings import Audio
    from workers.decoding.decoder import Piece
    from workers.loading.arena import Room
    from workers.loading.clip import DealtClip
    from workers.loading.cutter import Shape
    from workers.loading.report import Report

logger = logging.getLogger(__name__)

#: Clips at one decoder: the next one lies in its socket when it has done one.
DEPTH = 2
#: A decoder that does not start is started again after this.
DECODER_PAUSE_S = 5.0
#: Of each decoder: samples of long recordings that wait, 32 MB. They come faster than a model on a
#: CPU scores them, and would fill all memory.
LONG_AHEAD = 2**23
WINDOW_TOO_LONG = "a window must fit into a loader's part of EARMARK_WORKER__IN_FLIGHT_BYTES"


class Decodings:
    """Hands fetched files to decoders, and receives their samples into the arena.

    It waits for nothing but the next event. When the arena is full it takes no samples, so that
    decoders wait, then fetched files, then clips.
    """

    def __init__(
        self,
        audio_settings: Audio,
        decoders: int,
        room: Room,
        report: Report,
        selector: selectors.BaseSelector,
    ) -> None:
        self._max_windows = audio_settings.max_windows
        self._long_ahead = LONG_AHEAD * decoders
        self._report = report
        self._selector = selector
        self._fetched: deque[DealtClip] = deque()
        #: Those that are kept for clips that may be wanted.
        self._held: list[DealtClip] = []
        self._room = room
        #: Decoders that wait for room, and the one whose turn it is.
        self._waiting: deque[Decoding] = deque()
        self._served: Decoding | None = None
        self._decodings = [Decoding(audio_settings) for _ in range(decoders)]
        for decoding in self._decodings:
            decoding.decoder.wait_until_ready()
            self._watch(decoding)

    @property
    def waiting_clips(self) -> int:
        """Fetched clips that wait for a decoder."""
        return len(self._fetched)

    @property
    def are_fed(self) -> bool:
        """Whether each decoder has a clip to go on with."""
        return len(self._fetched) >= len(self._decodings)

    def put(self, clip: DealtClip) -> None:
        """Have the file of a fetched clip decoded, once for each rate of its clips, or kept."""
        clip.waits_since = time.perf_counter()
        if clip.is_held:
            self._held.append(clip)
        else:
            self._fetched.append(clip)

    def begun(self) -> set[int]:
        """Return the deals that are at a decoder."""
        deals: set[int] = set()
        for decoding in self._decodings:
            for clip in decoding.clips:
                for each in clip.heard:
                    deals.add(each.deal)
        return deals

    def drop(self) -> None:
        """Stop the work on clips that are dropped."""
        for decoding in self._decodings:
            if decoding.clips and decoding.clips[0].is_moot:
                self._replace(decoding)

    def released(self) -> list[DealtClip]:
        """Return the kept files that are wanted now; close those that nobody may want any more."""
        kept, self._held = self._held, []
        wanted: list[DealtClip] = []
        for clip in kept:
            if first := clip.left(clip.going):
                (self._held if first.is_held else wanted).append(first)
        return wanted

    def beat(self) -> None:
        """Replace late decoders."""
        for decoding in self._decodings:
            if time.monotonic() > decoding.decoder.deadline:
                self._bury(decoding)
            elif time.monotonic() > decoding.rests_until:
                self._start(decoding)
        self._room.beat(sum(decoding.extent is not None for decoding in self._decodings))

    # files to decoders -----------------------------------------------------------------------

    def hand_out(self) -> None:
        for depth in range(DEPTH):
            for decoding in self._decodings:
                if not self._fetched:
                    return
                if len(decoding.clips) == depth and self._is_usable(decoding):
                    self._give(decoding, self._fetched.popleft())
        if all(decoding.rests_until < math.inf for decoding in self._decodings):
            self._put_off_fetched()

    def _is_usable(self, decoding: Decoding) -> bool:
        if not decoding.decoder.ready:
            return False
        if not decoding.decoder.usable and not decoding.clips:
            self._replace(decoding)
            return False
        return decoding.decoder.usable

    def _give(self, decoding: Decoding, fetched: DealtClip) -> None:
        clip = fetched.left(fetched.going)
        if clip is None:
            return
        if clip.is_held:
            self._held.append(clip)
            return
        assert clip.file is not None
        clip.begin()
        clip.waits_since = fetched.waits_since
        decoding.clips.append(clip)
        if len(decoding.clips) == 1:
            clip.begun_at = time.perf_counter()
        with suppress(OSError):  # it is dead, which is heard next
            request = Request(clip.shape.sample_rate, clip.job.channels)
            decoding.decoder.begin(clip.file.fileno(), request)

    def _put_off_fetched(self) -> None:
        for fetched in self._fetched:
            for clip in fetched.together:
                clip.put_off(SERVICE_PAUSE_S)
                self._report.end(clip)
        self._fetched.clear()

    # samples from decoders -------------------------------------------------------------------

    def _watch(self, decoding: Decoding) -> None:
        receive = partial(self._receive, decoding)
        self._selector.register(decoding.decoder.socket, selectors.EVENT_READ, receive)

    def _receive(self, decoding: Decoding) -> None:
        decoder = decoding.decoder
        try:
            if not decoder.ready:
                decoder.become_ready()
                return
            room = partial(self._array, decoding)
            while decoding.decoder is decoder and decoding.room_since is None:
                piece = decoder.receive(room)
                if piece is None:
                    return
                self._take_piece(decoding, piece)
        except errors.TooLong as error:
            self._replace(decoding, error)
        except BROKEN:
            self._bury(decoding)

    def _array(self, decoding: Decoding, samples: int, last: bool) -> np.ndarray | None:
        """Return where a piece is received: the arena itself, if it is the clip's only window."""
        clip = decoding.clips[0]
        if clip.others or clip.span or clip.cutter or not last or samples > clip.shape.size:
            return np.empty(samples, np.float32)
        decoding.extent = self._take_extent(decoding, clip.shape, samples)
        if decoding.extent is None:
            return None
        return self._room.samples[decoding.extent : decoding.extent + samples]

    def _take_piece(self, decoding: Decoding, piece: Piece) -> None:
        clip = decoding.clips[0]
        decoding.end = piece.end
        if isinstance(piece.end, errors.DecodeError):
            self._free_extent(decoding)
        elif decoding.extent is not None:
            offset, decoding.extent = decoding.extent, None
            clip.windows = 1
            self._send_window(clip, offset, Cut(piece.channel, 0, piece.samples))
        else:
            decoding.windows = clip.cut(piece, self._max_windows)
        self._place_windows(decoding)

    def _place_windows(self, decoding: Decoding) -> None:
        """Copy windows into the arena until it is full; end the clip if they were its last."""
        while found := self._next_window(decoding):
            clip, window = found
            samples = window.samples
            try:
                offset = self._take_extent(decoding, clip.shape, len(samples))
            except errors.TooLong as error:
                clip.fail(error)
                decoding.window = None
                continue
            if offset is None:
                return
            decoding.window = None
            self._room.samples[offset : offset + len(samples)] = samples
            clip.windows += 1
            self._send_window(clip, offset, window)
        if decoding.end is not None:
            self._end_decoding(decoding, decoding.end)
        elif decoding.clips[0].is_moot:
            self._end_clip(decoding)
            self._replace(decoding)

    def _next_window(self, decoding: Decoding) -> tuple[DealtClip, Cut] | None:
        if decoding.window is None and decoding.windows is not None:
            decoding.window = next(decoding.windows, None)
        return decoding.window

    def _send_window(self, clip: DealtClip, offset: int, window: Cut) -> None:
        heard = len(window.samples)
        samples = max(heard, clip.shape.least)
        self._room.send(offset, heard, samples)
        start = window.start
        if clip.span:
            start += clip.span.start
        self._report.window(clip.deal, offset, samples, start, heard, window.channel)

    def _end_decoding(self, decoding: Decoding, end: AudioFacts | errors.DecodeError) -> None:
        self._end_clip(decoding, end)
        if decoding.clips:
            decoding.clips[0].begun_at = time.perf_counter()
        if isinstance(end, errors.DecoderMemory) or (decoding.clips and decoding.clips[0].is_moot):
            self._replace(decoding)

    def _end_clip(
        self, decoding: Decoding, end: AudioFacts | errors.DecodeError | None = None
    ) -> None:
        """Tell the end of the clips that were heard; the file goes on to those of other rates."""
        first = decoding.clips.popleft()
        decoding.end = decoding.windows = decoding.window = None
        heard = first.heard
        decode_ms = (time.perf_counter() - first.waits_since - first.room_s) * 1000
        if left := first.left([clip for clip in first.others if clip not in heard]):
            left.waits_since = time.perf_counter()
            self._fetched.appendleft(left)
        for clip in heard:
            clip.waits_since, clip.begun_at = first.waits_since, first.begun_at
            clip.decode_ms, clip.room_s = decode_ms, first.room_s
            if isinstance(end, errors.DecodeError) and clip.end is None:
                clip.fail(end)
            if clip.end is not None:
                self._report.end(clip)
            elif isinstance(end, AudioFacts) and not clip.dropped:
                self._report.decoded(clip, clip.facts or end)

    def _bury(self, decoding: Decoding) -> None:
        """Replace a decoder that is dead, or late: that costs the clip it was at."""
        if decoding.decoder.ready:
            self._replace(decoding, decoding.decoder.post_mortem())
            return
        self._selector.unregister(decoding.decoder.socket)
        logger.warning(
            "a decoder does not start: %s", decoding.decoder.last_words(),
            extra={"action": "decoder_not_started"},
        )  # fmt: skip
        decoding.decoder.deadline = math.inf
        decoding.rests_until = time.monotonic() + DECODER_PAUSE_S

    def _replace(self, decoding: Decoding, error: errors.DecodeError | None = None) -> None:
        """Start another decoder; the clips that this one was not at go to the next free one."""
        if decoding.room_since is None:
            self._selector.unregister(decoding.decoder.socket)
        else:
            self._waiting.remove(decoding)
        self._free_extent(decoding)
        decoding.decoder.stop()
        if error is not None and decoding.clips:
            self._end_clip(decoding, error)
        self._fetched.extendleft(reversed(decoding.clips))
        self._start(decoding)

    def _start(self, decoding: Decoding) -> None:
        decoding.start()
        self._watch(decoding)

    # room in the arena -----------------------------------------------------------------------

    def _take_extent(self, decoding: Decoding, shape: Shape, samples: int) -> int | None:
        """Return where a window of so many samples has room, or have it wait for some."""
        needed = max(samples, shape.least)
        if needed > len(self._room.samples):
            longest_s = len(self._room.samples) / shape.sample_rate
            raise errors.TooLong(max_duration_s=longest_s, setting=WINDOW_TOO_LONG)
        # Nobody takes the room that those who wait longer wait for.
        offset = None
        if not self._waiting or self._served is decoding:
            most = len(self._room.samples)
            if decoding.clips[0].cutter:
                most = self._long_ahead
            offset = self._room.take(needed, most)
        if offset is None:
            decoding.room_since = time.perf_counter()
            decoding.decoder.hold()
            self._waiting.append(decoding)
            self._selector.unregister(decoding.decoder.socket)
        return offset

    def find_room(self) -> None:
        """Go on with the decoders that wait for room, in the order in which they came."""
        while self._room.freed and self._waiting:
            decoding = self._served = self._waiting.popleft()
            assert decoding.room_since is not None
            decoding.clips[0].room_s += time.perf_counter() - decoding.room_since
            decoding.room_since = None
            decoding.decoder.resume()
            self._watch(decoding)
            decoder = decoding.decoder
            if decoding.window is not None:
                self._place_windows(decoding)
            if decoding.decoder is decoder and decoding.room_since is None:
                self._receive(decoding)
            if decoding.room_since is not None:
                self._waiting.remove(decoding)
                self._waiting.appendleft(decoding)
                break
        self._room.freed, self._served = False, None

    def _free_extent(self, decoding: Decoding) -> None:
        if decoding.extent is not None:
            self._room.give_back(decoding.extent)
            decoding.extent = None
