"""A file's waveform and a span in, the span's waveform out; its windows at the file's times."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from earmark.core.clips import Waveform
from earmark.core.errors import TooShort

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from earmark.core.clips import AudioFacts, Part, Window


def cut(
    waveform: Waveform, facts: AudioFacts, part: Part | None
) -> tuple[Waveform, AudioFacts, float]:
    """Return the span of a waveform, its facts, and the second at which it begins.

    A span that ends behind the file ends with the file.

    Raises:
        TooShort: the file ends before the span begins.
    """
    if part is None or (part.start_s is None and part.end_s is None):
        return waveform, facts, 0.0
    rate = waveform.sample_rate
    start = round((part.start_s or 0.0) * rate)
    end = len(waveform.samples) if part.end_s is None else round(part.end_s * rate)
    samples = waveform.samples[start:end]
    if not len(samples):
        raise TooShort(min_duration_s=part.start_s or 0.0)
    of_span = replace(facts, duration_s=len(samples) / rate, silent=not samples.any())
    return Waveform(samples, rate), of_span, start / rate


def shifted(windows: Iterable[Window], by_s: float) -> Iterator[Window]:
    """Yield windows of a span at the times of its file."""
    for window in windows:
        yield replace(window, start_s=window.start_s + by_s, end_s=window.end_s + by_s)
