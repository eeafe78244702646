"""A file's samples in pieces and the span of a clip in, the samples of the span out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from earmark.core.errors import TooShort

if TYPE_CHECKING:
    import numpy as np

    from earmark.core.clips import AudioFacts, Part


class Span:
    """Cuts a span out of one file. A span that ends behind the file ends with the file."""

    def __init__(self, part: Part, sample_rate: int) -> None:
        self._part = part
        self._rate = sample_rate
        #: In samples of the file.
        self.start = round((part.start_s or 0.0) * sample_rate)
        self._end = None if part.end_s is None else round(part.end_s * sample_rate)
        #: Of each channel: the samples that came, and those of the span.
        self._positions: Counter[int] = Counter()
        self._samples: Counter[int] = Counter()
        self._silent = True

    @classmethod
    def of(cls, part: Part | None, sample_rate: int) -> Span | None:
        """Return the span of a part; None if it is as long as the file."""
        if part is None or not part.has_span:
            return None
        return cls(part, sample_rate)

    def cut(self, samples: np.ndarray, channel: int = 0) -> np.ndarray:
        """Return what belongs to the span of a channel's next piece, shape (samples,)."""
        position = self._positions[channel]
        begin = max(0, self.start - position)
        end = len(samples) if self._end is None else max(0, self._end - position)
        self._positions[channel] += len(samples)
        inside = samples[begin:end]
        self._samples[channel] += len(inside)
        self._silent = self._silent and not inside.any()
        return inside

    def is_over(self, channel: int) -> bool:
        """Return whether no more samples of a channel belong to it."""
        return self._end is not None and self._positions[channel] >= self._end

    def facts(self, facts: AudioFacts) -> AudioFacts:
        """Return the facts of the span by those of its file, after its last piece.

        Raises:
            TooShort: the file ends before the span begins.
        """
        if not self._samples.total():
            start_s = self._part.start_s or 0.0
            raise TooShort(min_duration_s=start_s, setting="where the row's span begins")
        duration_s = max(self._samples.values()) / self._rate
        return replace(facts, duration_s=duration_s, silent=self._silent)
