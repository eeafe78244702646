"""Batches of loudness in; the same sounds nearer, duller, noisier or mixed out, as spectrograms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from training import frontend

#: Five, three and one and a half seconds: windows at a clip's end and short clips are as they are.
_FRAMES = (489, 489, 300, 300, 150)
#: Logarithms of a chi-squared power, as noise has it in one band of one frame.
_GRAIN = 1 << 21


@dataclass(frozen=True, slots=True)
class Batch:
    loud: torch.Tensor  # (clips, frames, bands)
    shares: torch.Tensor  # (clips, labels), each clip's sum is 1
    #: Clips whose level or loneliness is their meaning (silence, other): no mixing.
    alone: torch.Tensor  # (clips,) bool
    #: Clips so quiet by nature that noise would be the sound.
    silent: torch.Tensor  # (clips,) bool


class Augment:
    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        gamma = -torch.log(self._uniform(2, _GRAIN).clamp_min(1e-9)).sum(0) / 2
        self._grain = gamma.clamp_min(1e-3).log()

    @property
    def state(self) -> torch.Tensor:
        return self._random.get_state()

    @state.setter
    def state(self, state: torch.Tensor) -> None:
        self._random.set_state(state)

    def __call__(
        self, batch: Batch, backgrounds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return loudness (clips, frames, bands) and the share of each label (clips, labels)."""
        frames = _FRAMES[int(self._integers(0, len(_FRAMES), 1))]
        power = frontend.to_log_power(self._crop(self._roll(batch.loud), frames))
        power = self._shift(self._colour(power, batch))
        power = self._add_noise(power, backgrounds[:, : power.shape[1]], batch.silent)
        power, shares = self._mix(power, batch.shares, batch.alone)
        return self._mask(frontend.to_loudness(power)), shares

    def _uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self._random)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._random)

    def _integers(self, low: int, high: int, count: int) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=self._random)

    def _roll(self, loud: torch.Tensor) -> torch.Tensor:
        clips, frames, _ = loud.shape
        by = self._integers(0, frames, clips) * (self._uniform(clips) < 0.5)
        return _gather_frames(loud, (torch.arange(frames) + by[:, None]) % frames)

    def _crop(self, loud: torch.Tensor, kept: int) -> torch.Tensor:
        """Keep the loudest of four pieces, as many clips are mostly pause."""
        clips, frames, _ = loud.shape
        heard = functional.pad(loud.mean(2).cumsum(1), (1, 0))
        starts = self._integers(0, frames - kept + 1, 4 * clips).view(clips, 4)
        sums = heard.gather(1, starts + kept) - heard.gather(1, starts)
        start = starts.gather(1, sums.argmax(1, keepdim=True))
        return _gather_frames(loud, start + torch.arange(kept))

    def _colour(self, power: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Change distance (-20 to 11 dB) and microphone: an equaliser, at times a telephone."""
        clips, _, bands = power.shape
        gain = self._uniform(clips) * 7 - 4.5
        gain = torch.where(batch.alone, gain / 3, gain)
        gain = torch.where(batch.silent, gain.clamp_max(0.5), gain)
        points = self._normal(clips, 1, 6) * 0.9 * (self._uniform(clips, 1, 1) < 0.6)
        curve = functional.interpolate(points, size=bands, mode="linear", align_corners=True)
        edge = torch.where(self._uniform(clips) < 0.15, self._integers(26, 45, clips), bands)
        kept = torch.arange(bands) < edge[:, None]
        return torch.where(kept[:, None], power + gain[:, None, None] + curve, -15.9)

    def _shift(self, power: torch.Tensor) -> torch.Tensor:
        """Move the spectrum by up to three bands: another pitch and another size of the source."""
        clips, frames, bands = power.shape
        by = self._integers(-3, 4, clips) * (self._uniform(clips) < 0.5)
        bins = (torch.arange(bands) - by[:, None]).clamp(0, bands - 1)
        return power.gather(2, bins[:, None].expand(clips, frames, bands))

    def _add_noise(
        self, power: torch.Tensor, backgrounds: torch.Tensor, silent: torch.Tensor
    ) -> torch.Tensor:
        clips, frames, _ = power.shape
        real = frontend.to_log_power(backgrounds.roll(int(self._integers(0, frames, 1)), 1))
        noise = torch.where(
            (self._uniform(clips) < 0.6)[:, None, None], real, self._noise(power.shape)
        )
        lower = self._uniform(clips) * 7.5 - 0.5  # -2 to 30 dB, as natural logarithms of power
        noise = noise + (_level(power) - _level(noise) - lower)[:, None, None]
        noisy = (self._uniform(clips) < 0.45) & ~silent
        return torch.where(noisy[:, None, None], torch.logaddexp(power, noise), power)

    def _noise(self, shape: torch.Size) -> torch.Tensor:
        clips, frames, bands = shape
        place = self._integers(0, _GRAIN, clips)[:, None, None]
        step = torch.arange(frames * bands).view(1, frames, bands)
        slope = (self._uniform(clips) * 6 - 4)[:, None] * torch.linspace(-0.5, 0.5, bands)
        gusts = functional.interpolate(self._normal(clips, 1, 5) * 0.5, size=frames, mode="linear")
        return self._grain[(place + step) % _GRAIN] + slope[:, None] + gusts.transpose(1, 2)

    def _mix(
        self, power: torch.Tensor, shares: torch.Tensor, alone: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix another clip of the batch into six of ten; share the label as the powers."""
        clips = len(power)
        partner = torch.randperm(clips, generator=self._random)
        share = 0.5 + 0.5 * self._uniform(clips) ** 0.6
        share = torch.where((self._uniform(clips) < 0.6) & ~alone & ~alone[partner], share, 1.0)
        louder = (_level(power) - _level(power)[partner] + torch.log((1 - share) / share + 1e-9))[
            :, None, None
        ]
        mixed = torch.logaddexp(power, power[partner] + louder)
        power = torch.where((share < 1)[:, None, None], mixed, power)
        return power, share[:, None] * shares + (1 - share[:, None]) * shares[partner]

    def _mask(self, loud: torch.Tensor) -> torch.Tensor:
        """Hide two stretches of time and two of frequency behind the clip's mean."""
        clips, frames, bands = loud.shape
        hidden = torch.zeros(clips, frames, bands, dtype=torch.bool)
        for _ in range(2):
            hidden |= (
                self._stretch(clips, frames, frames // 8)[:, :, None]
                | self._stretch(clips, bands, 10)[:, None]
            )
        return torch.where(hidden, loud.mean((1, 2), keepdim=True), loud)

    def _stretch(self, clips: int, size: int, longest: int) -> torch.Tensor:
        start = self._integers(0, size - 4, clips)[:, None]
        width = (self._uniform(clips) * longest * (self._uniform(clips) < 0.7))[:, None]
        place = torch.arange(size)
        return (place >= start) & (place < start + width)


def _gather_frames(loud: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    return loud.gather(1, frames[:, :, None].expand(-1, -1, loud.shape[2]))


def _level(power: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(power, (1, 2)) - math.log(power[0].numel())
