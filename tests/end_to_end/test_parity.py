"""`earmark run` gives the scores of `transformers.pipeline` on the same waveform."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import librosa
import numpy as np
import pytest
import soxr
from transformers import pipeline

from earmark.demo import EXAMPLES
from workers.scoring import classifier

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Earmark

CLIPS = sorted(
    path for path in EXAMPLES.iterdir() if path.suffix in (".wav", ".ogg", ".flac", ".mp3", ".m4a")
)
STARTER = Path(classifier.__file__).with_name("starter")


def load(path: Path) -> Any:
    """Load as librosa does, which cannot read AAC."""
    if path.suffix != ".m4a":
        return librosa.load(path, sr=16000)[0]
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
        rate = container.streams.audio[0].rate
    return soxr.resample(np.concatenate(frames, axis=1).mean(axis=0), rate, 16000)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_example_clip_has_the_scores_of_the_pipeline(earmark: Earmark) -> None:
    earmark("run", str(EXAMPLES), "--window-s", "100", "--top-k", "17", "--name", "all")
    ours: dict[str, dict[str, float]] = defaultdict(dict)
    for line in earmark(
        "query", "SELECT uri, label, score FROM top_k", "--format", "jsonl"
    ).stdout.splitlines():
        row = json.loads(line)
        ours[Path(row["uri"]).name][row["label"]] = row["score"]
    reference = pipeline("audio-classification", model=str(STARTER))
    good = [path for path in CLIPS if path.name != "broken.wav"]
    assert len(good) == 9
    for path in good:
        theirs = {each["label"]: each["score"] for each in reference(load(path), top_k=17)}
        assert ours[path.name] == pytest.approx(theirs, abs=1e-4), path.name
