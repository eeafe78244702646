"""The program of a loader process: a chunk's clips in, windows in the worker's memory out."""

from __future__ import annotations

import json
import logging
import math
import os
import selectors
import signal
import sys
import time
from collections import deque
from contextlib import suppress
from functools import partial
from heapq import heappop, heappush
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from db.session import connect
from earmark.core import broker, errors
from earmark.core.clips import AudioFacts, Part
from earmark.core.processes import end_with_parent, isolate_imports
from workers import logs
from workers.decoding.decoder import BROKEN, Decoder
from workers.fetching.polite import PoliteFetcher
from workers.loading import arena, messages
from workers.loading.copies import Copies
from workers.loading.cutter import Cutter, Shape
from workers.loading.downloads import SERVICE_PAUSE_S, Bell, DealtClip, Downloads
from workers.loading.spans import Span

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sqlalchemy as sa

    from earmark.core.settings import Audio, Settings
    from workers.decoding.decoder import Piece
    from workers.loading.downloads import ClipFetcher

logger = logging.getLogger(__name__)

#: Clips at one decoder: the next one lies in its socket when it has done one.
DEPTH = 2
#: A clip waits here for its host if it waits for less than this, and is given back otherwise.
PARKED_S = 5.0
#: Deadlines are checked, and the worker hears of this loader, this often.
BEAT_S = 0.5
#: A loader that holds no window for so many beats gives its memory back.
IDLE_BEATS = 20
#: Rows wait for more of them up to this many: a message costs as much as ten of them.
ROWS = 16
#: A decoder that does not start is started again after this.
DECODER_PAUSE_S = 5.0
WINDOW_TOO_LONG = "a window must fit into a loader's part of EARMARK_WORKER__IN_FLIGHT_BYTES"


class _Decoding:
    """A decoder with the clips that it was given, the first of them at work."""

    def __init__(self, audio_settings: Audio) -> None:
        self._settings = audio_settings
        self.start()

    def start(self) -> None:
        """Start a decoder, which has no clips."""
        self.decoder = Decoder(self._settings)
        self.clips: deque[DealtClip] = deque()
        #: The extent into which the clip's only window is received.
        self.extent: int | None = None
        #: Windows that are cut, and the one that waits for room.
        self.windows: Iterator[tuple[int, np.ndarray]] | None = None
        self.window: tuple[int, np.ndarray] | None = None
        #: The end of the clip, which comes before its last windows have room.
        self.end: AudioFacts | errors.DecodeError | None = None
        #: Since when it waits for room.
        self.room_since: float | None = None
        #: When to start it again, if it did not start.
        self.rests_until = math.inf


