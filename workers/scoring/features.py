"""Windows in, a model's input tensors out, equal to those of the checkpoint's own extractor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from transformers import (
    ASTFeatureExtractor,
    ClapFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)
from transformers.audio_utils import mel_filter_bank

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Kaldi's frames at 16 kHz: 25 ms long, 10 ms apart.
_FRAME, _HOP, _FFT = 400, 160, 512
_PREEMPHASIS = 0.97
#: The smallest mel energy, kaldi's float32 epsilon.
_FLOOR = 1.192092955078125e-07
#: CPU batches: the most memory for the widest activation, and seconds if its size is unknown.
_CPU_BATCH_BYTES, _CPU_BATCH_S = 32 * 1024**2, 10.0
#: The window of a model that takes any length: speech and sound events fit, memory stays small.
_ANY_LENGTH_S = 10.0


class Features(Protocol):
    """Turns windows, each float32 (samples,), into a model's arguments, each (windows, ...)."""

    #: Whether every window gives the same shape, so that windows of any length can share a batch.
    fixed: bool
    #: The length of the model's own window; a fixed model ignores audio beyond it.
    window_s: float
    #: The shortest window the model can take.
    min_samples: int
    #: Seconds of audio in a CPU's batch: enough to spread the cost of a call, and near its caches.
    cpu_batch_s: float

    def __call__(self, windows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]: ...


def build(extractor: Any, config: Any, device: torch.device) -> Features:
    """Return the fastest features that equal the extractor's; its own if we have no fast ones."""
    if type(extractor) is ASTFeatureExtractor:
        return LogMel(extractor, device)
    if type(extractor) is Wav2Vec2FeatureExtractor:
        return Waveforms(extractor, config, device)
    return HubExtractor(extractor, device)


