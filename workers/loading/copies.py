"""Which clip is at work on a content: a table that all loaders of a worker share."""

from __future__ import annotations

import hashlib
from dataclasses import astuple
from typing import TYPE_CHECKING

from earmark.core.clips import NAMING
from workers.loading import arena

if TYPE_CHECKING:
    import numpy as np

    from workers.loading.clip import DealtClip

#: Many more than clips are in flight in a worker.
PLACES = 2**14
#: In samples of an arena: each place has a key and a clip's id, of eight bytes each.
SIZE = PLACES * 16 // arena.SAMPLE


class Copies:
    """Finds the clip whose result a copy can wait for.

    It is for speed only. Loaders write without a lock, and an entry replaces another one in its
    place. So the worker compares the contents, and a copy that is not found is classified.
    """

    def __init__(self, descriptor: int) -> None:
        self._places = arena.mapped(descriptor).view("<u8").reshape(PLACES, 2)

    def first(self, clip: DealtClip) -> int | None:
        """Return the clip that was last at work on this content; else note that this one is."""
        place, key = self._place(clip)
        found, first = place.tolist()
        if clip.job.joins and found == key and first != clip.id:
            return int(first)
        place[:] = key, clip.id
        return None

    def forget(self, clip: DealtClip) -> None:
        """Forget a clip that ended without a result."""
        if clip.source is not None:
            place, key = self._place(clip)
            if place.tolist() == [key, clip.id]:
                place[:] = 0

    def _place(self, clip: DealtClip) -> tuple[np.ndarray, int]:
        assert clip.source is not None
        part = clip.part and astuple(clip.part)[:NAMING]
        same = f"{clip.job.run_id} {part} {clip.source.sha256}"
        key = int.from_bytes(hashlib.sha256(same.encode()).digest()[:8])
        return self._places[key % PLACES], key