class Loader:
    """Has the clips that the worker deals fetched and decoded, and tells it about their windows.

    One thread looks after all decoders: it hands them the files that `Downloads` has fetched, and
    receives their samples into the arena, which it shares with the worker. It never waits for
    anything but the next event. When the arena is full it takes no samples, so that decoders wait,
    then fetched files, then clips. It ends with the connection to its worker.
    """

    def __init__(
        self,
        settings: Settings,
        engine: sa.Engine,
        fetcher: ClipFetcher,
        connection: Connection,
        memory: int,
        copies: Copies,
        *,
        decoders: int,
        fetching: int,
    ) -> None:
        self._settings = settings
        self._connection = connection
        self._breaker = fetcher.breaker
        self._arena = arena.mapped(memory)
        self._extents = arena.Extents(len(self._arena))
        #: Extents that the worker has and will free.
        self._sent = 0
        self._freed = False
        #: Decoders that wait for room, and the one whose turn it is.
        self._waiting: deque[_Decoding] = deque()
        self._served: _Decoding | None = None
        #: By deal, the clips that are not at their end here.
        self._clips: dict[int, DealtClip] = {}
        self._backlog: deque[DealtClip] = deque()
        self._parked: list[tuple[float, int, DealtClip]] = []
        self._downloading = 0
        self._at_once = fetching + 2 * decoders
        self._fetched: deque[DealtClip] = deque()
        self._windows: list[tuple[int, ...]] = []
        self._decoded: list[tuple[Any, ...]] = []
        self._ended: list[list[Any]] = []
        self._draining = False
        self._beat_at = 0.0
        self._idle_beats = 0
        self._bell = Bell()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ, self._bell.quiet)
        self._selector.register(connection, selectors.EVENT_READ, self._hear)
        self._decodings = [_Decoding(settings.audio) for _ in range(decoders)]
        for decoding in self._decodings:
            decoding.decoder.wait_until_ready()
            self._watch(decoding)
        self._copies = copies
        self._downloads = Downloads(fetcher, engine, copies, fetching, self._bell)
        self._send(messages.READY)

    def run(self) -> NoReturn:
        while True:
            events = self._selector.select(self._idle_s())
            for key, _ in events:
                key.data()
            self._take_downloads()
            self._find_room()
            self._begin_downloads()
            self._hand_out()
            self._tell(at_once=not events)
            if time.monotonic() >= self._beat_at:
                self._beat()

    def _idle_s(self) -> float:
        if self._windows or self._decoded:
            return 0.0
        due_at = self._beat_at
        if self._parked:
            due_at = min(due_at, self._parked[0][0])
        return max(0.0, due_at - time.monotonic())

    # messages --------------------------------------------------------------------------------

    def _hear(self) -> None:
        try:
            message = self._connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(os.EX_OK)
        kind, content = message[:1], message[1:]
        match kind:
            case messages.FREE:
                self._free(np.frombuffer(content, messages.OFFSET).tolist())
            case messages.DEAL:
                self._deal(**json.loads(content))
            case messages.CANCEL:
                self._cancel(json.loads(content))
            case messages.DRAIN:
                self._drain()

    def _free(self, offsets: list[int]) -> None:
        for offset in offsets:
            self._extents.give_back(offset)
        self._sent -= len(offsets)
        self._freed = True

    def _deal(
        self,
        clips: list[tuple[int, int, str, list[Any] | None]],
        run_id: int,
        shape: list[int],
        *,
        by_url: bool,
        joins: bool,
    ) -> None:
        windows = Shape(*shape)
        for deal, clip_id, uri, values in clips:
            part = Part(*values) if values else None
            span = Span.of(part, windows.sample_rate)
            clip = DealtClip(deal, clip_id, uri, run_id, windows, by_url, joins, part, span)
            self._clips[deal] = clip
            self._backlog.append(clip)
        if self._draining:
            self._drain()

    def _cancel(self, deals: list[int]) -> None:
        for deal in deals:
            if clip := self._clips.pop(deal, None):
                clip.dropped = True
        for decoding in self._decodings:
            if decoding.clips and decoding.clips[0].dropped:
                self._replace(decoding)

    def _drain(self) -> None:
        """Give back the clips that are at no decoder."""
        self._draining = True
        at_decoders: set[int] = set()
        for decoding in self._decodings:
            at_decoders.update(clip.deal for clip in decoding.clips)
        for clip in list(self._clips.values()):
            if clip.deal not in at_decoders:
                clip.put_off(0.0)
                self._end(clip)
        self._fetched.clear()

    def _end(self, clip: DealtClip) -> None:
        """Tell the worker how a clip without a result of its own ended here."""
        clip.dropped = True
        clip.close()
        self._copies.forget(clip)
        if self._clips.pop(clip.deal, None):
            source = clip.source and [clip.source.sha256, clip.source.bytes]
            self._ended.append([clip.deal, clip.end, source, clip.fetch_ms, clip.decode_ms])

    def _tell(self, *, at_once: bool) -> None:
        if self._ended:
            self._send(messages.ENDED + json.dumps(self._ended).encode())
            self._ended = []
        waiting = len(self._windows) + len(self._decoded)
        if waiting and (at_once or waiting >= ROWS):
            self._send(messages.rows(self._decoded, self._windows))
            self._decoded, self._windows = [], []

    def _send(self, message: bytes) -> None:
        try:
            self._connection.send_bytes(message)
        except OSError:  # the worker is gone
            os._exit(os.EX_OK)

    def _beat(self) -> None:
        self._beat_at = time.monotonic() + BEAT_S
        self._send(messages.BEAT + bytes([self._breaker.open]))
        for decoding in self._decodings:
            if time.monotonic() > decoding.decoder.deadline:
                self._bury(decoding)
            elif time.monotonic() > decoding.rests_until:
                self._start(decoding)
        if self._extents:
            self._idle_beats = 0
        else:
            self._idle_beats += 1
        if self._idle_beats == IDLE_BEATS:
            arena.clear(self._arena)
        filling = sum(decoding.extent is not None for decoding in self._decodings)
        if len(self._extents) != self._sent + filling:
            raise AssertionError(f"{len(self._extents)} extents, {self._sent} sent, {filling} here")

    # clips, from their deal to a decoder -----------------------------------------------------

    def _begin_downloads(self) -> None:
        now = time.monotonic()
        while self._parked and self._parked[0][0] <= now:
            self._backlog.append(heappop(self._parked)[2])
        while self._backlog and self._downloading + len(self._fetched) < self._at_once:
            clip = self._backlog.popleft()
            if not clip.dropped:
                self._downloading += 1
                self._downloads.begin(clip)

    def _take_downloads(self) -> None:
        while clip := self._downloads.take():
            self._downloading -= 1
            if clip.dropped:
                clip.close()
            elif clip.end is None:
                clip.waits_since = time.perf_counter()
                self._fetched.append(clip)
            elif not self._draining and 0 < clip.end.get("postponed", math.inf) < PARKED_S:
                due_at = time.monotonic() + clip.end["postponed"]
                heappush(self._parked, (due_at, clip.deal, clip))
                clip.end = None
            else:
                self._end(clip)

    def _hand_out(self) -> None:
        for depth in range(DEPTH):
            for decoding in self._decodings:
                if not self._fetched:
                    return
                if len(decoding.clips) == depth and self._is_usable(decoding):
                    self._give(decoding, self._fetched.popleft())
        if all(decoding.rests_until < math.inf for decoding in self._decodings):
            self._put_off_fetched()

    def _is_usable(self, decoding: _Decoding) -> bool:
        if not decoding.decoder.ready:
            return False
        if not decoding.decoder.usable and not decoding.clips:
            self._replace(decoding)
            return False
        return decoding.decoder.usable

    def _give(self, decoding: _Decoding, clip: DealtClip) -> None:
        if clip.dropped:
            clip.close()
            return
        assert clip.file is not None
        decoding.clips.append(clip)
        if len(decoding.clips) == 1:
            clip.begun_at = time.perf_counter()
        with suppress(OSError):  # it is dead, which is heard next
            decoding.decoder.begin(clip.file.fileno(), clip.shape.sample_rate)

    def _put_off_fetched(self) -> None:
        for clip in self._fetched:
            clip.put_off(SERVICE_PAUSE_S)
            self._end(clip)
        self._fetched.clear()

    # decoders --------------------------------------------------------------------------------

    def _watch(self, decoding: _Decoding) -> None:
        receive = partial(self._receive, decoding)
        self._selector.register(decoding.decoder.socket, selectors.EVENT_READ, receive)

    def _receive(self, decoding: _Decoding) -> None:
        decoder = decoding.decoder
        try:
            if not decoder.ready:
                decoder.become_ready()
                return
            room = partial(self._room, decoding)
            while decoding.decoder is decoder and decoding.room_since is None:
                piece = decoder.receive(room)
                if piece is None:
                    return
                self._take_piece(decoding, piece)
        except errors.TooLong as error:
            self._replace(decoding, error)
        except BROKEN:
            self._bury(decoding)

    def _room(self, decoding: _Decoding, samples: int, last: bool) -> np.ndarray | None:
        """Return where a piece is received: the arena itself, if it is the clip's only window."""
        clip = decoding.clips[0]
        if clip.span or clip.cutter or not last or samples > clip.shape.size:
            return np.empty(samples, np.float32)
        decoding.extent = self._take_extent(decoding, samples)
        if decoding.extent is None:
            return None
        return self._arena[decoding.extent : decoding.extent + samples]

    def _take_piece(self, decoding: _Decoding, piece: Piece) -> None:
        clip = decoding.clips[0]
        decoding.end = piece.end
        if isinstance(piece.end, errors.DecodeError):
            self._free_extent(decoding)
        elif decoding.extent is not None:
            offset, decoding.extent = decoding.extent, None
            clip.windows = 1
            self._send_window(clip, offset, 0, len(piece.samples))
        else:
            self._cut(decoding, piece)
        self._place_windows(decoding)

    def _cut(self, decoding: _Decoding, piece: Piece) -> None:
        clip, samples = decoding.clips[0], piece.samples
        clip.cutter = clip.cutter or Cutter(clip.shape, self._settings.audio.max_windows)
        if clip.span:
            samples = clip.span.cut(samples)
        if clip.span and isinstance(piece.end, AudioFacts):
            try:
                decoding.end = clip.span.facts(piece.end)
            except errors.TooShort as error:
                decoding.end = error
                return
        decoding.windows = clip.cutter.cut(samples, last=piece.end is not None)

    def _place_windows(self, decoding: _Decoding) -> None:
        """Copy windows into the arena until it is full; end the clip if they were its last."""
        clip = decoding.clips[0]
        try:
            while window := self._next_window(decoding):
                start, samples = window
                offset = self._take_extent(decoding, len(samples))
                if offset is None:
                    return
                decoding.window = None
                self._arena[offset : offset + len(samples)] = samples
                clip.windows += 1
                self._send_window(clip, offset, start, len(samples))
        except errors.TooLong as error:
            self._replace(decoding, error)
            return
        if decoding.end is not None:
            self._end_decoding(decoding, decoding.end)

    def _next_window(self, decoding: _Decoding) -> tuple[int, np.ndarray] | None:
        if decoding.window is None and decoding.windows is not None:
            decoding.window = next(decoding.windows, None)
        return decoding.window

    def _send_window(self, clip: DealtClip, offset: int, start: int, heard: int) -> None:
        samples = max(heard, clip.shape.least)
        self._arena[offset + heard : offset + samples] = 0
        if clip.span:
            start += clip.span.start
        self._windows.append((clip.deal, offset, samples, start, heard))
        self._sent += 1

    def _end_decoding(self, decoding: _Decoding, end: AudioFacts | errors.DecodeError) -> None:
        clip = decoding.clips.popleft()
        now = time.perf_counter()
        clip.decode_ms = (now - clip.waits_since - clip.room_s) * 1000
        if isinstance(end, errors.DecodeError):
            clip.fail(end)
            self._end(clip)
        else:
            self._decoded.append(_row(clip, end))
            self._clips.pop(clip.deal, None)
            clip.close()
        decoding.end = decoding.windows = None
        if decoding.clips:
            decoding.clips[0].begun_at = now
        if isinstance(end, errors.DecoderMemory) or (decoding.clips and decoding.clips[0].dropped):
            self._replace(decoding)

    def _bury(self, decoding: _Decoding) -> None:
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

    def _replace(self, decoding: _Decoding, error: errors.DecodeError | None = None) -> None:
        """Start another decoder; the clips that this one was not at go to the next free one."""
        if decoding.room_since is None:
            self._selector.unregister(decoding.decoder.socket)
        else:
            self._waiting.remove(decoding)
        self._free_extent(decoding)
        decoding.decoder.stop()
        if error is not None and decoding.clips:
            clip = decoding.clips.popleft()
            clip.fail(error)
            self._end(clip)
        self._fetched.extendleft(reversed(decoding.clips))
        self._start(decoding)

    def _start(self, decoding: _Decoding) -> None:
        decoding.start()
        self._watch(decoding)

    # room in the arena -----------------------------------------------------------------------

    def _take_extent(self, decoding: _Decoding, samples: int) -> int | None:
        """Return where so many samples of its clip have room, or have it wait for some."""
        shape = decoding.clips[0].shape
        needed = max(samples, shape.least)
        if needed > len(self._arena):
            longest_s = len(self._arena) / shape.sample_rate
            raise errors.TooLong(max_duration_s=longest_s, setting=WINDOW_TOO_LONG)
        # Nobody takes the room that those who wait longer wait for.
        offset = None
        if not self._waiting or self._served is decoding:
            offset = self._extents.take(needed)
        if offset is None:
            decoding.room_since = time.perf_counter()
            decoding.decoder.hold()
            self._waiting.append(decoding)
            self._selector.unregister(decoding.decoder.socket)
        return offset

    def _find_room(self) -> None:
        """Go on with the decoders that wait for room, in the order in which they came."""
        while self._freed and self._waiting:
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
        self._freed, self._served = False, None

    def _free_extent(self, decoding: _Decoding) -> None:
        if decoding.extent is not None:
            self._extents.give_back(decoding.extent)
            decoding.extent = None


