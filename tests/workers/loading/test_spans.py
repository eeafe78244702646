"""A span is cut out of its file, however its samples come."""

from __future__ import annotations

import numpy as np
import pytest

from earmark.core.clips import AudioFacts, Part
from earmark.core.errors import TooShort
from tests.workers.loading.world import SHAPE, job
from workers.decoding.decoder import Piece
from workers.loading.clip import DealtClip
from workers.loading.spans import Span

RATE = 8
SAMPLES = np.arange(80, dtype=np.float32)
FACTS = AudioFacts(duration_s=10.0, source_sample_rate=8, channels=1, codec="pcm")


def cut(span: Span, samples: np.ndarray, piece: int) -> list[float]:
    found: list[float] = []
    for start in range(0, len(samples), piece):
        found += span.cut(samples[start : start + piece]).tolist()
    return found


@pytest.mark.parametrize("piece", [80, 20, 7, 1])
@pytest.mark.parametrize(
    ("part", "samples"),
    [
        (Part(2.5, 5.0), (20, 40)),
        (Part(None, 1.0), (0, 8)),
        (Part(7.5), (60, 80)),
        (Part(9.0, 99.0), (72, 80)),
    ],
)
def test_a_span_is_cut_out_of_its_file(part: Part, samples: tuple[int, int], piece: int) -> None:
    span = Span.of(part, RATE)
    assert span is not None
    assert cut(span, SAMPLES, piece) == list(range(*samples))
    assert span.start == samples[0]
    facts = span.facts(FACTS)
    assert facts.duration_s == (samples[1] - samples[0]) / RATE
    assert not facts.silent


@pytest.mark.parametrize("part", [None, Part(member="a.wav")])
def test_a_clip_without_a_span_is_the_whole_file(part: Part | None) -> None:
    assert Span.of(part, RATE) is None


def test_a_silent_span_is_marked_and_one_behind_the_end_fails() -> None:
    samples = np.array([0, 0, 0, 0, 1, 1], dtype=np.float32)
    silent, behind = Span(Part(0.0, 2.0), 2), Span(Part(3.0, 4.0), 2)
    assert cut(silent, samples, 6) == [0] * 4
    assert silent.facts(FACTS).silent
    cut(behind, samples, 6)
    with pytest.raises(TooShort, match="shorter than 3 s"):
        behind.facts(FACTS)


def test_a_span_gives_its_windows_and_its_memory_before_the_end_of_its_file() -> None:
    parts = [Part(0.0, 1.5), Part(1.0, 3.0), Part(5.0, 6.0)]
    rate = SHAPE.sample_rate
    clips = []
    for number, part in enumerate(parts):
        clips.append(DealtClip(number, number, "a", job(), part, Span.of(part, rate)))
    first, *first.others = clips
    first.begin()
    piece = Piece(np.ones(2 * rate, np.float32), 0, None)
    found = [(clip.id, window.start) for clip, window in first.cut(piece, 100)]
    assert found == [(0, 0), (0, rate // 2)]
    assert [len(clip.cutter._tracks[0].kept) for clip in clips[:2] if clip.cutter] == [0, rate]
    last = Piece(np.ones(2 * rate, np.float32), 0, FACTS)
    assert [(clip.id, window.start) for clip, window in first.cut(last, 100)] == [(1, 0), (1, rate)]
    assert [clip.facts and clip.facts.duration_s for clip in clips] == [1.5, 2.0, None]
    assert [clip.end and clip.end["error"] for clip in clips] == [None, None, "too_short"]
