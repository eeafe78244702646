"""A model's inputs equal those of the checkpoint's own extractor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.workers.scoring import checkpoints
from workers.scoring import features

pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")

CPU = torch.device("cpu")
SECONDS = (0.025, 0.3, 1, 5, 10.24, 12)
#: `fbank(clip, sample_frequency=16000, window_type="hanning", num_mel_bins=128)[1, ::16]` of
#: torchaudio.compliance.kaldi.
TORCHAUDIO = (-7.956099, -3.104448, -4.630643, -1.864960, -0.381754, -2.447964, 0.151259, -1.105355)


def own(extractor: Any, windows: list[np.ndarray], **options: Any) -> Any:
    return extractor(windows, sampling_rate=16_000, return_tensors="pt", **options)


def test_the_log_mel_filterbank_equals_the_numpy_one() -> None:
    extractor = transformers.ASTFeatureExtractor()
    windows = [checkpoints.clip(seconds, seed=3) for seconds in SECONDS]
    ours = features.build(extractor, None, CPU)(windows)["input_values"]
    assert (ours - own(extractor, windows)["input_values"]).abs().max() < 1e-3


def test_the_log_mel_filterbank_equals_torchaudios() -> None:
    extractor = transformers.ASTFeatureExtractor(do_normalize=False)
    ours = features.build(extractor, None, CPU)([checkpoints.clip(0.05, seed=1)])["input_values"]
    assert ours[0, 1, ::16].numpy() == pytest.approx(np.array(TORCHAUDIO), abs=1e-3)


def test_a_batched_filterbank_equals_one_window_at_a_time() -> None:
    log_mel = features.LogMel(transformers.ASTFeatureExtractor(), CPU)
    windows = [checkpoints.clip(seconds, seed=5) for seconds in SECONDS]
    alone = torch.cat([log_mel._log_mel([window]) for window in windows])
    assert (log_mel._log_mel(windows) - alone).abs().max() < 1e-3


@pytest.mark.parametrize(("offset", "loudness"), [(0, 0), (0.5, 0), (0.5, 0.001), (0, 30_000)])
def test_silence_offsets_and_extreme_levels_give_equal_features(
    offset: float, loudness: float
) -> None:
    extractor = transformers.ASTFeatureExtractor()
    window = np.float32(offset) + np.float32(loudness) * checkpoints.clip(1, seed=2)
    ours = features.build(extractor, None, CPU)([window])["input_values"]
    assert (ours - own(extractor, [window])["input_values"]).abs().max() < 1e-3


@pytest.mark.parametrize("normalize", [True, False])
def test_waveforms_of_mixed_lengths_equal_the_extractors(*, normalize: bool) -> None:
    extractor = transformers.Wav2Vec2FeatureExtractor(
        do_normalize=normalize, return_attention_mask=True
    )
    windows = [checkpoints.clip(seconds, seed=4) + 0.1 for seconds in SECONDS]
    config = SimpleNamespace(conv_kernel=(10,), conv_stride=(5,), conv_dim=(8,))
    ours = features.build(extractor, config, CPU)(windows)
    theirs = own(extractor, windows, padding=True)
    assert (ours["input_values"] - theirs["input_values"]).abs().max() < 1e-5
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])


def test_a_mask_is_given_only_if_the_checkpoint_asks_for_one() -> None:
    config = SimpleNamespace(conv_kernel=(10,), conv_stride=(5,), conv_dim=(8,))
    given = features.build(transformers.Wav2Vec2FeatureExtractor(), config, CPU)(
        [checkpoints.clip(1)]
    )
    assert list(given) == ["input_values"]


def test_the_shortest_window_is_the_receptive_field() -> None:
    config = SimpleNamespace(
        conv_kernel=(10, 3, 3, 3, 3, 2, 2), conv_stride=(5, 2, 2, 2, 2, 2, 2), conv_dim=(8,)
    )
    assert features.build(transformers.Wav2Vec2FeatureExtractor(), config, CPU).min_samples == 400


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (transformers.WhisperFeatureExtractor, {}),
        (transformers.SeamlessM4TFeatureExtractor, {}),
        (transformers.ClapFeatureExtractor, {"truncation": "rand_trunc"}),
        (type("Variant", (transformers.ASTFeatureExtractor,), {}), {}),
    ],
)
def test_other_extractors_are_used_unchanged(kind: Any, options: dict[str, Any]) -> None:
    extractor = kind(**options)
    build = features.build(extractor, None, CPU)
    window = checkpoints.clip(1, seed=6)
    rate = extractor.sampling_rate
    theirs = extractor([window], sampling_rate=rate, return_tensors="pt")
    for name, tensor in build([window, window]).items():
        assert torch.equal(tensor, torch.cat([theirs[name], theirs[name]])), name
