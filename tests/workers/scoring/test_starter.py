"""The bundled model recognises the bundled clips, at any length that it takes."""

from __future__ import annotations

import csv
from itertools import groupby
from typing import Any

import av
import numpy as np
import pytest
import torch
import transformers

from earmark.demo import EXAMPLES
from workers.loading.cutter import Cutter, Shape
from workers.scoring import hub

RATE, WINDOW = 16_000, 80_000
SHORTEST = 8_144


def rows(name: str) -> list[dict[str, str]]:
    with (EXAMPLES / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


SINGLE = {
    row["file"]: row["label"]
    for row in rows("clips.csv")
    if row["label"] and "+" not in row["label"]
}


@pytest.fixture(scope="module")
def starter() -> Any:
    return transformers.AutoModelForAudioClassification.from_pretrained(hub.STARTER).eval()


def load(name: str) -> np.ndarray:
    with av.open(str(EXAMPLES / name)) as container:
        resampler = av.AudioResampler("flt", "mono", RATE)
        frames = (*container.decode(audio=0), None)
        blocks = [block.to_ndarray() for frame in frames for block in resampler.resample(frame)]
    samples: np.ndarray = np.concatenate(blocks, axis=1)[0]
    return samples


def scores(starter: Any, *windows: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return torch.as_tensor(starter(torch.from_numpy(np.stack(windows))).logits.softmax(1))


def best(starter: Any, window: np.ndarray, count: int = 1) -> list[str]:
    return [
        starter.config.id2label[number]
        for number in scores(starter, window)[0].topk(count).indices.tolist()
    ]


@pytest.mark.parametrize("name", SINGLE)
def test_every_window_of_an_example_gets_its_label(starter: Any, name: str) -> None:
    samples = load(name)
    for start in {0, max(0, len(samples) - WINDOW)}:
        assert best(starter, samples[start : start + WINDOW]) == [SINGLE[name]]


def test_the_long_recordings_sounds_are_found_at_their_times(starter: Any) -> None:
    samples = load("long.ogg")
    for event in rows("long.csv"):
        for start in np.arange(float(event["start_s"]), float(event["end_s"]) - 4.99, 5):
            window = samples[round(start * RATE) :][:WINDOW]
            assert best(starter, window) == [event["label"]], start


def test_the_long_recordings_times_are_right_within_two_seconds(
    starter: Any,
) -> None:
    shape = Shape.of(RATE, 3, None, SHORTEST)
    cut = Cutter(shape, 1000).cut(load("long.ogg"), last=True)
    stretches = groupby(cut, key=lambda window: best(starter, window.samples)[0])
    heard = [
        (label, [shape.span(start, shape.size) for _, start, _ in of]) for label, of in stretches
    ]
    events = [
        (row["label"], float(row["start_s"]), float(row["end_s"])) for row in rows("long.csv")
    ]
    events = [
        event for event in events if event[2] - event[1] >= 3
    ]  # what is shorter than a window may go unheard
    assert [label for label, _ in heard] == [label for label, _, _ in events]
    for (label, of), (_, start, end) in zip(heard, events, strict=True):
        assert abs(of[0][0] - start) <= 2, label
        assert abs(of[-1][1] - end) <= 2, label


def test_the_siren_is_heard_over_the_music(starter: Any) -> None:
    samples = load("mixed.m4a")
    assert best(starter, samples[:WINDOW]) == ["speech"]
    assert "siren" in best(starter, samples[11 * RATE : 16 * RATE], 3)


@pytest.mark.parametrize("seconds", [SHORTEST / RATE, 1, 3, 5, 12, 30])
def test_every_length_from_half_a_second_up_is_scored(starter: Any, seconds: float) -> None:
    window = np.random.default_rng(1).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
    assert scores(starter, window).sum() == pytest.approx(1)


def test_a_batch_of_one_length_scores_as_its_windows_alone(starter: Any) -> None:
    windows = [load(name)[:WINDOW] for name in ("dog.ogg", "siren.wav", "piano.flac")]
    alone = torch.cat([scores(starter, window) for window in windows])
    assert (scores(starter, *windows) - alone).abs().max() < 1e-4


def test_the_model_is_small_and_takes_the_sound_as_it_was_recorded() -> None:
    extractors: Any = transformers.AutoFeatureExtractor
    extractor = extractors.from_pretrained(hub.STARTER)
    assert (hub.STARTER / "model.safetensors").stat().st_size <= 6e6
    assert (extractor.sampling_rate, extractor.do_normalize) == (RATE, False)
