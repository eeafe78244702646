"""The fixed first three layers, as convolutions: sound in, 48 bands of loudness (0 to 6) out.

A Wav2Vec2 encoder begins with Conv1d layers. The first here is a bank of windowed sines and
cosines, the second sums them to mel bands and clips each sum at eight heights, the third adds the
eight up: a logarithm in straight pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

RATE, TONES, BANDS, STEPS = 16_000, 128, 48, 8
FRAME = 320
#: Not 160: the group norm after the first layer removes each channel's mean over time, and with it,
#: at 160, every steady tone at a multiple of 100 Hz.
HOP = 163
CEILING = 6.0
#: So small that the group norm divides by the root of its epsilon alone and leaves the levels as
#: they are.
_TINY, _EPSILON = 1e-3, 1e-5
#: A step of the staircase is 12 dB.
_STEP = 4.0


@dataclass(frozen=True, slots=True)
class Weights:
    waves: torch.Tensor  # (4 * TONES, 1, FRAME)
    scale: torch.Tensor  # (4 * TONES,), of the group norm
    ramps: torch.Tensor  # (STEPS * BANDS, 4 * TONES, 1)
    total: torch.Tensor  # (BANDS, STEPS * BANDS, 1)


def weights() -> Weights:
    """Return the layers' weights, rounded as they are stored: all but the first as float16."""
    scale = torch.full((4 * TONES,), CEILING / _TINY * math.sqrt(_EPSILON))
    bands = torch.cat([_mel()] * 4, 1) / CEILING / 1.273 / 1.5
    gains = CEILING * _STEP ** torch.arange(STEPS - 1, -1, -1.0)
    ramps = (gains[:, None, None] * bands).reshape(STEPS * BANDS, 4 * TONES, 1)
    total = torch.eye(BANDS).repeat(1, STEPS)[:, :, None] / STEPS
    return Weights(_waves(), scale, ramps.half().float(), total.half().float())


def _waves() -> torch.Tensor:
    window = torch.hann_window(FRAME)
    phase = 2 * math.pi / RATE * _frequencies()[:, None] * torch.arange(FRAME)
    cosines, sines = torch.cos(phase) * window, torch.sin(phase) * window
    return torch.cat([cosines, sines, -cosines, -sines])[:, None] * (2 * _TINY / window.sum())


def _frequencies() -> torch.Tensor:
    return (torch.arange(TONES) + 0.5) * (RATE / 2 / TONES)


def _mel() -> torch.Tensor:
    """Return triangles (BANDS, TONES) on the mel scale, none narrower than one tone."""
    low, high = (1127 * math.log1p(hertz / 700) for hertz in (40, 7900))
    edges = 700 * torch.expm1(torch.linspace(low, high, BANDS + 2) / 1127)
    left, middle, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    tones = _frequencies()
    triangles = torch.minimum(
        (tones - left) / (middle - left), (right - tones) / (right - middle)
    ).clamp_min(0)
    narrow = (1 - (tones - middle).abs() / 62.5).clamp_min(0)
    return torch.where(triangles.sum(1, keepdim=True) < 0.35, narrow, triangles)


def loudness(waves: torch.Tensor, layers: Weights) -> torch.Tensor:
    """Return the three layers' loudness (clips, frames, BANDS) of waves (clips, samples)."""
    tones = functional.conv1d(waves[:, None], layers.waves, stride=HOP)
    spread = (tones.var(2, unbiased=False, keepdim=True) + _EPSILON).sqrt()
    tones = functional.relu6((tones - tones.mean(2, keepdim=True)) / spread * layers.scale[:, None])
    bands = functional.relu6(functional.conv1d(tones, layers.ramps))
    return functional.relu6(functional.conv1d(bands, layers.total)).transpose(1, 2)


def to_log_power(loud: torch.Tensor) -> torch.Tensor:
    return 2 * math.log(_STEP) * (loud / 0.75 - STEPS)


def to_loudness(log_power: torch.Tensor) -> torch.Tensor:
    return (0.75 * (log_power / (2 * math.log(_STEP)) + STEPS)).clamp(0, CEILING)
