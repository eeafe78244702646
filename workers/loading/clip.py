"""A clip in a loader, and what an exception means for it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, BinaryIO

from earmark.core.clips import AudioFacts
from earmark.core.errors import ClipError, ModelError, ServiceError, TooLong, TooShort
from workers.fetching.polite import HostBusyError
from workers.loading.cutter import Cutter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from earmark.core.clips import Part, Source
    from workers.decoding.decoder import Piece
    from workers.loading.cutter import Cut, Shape
    from workers.loading.process import Job
    from workers.loading.spans import Span

logger = logging.getLogger(__name__)

#: A clip is put off by this while the database or the decoders are out of reach.
SERVICE_PAUSE_S = 10.0


@dataclass(slots=True, eq=False)
class DealtClip:
    """A clip in a loader, from its deal to its last window."""

    deal: int
    id: int
    uri: str
    job: Job
    #: The part of the file that is the clip, and its span; None for all of it.
    part: Part | None = None
    span: Span | None = None
    #: Those of its span, once this has been decoded.
    facts: AudioFacts | None = None
    #: The first clip of a file has it, and the other clips that are heard from it.
    file: BinaryIO | None = None
    others: list[DealtClip] = field(default_factory=list)
    source: Source | None = None
    fetch_ms: float = 0.0
    decode_ms: float = 0.0
    #: When it began to wait for a decoder, and when a decoder began with it.
    waits_since: float = 0.0
    begun_at: float = 0.0
    #: The time that its samples waited for room.
    room_s: float = 0.0
    #: None while it may be a single window.
    cutter: Cutter | None = None
    windows: int = 0
    #: The way in which it ended here, for the worker; None while it goes on.
    end: dict[str, Any] | None = None
    #: Nobody waits for it any more.
    dropped: bool = False
    #: Its file is kept until it is wanted.
    held: bool = False
    #: The clips that are heard from the same samples, itself among them, once a decoder has it.
    heard: list[DealtClip] = field(default_factory=list)

    @property
    def shape(self) -> Shape:
        return self.job.shape

    @property
    def together(self) -> list[DealtClip]:
        """The clips of its file that it is the first of."""
        return [self, *self.others]

    def begin(self) -> None:
        """Have those of them heard that take the same samples: of one rate and channels."""
        self.heard = []
        decoded = self.shape.sample_rate, self.job.channels
        for clip in self.together:
            if (clip.shape.sample_rate, clip.job.channels) == decoded and not clip.held:
                self.heard.append(clip)

    @property
    def goes_on(self) -> bool:
        return self.end is None and not self.dropped

    @property
    def going(self) -> list[DealtClip]:
        """The clips of its file that are not at their end."""
        return [clip for clip in self.together if clip.goes_on]

    @property
    def is_held(self) -> bool:
        """Whether its file is kept for clips that may be wanted, and for no others."""
        return bool(self.going) and all(clip.held for clip in self.going)

    @property
    def is_moot(self) -> bool:
        """Whether nobody waits for its samples any more."""
        return not any(clip.goes_on for clip in self.heard)

    def cut(self, piece: Piece, most: int) -> Iterator[tuple[DealtClip, Cut]]:
        """Yield the windows that a piece completes, of each clip that is heard from it."""
        for clip in self.heard:
            try:
                for window in clip._cut(piece, most):
                    if not clip.goes_on:
                        break
                    yield clip, window
            except (TooLong, TooShort) as error:
                clip.fail(error)

    def _cut(self, piece: Piece, most: int) -> Iterable[Cut]:
        self.cutter = self.cutter or Cutter(self.shape, most)
        samples, ends = piece.samples, False
        if self.span:
            samples = self.span.cut(samples, piece.channel)
            # Spans that are over hold no memory while the rest of the file is decoded.
            ends = self.span.is_over(piece.channel)
            if isinstance(piece.end, AudioFacts):
                self.facts = self.span.facts(piece.end)
            elif not len(samples):
                return ()
        last = piece.end is not None
        return self.cutter.cut(samples, piece.channel, last=last, ends=ends)

    def left(self, clips: list[DealtClip]) -> DealtClip | None:
        """Return the first of these clips of its file, with the file and the others.

        It is one that is not held, if there is one. The file is closed if there are none.
        """
        if not clips:
            self.close()
            return None
        first, *first.others = sorted(clips, key=attrgetter("held"))
        if first is not self:
            first.file, self.file = self.file, None
        return first

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def fail(self, error: ClipError) -> None:
        self.end = {"error": error.code, "facts": error.facts}

    def end_by(self, error: Exception) -> None:
        """End it and the other clips of its file."""
        end = failure_or_pause(self.id, error)
        for clip in self.together:
            if clip.end is not None:
                continue
            if isinstance(end, ClipError):
                clip.fail(end)
            else:
                clip.put_off(end)

    def put_off(self, delay_s: float) -> None:
        self.end = {"postponed": delay_s}


def failure_or_pause(clip_id: int, error: Exception) -> ClipError | float:
    """Return what an exception means for its clip: an error, or the seconds to put it off by.

    Call it where the exception is handled, since it logs those that are not the clip's.
    """
    match error:
        case HostBusyError():
            return error.wait_s
        case ClipError():
            return error
        case ServiceError():
            logger.warning(
                "clip %d is put off: %s", clip_id, error, extra={"action": "clip_put_off"}
            )
            return SERVICE_PAUSE_S
    logger.exception("clip %d failed unexpectedly", clip_id, extra={"action": "clip_error"})
    return ModelError(reason=repr(error))