def _row(clip: DealtClip, facts: AudioFacts) -> tuple[Any, ...]:
    assert clip.source is not None
    return messages.clip_row(
        facts,
        clip.deal,
        clip.windows,
        clip.source.bytes,
        clip.source.sha256,
        clip.fetch_ms,
        (clip.begun_at - clip.waits_since) * 1000,
        clip.decode_ms,
        clip.room_s * 1000,
    )


def main() -> NoReturn:
    """Serve the worker whose process, connection and memory the arguments name."""
    isolate_imports()
    worker, descriptor, memory, copies = map(int, sys.argv[1:])
    end_with_parent(worker, signal.SIGKILL)
    # These signals are meant for the worker, which ends this process when it has drained.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection: Connection = Connection(descriptor)
    settings, decoders, fetching = connection.recv()
    logs.set_up(as_json=settings.worker.log_json)
    broker.configure(settings.broker)
    try:
        loader = Loader(
            settings,
            connect(settings.database_url, settings.database),
            PoliteFetcher(settings),
            connection,
            memory,
            Copies(copies),
            decoders=decoders,
            fetching=fetching,
        )
    except errors.ServiceError as error:
        connection.send_bytes(messages.REFUSED + str(error).encode())
        sys.exit(errors.SERVICE_EXIT)
    loader.run()


if __name__ == "__main__":
    main()
