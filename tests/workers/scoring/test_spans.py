"""A span is cut out of its file, and its windows are at the file's times."""

from __future__ import annotations

import numpy as np
import pytest

from earmark.core.clips import AudioFacts, Part, Waveform
from earmark.core.errors import TooShort
from workers.scoring import spans, windows

WAVEFORM = Waveform(np.arange(80, dtype=np.float32), 8)
FACTS = AudioFacts(duration_s=10.0, source_sample_rate=8, channels=1, codec="pcm")


@pytest.mark.parametrize(
    ("part", "samples", "start_s"),
    [
        (None, (0, 80), 0.0),
        (Part(channel=1), (0, 80), 0.0),
        (Part(2.5, 5.0), (20, 40), 2.5),
        (Part(None, 1.0), (0, 8), 0.0),
        (Part(7.5), (60, 80), 7.5),
        (Part(9.0, 99.0), (72, 80), 9.0),
    ],
)
def test_a_span_is_cut_out_of_its_file(
    part: Part | None, samples: tuple[int, int], start_s: float
) -> None:
    cut, facts, begins = spans.cut(WAVEFORM, FACTS, part)
    assert cut.samples.tolist() == list(range(*samples))
    assert (facts.duration_s, begins) == (cut.duration_s, start_s)
    assert not facts.silent


def test_windows_of_a_span_are_at_the_times_of_the_file() -> None:
    cut, _, start_s = spans.cut(WAVEFORM, FACTS, Part(2.0, 5.0))
    split = windows.split(cut, window_s=2.0, hop_s=None, min_samples=1)
    shifted = [(each.start_s, each.end_s) for each in spans.shifted(split, start_s)]
    assert shifted == [(2.0, 4.0), (3.0, 5.0)]


def test_a_silent_span_is_marked_and_one_behind_the_end_fails() -> None:
    waveform = Waveform(np.array([0, 0, 0, 0, 1, 1], dtype=np.float32), 2)
    assert spans.cut(waveform, FACTS, Part(0.0, 2.0))[1].silent
    with pytest.raises(TooShort, match="shorter than 3 s"):
        spans.cut(waveform, FACTS, Part(3.0, 4.0))
