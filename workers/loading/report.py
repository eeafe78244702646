"""A loader's clips at work, and what it tells its worker about them."""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING, Any

from workers.loading import messages

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from earmark.core.clips import AudioFacts
    from workers.loading.clip import DealtClip
    from workers.loading.copies import Copies

#: Rows wait for more of them up to this many: a message costs as much as ten of them.
ROWS = 16


class Report:
    """Collects rows for a worker; the loader ends when the worker is gone."""

    def __init__(self, connection: Connection, copies: Copies) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._copies = copies
        #: By deal, the clips that are not at their end here.
        self.clips: dict[int, DealtClip] = {}
        self._windows: list[tuple[int, ...]] = []
        self._decoded: list[tuple[Any, ...]] = []
        self._ended: list[list[Any]] = []

    @property
    def has_rows(self) -> bool:
        return bool(self._windows or self._decoded)

    def window(self, *row: int) -> None:
        """Tell about a window in the arena."""
        self._windows.append(row)

    def decoded(self, clip: DealtClip, facts: AudioFacts) -> None:
        """Tell that a clip's windows have all been told."""
        self._decoded.append(_row(clip, facts))
        self.clips.pop(clip.deal, None)

    def end(self, clip: DealtClip) -> None:
        """Tell how a clip without a result of its own ended here."""
        clip.dropped = True
        clip.close()
        self._copies.forget(clip)
        if self.clips.pop(clip.deal, None):
            source = clip.source and [clip.source.sha256, clip.source.bytes]
            self._ended.append([clip.deal, clip.end, source, clip.fetch_ms, clip.decode_ms])

    def send_rows(self, *, at_once: bool) -> None:
        """Send all ends, and the rows if they are many."""
        if self._ended:
            self.send(messages.ENDED + json.dumps(self._ended).encode())
            self._ended = []
        waiting = len(self._windows) + len(self._decoded)
        if waiting and (at_once or waiting >= ROWS):
            self.send(messages.rows(self._decoded, self._windows))
            self._decoded, self._windows = [], []

    def send(self, message: bytes) -> None:
        """Send a message, from any thread."""
        try:
            with self._sending:
                self._connection.send_bytes(message)
        except OSError:  # the worker is gone
            os._exit(os.EX_OK)


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