class LogMel:
    """Kaldi's log-mel filterbank, as `ASTFeatureExtractor` computes it."""

    fixed = True
    min_samples = _FRAME
    cpu_batch_s = _CPU_BATCH_S

    def __init__(self, extractor: ASTFeatureExtractor, device: torch.device) -> None:
        self.window_s = extractor.max_length * _HOP / extractor.sampling_rate
        self._frames = extractor.max_length
        self._device = device
        self._normalization = (0.0, 1.0)
        if extractor.do_normalize:
            self._normalization = (extractor.mean, extractor.std * 2)
        self._spectrum = torch.from_numpy(_spectrum()).to(device, torch.float32)
        self._mel = torch.from_numpy(_mel(extractor)).to(device, torch.float32)

    def __call__(self, windows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        if self._device.type == "cpu":
            # The intermediates of several windows fall out of the cache: 1.5 times slower at 16.
            log_mel = torch.cat([self._log_mel([window]) for window in windows])
        else:
            log_mel = self._log_mel(windows)
        mean, scale = self._normalization
        return {"input_values": log_mel.sub_(mean).div_(scale)}

    def _log_mel(self, windows: Sequence[np.ndarray]) -> torch.Tensor:
        heard = _FRAME + (self._frames - 1) * _HOP
        samples, lengths = _stack([window[:heard] for window in windows], self._device)
        real, imaginary = (samples.unfold(1, _FRAME, _HOP) @ self._spectrum).chunk(2, dim=-1)
        energy = real.square_().add_(imaginary.square_()) @ self._mel
        counts = (lengths - _FRAME) // _HOP + 1
        log_mel = energy.new_zeros(len(windows), self._frames, energy.shape[2])
        log_mel[:, : energy.shape[1]] = energy.clamp_(min=_FLOOR).log_()
        return log_mel.masked_fill_(~_mask(counts, self._frames)[:, :, None], 0.0)


def _spectrum() -> np.ndarray:
    """Return the matrix (400, 514) from a frame to its spectrum: real, then imaginary parts.

    Removing the mean, pre-emphasis, the Hann window and the Fourier transform are all linear, so
    one product does them all.
    """
    no_mean = np.eye(_FRAME) - 1 / _FRAME
    emphasis = np.eye(_FRAME) - _PREEMPHASIS * np.eye(_FRAME, k=1)
    emphasis[0, 0] = 1 - _PREEMPHASIS
    spectrum = np.fft.rfft(no_mean @ emphasis * np.hanning(_FRAME), n=_FFT, axis=1)
    return np.concatenate([spectrum.real, spectrum.imag], axis=1)


def _mel(extractor: ASTFeatureExtractor) -> np.ndarray:
    filters: np.ndarray = mel_filter_bank(
        num_frequency_bins=_FFT // 2 + 1,
        num_mel_filters=extractor.num_mel_bins,
        min_frequency=20,
        max_frequency=extractor.sampling_rate // 2,
        sampling_rate=extractor.sampling_rate,
        norm=None,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    return filters


class Waveforms:
    """The samples, normalised if the checkpoint asks for it, as by `Wav2Vec2FeatureExtractor`."""

    fixed = False

    def __init__(
        self, extractor: Wav2Vec2FeatureExtractor, config: Any, device: torch.device
    ) -> None:
        # Some checkpoints give the length they were trained on, as the starter does.
        self.window_s = float(getattr(extractor, "chunk_length_s", None) or _ANY_LENGTH_S)
        self.min_samples = _receptive_field(config)
        bytes_per_s = 4 * config.conv_dim[0] * extractor.sampling_rate / config.conv_stride[0]
        self.cpu_batch_s = _CPU_BATCH_BYTES / bytes_per_s
        self._device = device
        self._normalize = extractor.do_normalize
        self._with_mask = extractor.return_attention_mask

    def __call__(self, windows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        samples, lengths = _stack(windows, self._device)
        mask = _mask(lengths, samples.shape[1])
        if self._normalize:
            samples = _normalized(samples, mask)
        inputs = {"input_values": samples}
        if self._with_mask:
            inputs["attention_mask"] = mask.int()
        return inputs


def _normalized(samples: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    count = mask.sum(dim=1, keepdim=True)
    centred = (samples - samples.sum(dim=1, keepdim=True) / count) * mask
    return centred / (centred.square().sum(dim=1, keepdim=True) / count + 1e-7).sqrt()


def _receptive_field(config: Any) -> int:
    """Return the samples of the fewest frames that the encoder takes: one, or several with SEW."""
    samples = getattr(config, "squeeze_factor", 1)
    for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        samples = (samples - 1) * stride + kernel
    return int(samples)


class HubExtractor:
    """The checkpoint's own extractor, one window at a time: some draw at random in a batch."""

    cpu_batch_s = _CPU_BATCH_S

    def __init__(self, extractor: Any, device: torch.device) -> None:
        self.fixed = isinstance(extractor, (WhisperFeatureExtractor, ClapFeatureExtractor))
        self.window_s = _own_window_s(extractor)
        self.min_samples = 1
        if isinstance(extractor, SeamlessM4TFeatureExtractor):
            # The variance of a bin takes two frames.
            self.min_samples = _FRAME + _HOP
        self._extractor = extractor
        self._device = device
        self._on_device = {}
        if isinstance(extractor, WhisperFeatureExtractor):
            self._on_device["device"] = str(device)

    def __call__(self, windows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        each = [self._extract(window) for window in windows]
        batch = {}
        for name in each[0]:
            batch[name] = torch.cat([tensors[name] for tensors in each]).to(self._device)
        return batch

    def _extract(self, window: np.ndarray) -> Any:
        rate = self._extractor.sampling_rate
        return self._extractor([window], sampling_rate=rate, return_tensors="pt", **self._on_device)


def _own_window_s(extractor: Any) -> float:
    if isinstance(extractor, WhisperFeatureExtractor):
        return float(extractor.chunk_length)
    if isinstance(extractor, ClapFeatureExtractor):
        return float(extractor.max_length_s)
    return _ANY_LENGTH_S


def _stack(
    windows: Sequence[np.ndarray], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows padded to one length, (windows, samples), and their lengths, on the device."""
    # PyTorch keeps pinned memory for the next batch, and copies from it while other work goes on.
    pinned = device.type == "cuda"
    lengths = torch.tensor([len(window) for window in windows], pin_memory=pinned)
    samples = torch.empty(len(windows), int(lengths.max()), pin_memory=pinned)
    for row, window in zip(samples.numpy(), windows, strict=True):
        row[: len(window)] = window
        row[len(window) :] = 0
    return samples.to(device, non_blocking=True), lengths.to(device, non_blocking=True)


def _mask(counts: torch.Tensor, width: int) -> torch.Tensor:
    return torch.arange(width, device=counts.device) < counts[:, None]
