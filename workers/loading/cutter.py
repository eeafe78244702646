"""A clip's samples in, in pieces; the windows that the model hears out."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from earmark.core import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from earmark.core.clips import AudioFacts, Part


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


class Cutter:
    """Cuts one clip into windows that are a hop apart; the last one ends where the clip ends.

    A clip shorter than a window is one window. It holds the samples of a window and a piece,
    however long the clip is. Of a part with a span it cuts the span, at the times of the file.
    """

    def __init__(self, shape: Shape, most: int, part: Part | None = None) -> None:
        self._shape = shape
        self._most = most
        self._kept = np.empty(0, np.float32)
        self._has_span = part is not None and part.has_span
        #: The samples of the file that are the clip.
        self._first, self._end = 0, sys.maxsize
        if part is not None and part.start_s is not None:
            self._first = round(part.start_s * shape.sample_rate)
        if part is not None and part.end_s is not None:
            self._end = round(part.end_s * shape.sample_rate)
        #: Samples of the file that have come.
        self._come = 0
        #: Where the kept samples begin in the file, and the next window.
        self._begin = self._next = self._first
        self._silent = True
        self.windows = 0

    def cut(self, samples: np.ndarray, *, last: bool) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the windows that this piece completes, each with its start in the clip.

        Raises:
            TooLong: the clip has more windows than EARMARK_AUDIO__MAX_WINDOWS.
        """
        size = self._shape.size
        if self._has_span:
            samples = self._of_span(samples)
        held = np.concatenate([self._kept, samples]) if len(self._kept) else samples
        total = self._begin + len(held)
        while self._next + size < total:
            yield self._next, self._window(held, self._next)
            self._next += self._shape.hop
        final = max(self._first, total - size)
        if last and not len(held):
            start_s = self._first / self._shape.sample_rate
            raise errors.TooShort(min_duration_s=start_s, setting="where the row's span begins")
        if last:
            yield final, self._window(held, final)
        self._kept, self._begin = held[final - self._begin :].copy(), final

    def facts(self, facts: AudioFacts) -> AudioFacts:
        """Return the facts of the clip from those of its file, once all is cut."""
        if not self._has_span:
            return facts
        samples = self._begin + len(self._kept) - self._first
        return replace(facts, duration_s=samples / self._shape.sample_rate, silent=self._silent)

    def _of_span(self, samples: np.ndarray) -> np.ndarray:
        """Return those of the file's next samples that the span holds."""
        first = max(0, self._first - self._come)
        end = max(0, self._end - self._come)
        self._come += len(samples)
        kept = samples[first:end]
        self._silent = self._silent and not kept.any()
        return kept

    def _window(self, held: np.ndarray, start: int) -> np.ndarray:
        self.windows += 1
        if self.windows > self._most:
            longest = self._shape.size + (self._most - 1) * self._shape.hop
            raise errors.TooLong(
                max_duration_s=longest / self._shape.sample_rate,
                setting="EARMARK_AUDIO__MAX_WINDOWS",
            )
        at = start - self._begin
        return held[at : at + self._shape.size]
