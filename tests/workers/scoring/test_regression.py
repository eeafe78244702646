"""Checkpoints of values: their head is taken if it is exactly the known one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from earmark.core import errors
from tests.workers.scoring import checkpoints
from tests.workers.scoring.checkpoints import load
from workers.scoring.model import Limits

if TYPE_CHECKING:
    from pathlib import Path


def test_values_are_those_of_the_model_cards_code(tmp_path: Path) -> None:
    original = checkpoints.save_dimensions(tmp_path)
    loaded = load(tmp_path)
    processor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    waves = [checkpoints.clip(seconds, seed=seed) for seed, seconds in enumerate((0.5, 1, 2))]
    expected = []
    for wave in waves:
        samples = processor(wave, sampling_rate=16_000, return_tensors="pt").input_values
        with torch.inference_mode():
            expected.append(original(samples)[0].numpy())
    assert np.abs(checkpoints.scores(loaded, waves) - np.stack(expected)).max() < 1e-4
    assert np.ptp(np.stack(expected), axis=0).max() > 1e-3, "these clips would not differ"
    loaded.limits = Limits(windows=16, samples=1e9, padding=100)
    assert np.abs(checkpoints.scores(loaded, waves) - np.stack(expected)).max() < 1e-4
    assert loaded.card.labels == ("arousal", "dominance", "valence")
    assert loaded.card.function_to_apply == "none"
    model: Any = loaded._model
    assert model.batch(waves[:1], embeddings=True)[1].shape == (1, 32)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"problem_type": "single_label_classification"}, "lacks classifier.bias"),
        ({"pooling_mode": "max"}, "lacks classifier.bias"),
        ({"use_weighted_layer_sum": True}, "lacks classifier.bias"),
    ],
)
def test_a_checkpoint_that_may_mean_something_else_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    checkpoints.save_dimensions(tmp_path, **changes)
    with pytest.raises(errors.ServiceError, match=reason):
        load(tmp_path)


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    checkpoints.save_dimensions(tmp_path)
    weights = torch.load(tmp_path / "pytorch_model.bin")
    weights["classifier.dense.weight"] = torch.zeros(16, 32)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(errors.ServiceError, match="do not fit its config"):
        load(tmp_path)
    weights["classifier.more.weight"] = torch.zeros(1)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(errors.ServiceError, match="its checkpoint lacks"):
        load(tmp_path)
