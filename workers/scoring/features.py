"""Windows of audio in, the tensors a model takes out, on its device and equal to the checkpoint's own extractor."""

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
#: What the widest activation of a batch on a CPU may take, and the batch where that is not known.
_CPU_BATCH_BYTES, _CPU_BATCH_S = 32 * 1024**2, 10.0
#: What a model that takes any length is given at once: speech and sound events fit, memory stays small.
_ANY_LENGTH_S = 10.0


class Features(Protocol):
    """Turn windows, each (samples,) float32, into a model's keyword arguments, each (windows, ...)."""

    #: Every window gives the same shape, so windows of any length share a batch exactly.
    fixed: bool
    #: The model's own length; a fixed model hears nothing beyond it.
    window_s: float
    #: The shortest window the model can take.
    min_samples: int
    #: What a CPU is given at once: enough to spread the cost of each call, little enough to stay near its caches.
    cpu_batch_s: float

    def __call__(self, windows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]: ...


def build(extractor: Any, config: Any, device: torch.device) -> Features:
    """Return the fastest features that equal `extractor`'s: its own, where we have no fast path."""
    if type(extractor) is ASTFeatureExtractor:
        return LogMel(extractor, device)
    if type(extractor) is Wav2Vec2FeatureExtractor:
        return Waveforms(extractor, config, device)
    return HubExtractor(extractor, device)


class LogMel:
    """Kaldi's log-mel filterbank, as `ASTFeatureExtractor` computes it with torchaudio or with numpy."""

    fixed = True
    min_samples = _FRAME
    cpu_batch_s = _CPU_BATCH_S

    def __init__(self, extractor: ASTFeatureExtractor, device: torch.device) -> None:
        self.window_s = extractor.max_length * _HOP / extractor.sampling_rate
        self._frames = extractor.max_length
        self._device = device
        self._normalization = (
            (extractor.mean, extractor.std * 2) if extractor.do_normalize else (0.0, 1.0)
        )
        self._spectrum = torch.from_numpy(_spectrum()).to(device, torch.float32)
        self._mel = torch.from_numpy(_mel(extractor)).to(device, torch.float32)

    def __call__(self, windows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        # On a CPU, the intermediates of more than one window fall out of its cache: 1.5 times slower at 16.
        groups = [[window] for window in windows] if self._device.type == "cpu" else [windows]
        mean, scale = self._normalization
        log_mel = torch.cat([self._log_mel(group) for group in groups])
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
    """Return the matrix (400, 514) from a frame to the real, then the imaginary parts of its spectrum.

    Removing the mean, pre-emphasis, the Hann window and the Fourier transform are all linear: one product does them.
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
    """The samples themselves, with zero mean and unit variance if asked, as `Wav2Vec2FeatureExtractor` gives them."""

    fixed = False

    def __init__(
        self, extractor: Wav2Vec2FeatureExtractor, config: Any, device: torch.device
    ) -> None:
        # Some checkpoints say what they were trained on; the starter does.
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
        values = _normalized(samples, mask) if self._normalize else samples
        return {"input_values": values} | (
            {"attention_mask": mask.int()} if self._with_mask else {}
        )


def _normalized(samples: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    count = mask.sum(dim=1, keepdim=True)
    centred = (samples - samples.sum(dim=1, keepdim=True) / count) * mask
    return centred / (centred.square().sum(dim=1, keepdim=True) / count + 1e-7).sqrt()


def _receptive_field(config: Any) -> int:
    """Return the samples behind the fewest frames the encoder can take: one, or what SEW squeezes into one."""
    samples = getattr(config, "squeeze_factor", 1)
    for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        samples = (samples - 1) * stride + kernel
    return int(samples)


class HubExtractor:
    """The checkpoint's own extractor, one window at a time as `pipeline` calls it: some draw lots in a batch."""

    cpu_batch_s = _CPU_BATCH_S

    def __init__(self, extractor: Any, device: torch.device) -> None:
        self.fixed = isinstance(extractor, (WhisperFeatureExtractor, ClapFeatureExtractor))
        self.window_s = _own_window_s(extractor)
        # Per-bin variance takes two frames.
        self.min_samples = (
            _FRAME + _HOP if isinstance(extractor, SeamlessM4TFeatureExtractor) else 1
        )
        self._extractor = extractor
        self._device = device
        self._on_device = (
            {"device": str(device)} if isinstance(extractor, WhisperFeatureExtractor) else {}
        )

    def __call__(self, windows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        each = [self._extract(window) for window in windows]
        return {name: torch.cat([one[name] for one in each]).to(self._device) for name in each[0]}

    def _extract(self, window: np.ndarray) -> Any:
        rate = self._extractor.sampling_rate
        return self._extractor([window], sampling_rate=rate, return_tensors="pt", **self._on_device)


def _own_window_s(extractor: Any) -> float:
    if isinstance(extractor, WhisperFeatureExtractor):
        return float(extractor.chunk_length)
    return (
        float(extractor.max_length_s)
        if isinstance(extractor, ClapFeatureExtractor)
        else _ANY_LENGTH_S
    )


def _stack(
    windows: Sequence[np.ndarray], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows padded to one length, (windows, samples), and their lengths, on the device."""
    lengths = torch.tensor([len(window) for window in windows])
    samples = torch.zeros(len(windows), int(lengths.max()), pin_memory=device.type == "cuda")
    for row, window in zip(samples.numpy(), windows, strict=True):
        row[: len(window)] = window
    return samples.to(device, non_blocking=True), lengths.to(device)


def _mask(counts: torch.Tensor, width: int) -> torch.Tensor:
    return torch.arange(width, device=counts.device) < counts[:, None]
