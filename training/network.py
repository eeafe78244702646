"""The network in two forms: a small 2-D CNN for training, a stock Wav2Vec2 classifier to ship.

A convolution over frequency and time is one over time alone whose channels are pairs of channel and
frequency, so the trained layers become `Conv1d` weights of a Wav2Vec2 feature encoder exactly, and
no code of ours is needed to load it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import transformers
from torch import nn
from torch.nn import functional

from training import frontend
from training.clips import WINDOW_S

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_ENCODER = "wav2vec2.feature_extractor.conv_layers."


@dataclass(frozen=True, slots=True)
class Layer:
    channels_in: int
    channels: int
    kernel: int
    time_stride: int
    band_stride: int

    def bands(self, before: int) -> int:
        return (before + 2 * (self.kernel // 2) - self.kernel) // self.band_stride + 1


LAYERS = (
    Layer(1, 16, 5, 2, 2),
    Layer(16, 32, 3, 2, 2),
    Layer(32, 64, 3, 2, 2),
    Layer(64, 64, 3, 1, 1),
    Layer(64, 128, 3, 2, 2),
)


class Convolutions(nn.Module):
    """The feature encoder in training: loudness (clips, frames, bands) in, features out."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(
                layer.channels_in,
                layer.channels,
                layer.kernel,
                (layer.band_stride, layer.time_stride),
                (layer.kernel // 2, 0),
                bias=False,
            )
            for layer in LAYERS
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(layer.channels) for layer in LAYERS)

    def forward(self, loud: torch.Tensor) -> torch.Tensor:
        features = loud.transpose(1, 2)[:, None]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            features = functional.relu6(norm(convolution(features)))
        return features.flatten(1, 2)


def config(labels: Sequence[str]) -> transformers.Wav2Vec2Config:
    widths, bands = [], frontend.BANDS
    for layer in LAYERS:
        bands = layer.bands(bands)
        widths.append(layer.channels * bands)
    return transformers.Wav2Vec2Config(
        conv_dim=[4 * frontend.TONES, frontend.STEPS * frontend.BANDS, frontend.BANDS, *widths],
        conv_kernel=[frontend.FRAME, 1, 1, *(layer.kernel for layer in LAYERS)],
        conv_stride=[frontend.HOP, 1, 1, *(layer.time_stride for layer in LAYERS)],
        conv_bias=True,
        feat_extract_norm="group",
        feat_extract_activation="relu6",
        hidden_size=160,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=320,
        classifier_proj_size=160,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        hidden_dropout=0.1,
        feat_proj_dropout=0.1,
        final_dropout=0.1,
        attention_dropout=0.0,
        activation_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
        mask_time_prob=0.0,
        vocab_size=8,
        num_codevectors_per_group=8,
        num_negatives=2,
        codevector_dim=8,
        proj_codevector_dim=8,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )


def trainable(labels: Sequence[str]) -> Any:
    model: Any = transformers.Wav2Vec2ForSequenceClassification(config(labels))
    model.wav2vec2.feature_extractor = Convolutions()
    return model


def shipped(trained: Any) -> Any:
    """Return a stock Wav2Vec2 classifier that does with sound what `trained` does with loudness."""
    labels = [trained.config.id2label[number] for number in range(trained.config.num_labels)]
    model: Any = transformers.Wav2Vec2ForSequenceClassification(config(labels))
    weights = {
        name: value
        for name, value in trained.state_dict().items()
        if "feature_extractor" not in name
    }
    model.load_state_dict(weights | _fixed() | _unrolled(trained.wav2vec2.feature_extractor))
    return model.eval()


def _fixed() -> dict[str, torch.Tensor]:
    layers = frontend.weights()
    named = {
        "0.conv.weight": layers.waves,
        "0.layer_norm.weight": layers.scale,
        "0.layer_norm.bias": torch.zeros(len(layers.scale)),
        "1.conv.weight": layers.ramps,
        "2.conv.weight": layers.total,
    }
    for number, channels in enumerate((len(layers.waves), len(layers.ramps), len(layers.total))):
        named[f"{number}.conv.bias"] = torch.zeros(channels)
    return {_ENCODER + name: value for name, value in named.items()}


@torch.no_grad()
def _unrolled(trained: Any) -> dict[str, torch.Tensor]:
    named, bands = {}, frontend.BANDS
    for number, (layer, convolution, norm) in enumerate(
        zip(LAYERS, trained.convolutions, trained.norms, strict=True)
    ):
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        bias = norm.bias - norm.running_mean * gain
        weight = _unroll(convolution.weight * gain[:, None, None, None], layer, bands)
        bands = layer.bands(bands)
        named[f"{_ENCODER}{number + 3}.conv.weight"] = weight
        named[f"{_ENCODER}{number + 3}.conv.bias"] = bias.repeat_interleave(bands)
    return named


def _unroll(kernel: torch.Tensor, layer: Layer, bands: int) -> torch.Tensor:
    """Turn a kernel (out, in, band, time) into one (out * bands after, in * bands before, time)."""
    after = layer.bands(bands)
    weight = torch.zeros(layer.channels, after, layer.channels_in, bands, layer.kernel)
    for band in range(after):
        for row in range(layer.kernel):
            before = band * layer.band_stride + row - layer.kernel // 2
            if 0 <= before < bands:
                weight[:, band, :, before] = kernel[:, :, row]
    return weight.reshape(layer.channels * after, layer.channels_in * bands, layer.kernel)


def save(model: Any, folder: Path) -> None:
    """Write the model's directory: float16 weights but for the first layer, loaded as float32."""
    model.save_pretrained(folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    small = {
        name: value if name.startswith(_ENCODER + "0.") else value.half()
        for name, value in weights.items()
    }
    safetensors.torch.save_file(small, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    facts = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    # Transformers ignores `chunk_length_s` here, as its own EnCodec extractor names it; Earmark
    # cuts windows by it.
    extractor: Any = transformers.Wav2Vec2FeatureExtractor
    extractor(
        sampling_rate=frontend.RATE,
        do_normalize=False,
        return_attention_mask=False,
        chunk_length_s=float(WINDOW_S),
    ).save_pretrained(folder)
