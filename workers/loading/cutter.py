"""A clip's samples in, in pieces; the windows that the model hears out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from earmark.core import errors

if TYPE_CHECKING:
    from collections.abc import Iterator


class Shape(NamedTuple):
    """The windows that a run cuts, in samples; messages carry it as a list."""

    sample_rate: int
    size: int
    hop: int
    #: A shorter window is padded with zeros to this.
    least: int

    @classmethod
    def of(cls, sample_rate: int, window_s: float, hop_s: float | None, least: int) -> Shape:
        """Return the windows of a length in seconds, side by side unless they have a hop."""
        size = max(1, round(window_s * sample_rate))
        hop = size if hop_s is None else max(1, round(hop_s * sample_rate))
        return cls(sample_rate, size, hop, least)

    def span(self, start: int, samples: int) -> tuple[float, float]:
        """Return the seconds of the clip in which a window begins and ends."""
        return start / self.sample_rate, (start + samples) / self.sample_rate


class Cut(NamedTuple):
    """A window: its channel (0: the mix), its start in the clip in samples, and its samples."""

    channel: int
    start: int
    samples: np.ndarray


class Cutter:
    """Cuts one clip into windows that are a hop apart; the last one ends where the clip ends.

    A clip shorter than a window is one window. Each channel is cut by itself. It holds the samples
    of a window and a piece for each, however long the clip is.
    """

    def __init__(self, shape: Shape, most: int) -> None:
        self._shape = shape
        self._most = most
        self._tracks: dict[int, _Track] = {}
        self.windows = 0

    def cut(
        self, samples: np.ndarray, channel: int = 0, *, last: bool, ends: bool = False
    ) -> Iterator[Cut]:
        """Yield the windows that this piece of a channel completes.

        Args:
            last: it is the clip's last piece.
            ends: it is the channel's last piece that is not empty.

        Raises:
            TooLong: the clip has more windows than EARMARK_AUDIO__MAX_WINDOWS.
        """
        track = self._tracks.setdefault(channel, _Track(self._shape))
        for start, window in track.add(samples):
            yield self._counted(Cut(channel, start, window))
        for number, ended in self._tracks.items():
            if not ended.is_over and (last or (ends and ended is track)):
                yield self._counted(Cut(number, *ended.end()))

    def _counted(self, cut: Cut) -> Cut:
        self.windows += 1
        if self.windows > self._most:
            most = self._most // len(self._tracks)
            longest = self._shape.size + max(0, most - 1) * self._shape.hop
            raise errors.TooLong(
                max_duration_s=longest / self._shape.sample_rate,
                setting="EARMARK_AUDIO__MAX_WINDOWS",
            )
        return cut


class _Track:
    """The samples of one channel that no window has yet, or the last one alone."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self.kept = np.empty(0, np.float32)
        #: Where the kept samples begin in the clip, and the next window.
        self.begin = self._next = 0
        self.is_over = False

    def add(self, samples: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each window before the last, and keep that."""
        size = self._shape.size
        held = np.concatenate([self.kept, samples]) if len(self.kept) else samples
        total = self.begin + len(held)
        while self._next + size < total:
            at = self._next - self.begin
            yield self._next, held[at : at + size]
            self._next += self._shape.hop
        last = max(0, total - size)
        self.kept, self.begin = held[last - self.begin :].copy(), last

    def end(self) -> tuple[int, np.ndarray]:
        """Return the last window, and keep nothing."""
        kept, self.kept = self.kept, np.empty(0, np.float32)
        self.is_over = True
        return self.begin, kept
