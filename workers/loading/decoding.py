"""One decoder of a loader, with the clips that it was given."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from workers.decoding.decoder import Decoder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from earmark.core import errors
    from earmark.core.clips import AudioFacts
    from earmark.core.settings import Audio
    from workers.loading.clip import DealtClip
    from workers.loading.cutter import Cut


class Decoding:
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
        #: Windows that are cut, each for a clip that is heard, and the one that waits for room.
        self.windows: Iterator[tuple[DealtClip, Cut]] | None = None
        self.window: tuple[DealtClip, Cut] | None = None
        #: The end of the clip, which comes before its last windows have room.
        self.end: AudioFacts | errors.DecodeError | None = None
        #: Since when it waits for room.
        self.room_since: float | None = None
        #: When to start it again, if it did not start.
        self.rests_until = math.inf
