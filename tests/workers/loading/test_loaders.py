"""Clips dealt to real loaders: their windows come once, whatever dies or hangs on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.servers import upgraded
from tests.workers.decoding import bad_audio
from tests.workers.loading.world import Clip, Queue, job, score_all, settings_for, until
from workers.loading.loaders import Loaders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Make = "Callable[..., tuple[Loaders, Queue]]"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., tuple[Loaders, Queue]]]:
    """Start loaders with settings of a test's own."""
    made: list[Loaders] = []
    url = upgraded(f"sqlite:///{tmp_path}/earmark.db")

    def start(**groups: Any) -> tuple[Loaders, Queue]:
        queue = Queue()
        made.append(Loaders(settings_for(tmp_path, url, **groups), queue))
        return made[-1], queue

    yield start
    for loaders in made:
        loaders.close()


def sounds(folder: Path, count: int, seconds: float = 0.5) -> list[Clip]:
    """Write files that each hold one value of their own; return their clips."""
    clips = []
    for number in range(1, count + 1):
        samples = np.full(int(8000 * seconds), number, "<i2")
        path = folder / f"{number}.wav"
        path.write_bytes(bad_audio.wav(samples.tobytes(), rate=8000))
        clips.append(Clip(number, str(path)))
    return clips


def test_each_clip_comes_with_its_samples_and_its_facts(make: Any, tmp_path: Path) -> None:
    loaders, queue = make()
    clips = sounds(tmp_path, 20)
    loaders.deal(job(), clips)
    score_all(loaders, queue, clips)
    for clip in clips:
        (samples,) = clip.scores
        assert np.array_equal(samples, np.full(4000, clip.clip_id / 32768, np.float32))
        assert clip.facts is not None
        assert clip.facts.audio.duration_s == 0.5
        assert clip.facts.source.bytes == (tmp_path / f"{clip.clip_id}.wav").stat().st_size
