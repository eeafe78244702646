"""Windows in, scores out: the model and its features on one device."""

from __future__ import annotations

import copy
import ctypes
import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from earmark.core import errors, settings
from workers.scoring import checkpoint, features

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

#: Of the classifiers that take any length, those whose attention mask hides padding exactly if their convolutions
#: use layer norm; group norm, and data2vec's and Conformer's deeper convolutions, let padding leak into the scores.
_MASKS_EXACTLY = ("hubert", "unispeech", "unispeech-sat", "wav2vec2", "wavlm")
#: On a GPU, windows this much shorter than the longest of a batch are padded rather than left behind.
_PADDING = 1.15
_GPU_BATCH_S, _GPU_BATCH_WINDOWS, _CPU_BATCH_WINDOWS = 640.0, 64, 16
#: glibc's parameters M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, and values at which a lane keeps its memory.
_MALLOC = ((-3, 32 * 1024**2), (-1, 256 * 1024**2))


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Which model gives the scores, and what it takes."""

    name: str
    #: The commit of a hub model.
    revision: str | None
    #: Of the weights.
    sha256: str
    sample_rate: int
    function_to_apply: str
    labels: tuple[str, ...]
    #: The model's own window.
    window_s: float
    #: The model hears nothing of a window beyond `window_s`.
    fixed: bool
    #: The shortest window the model can take.
    min_samples: int

    def usable_window_s(self, asked: float | None) -> float:
        """Return the window to cut: the one asked for, but never longer than the model hears."""
        if asked is None:
            return self.window_s
        return min(asked, self.window_s) if self.fixed else asked


@dataclass(slots=True)
class Limits:
    """What a batch may hold; the samples shrink when the device runs out of memory, for good."""

    windows: int
    #: Samples, padding included.
    samples: float
    #: Longest over shortest window of a batch: 1 where padding would change the scores.
    padding: float


@dataclass(eq=False)
class Classifier:
    """Score windows: 1-D float32 arrays at the card's sample rate, of any lengths."""

    _model: Any
    _features: features.Features
    card: ModelCard
    device: str
    dtype: str
    limits: Limits
    #: How many threads may score at once, each with a twin.
    lanes: int

    def choose(self, lengths: Sequence[int]) -> list[int]:
        """Return the places of the windows to score next: the first, and those that share its batch within limits."""
        chosen, shortest, longest = [0], lengths[0], lengths[0]
        for place, length in enumerate(lengths[1:], 1):
            low, high = min(shortest, length), max(longest, length)
            if len(chosen) >= self.limits.windows:
                break
            fits = self.card.fixed or high <= low * self.limits.padding
            if fits and self._padded(high) * (len(chosen) + 1) <= self.limits.samples:
                chosen.append(place)
                shortest, longest = low, high
        return chosen

    def _padded(self, longest: int) -> float:
        return self.card.window_s * self.card.sample_rate if self.card.fixed else longest

    def outcomes(self, windows: Sequence[np.ndarray]) -> list[np.ndarray | errors.ClipError]:
        """Score one batch: for each window its logits (labels,) or why it has none.

        A batch that fails is halved, so that no window fails for a neighbour.
        """
        try:
            return [_checked(logits) for logits in self._forward(windows)]
        except Exception as error:  # whatever a model raises fails one clip, never the worker
            failure = _translated(error)
        if isinstance(failure, errors.OutOfMemory):
            self._make_room(windows)
        if len(windows) == 1:
            return [failure]
        half = len(windows) // 2
        return self.outcomes(windows[:half]) + self.outcomes(windows[half:])

    def _forward(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            inputs = {name: self._cast(tensor) for name, tensor in self._features(windows).items()}
            logits: np.ndarray = self._model(**inputs).logits.float().cpu().numpy()
        return logits

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(getattr(torch, self.dtype)) if tensor.is_floating_point() else tensor

    def _make_room(self, windows: Sequence[np.ndarray]) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        tried = self._padded(max(map(len, windows))) * len(windows)
        self.limits.samples = min(self.limits.samples, tried / 2)
        logger.warning(
            "out of memory on %s with %d windows: batches now hold %.0f s",
            self.device, len(windows), self.limits.samples / self.card.sample_rate,
            extra={"action": "batch_halved", "model": self.card.name, "dtype": self.dtype},
        )  # fmt: skip

    def healthy(self) -> bool:
        """Say whether the device still scores a window of silence: after a CUDA fault it never will again."""
        return not isinstance(self.silent_outcome(), errors.ModelError)

    def silent_outcome(self) -> np.ndarray | errors.ClipError:
        """Score the shortest window there is, of silence, which any sound model and device can."""
        return self.outcomes([np.zeros(self.card.min_samples, np.float32)])[0]

    def twin(self) -> Classifier:
        """Return a classifier for another thread: the same weights, but modules of its own (some cache positions)."""
        weights = {
            id(tensor): tensor for tensor in [*self._model.parameters(), *self._model.buffers()]
        }
        other = copy.copy(self)
        other._model = copy.deepcopy(self._model, weights)
        return other


def apply(logits: np.ndarray, function_to_apply: str) -> np.ndarray:
    """Turn logits (..., labels) into scores with softmax, sigmoid or none of them."""
    if function_to_apply == "none":
        return logits
    if function_to_apply == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-np.clip(logits, -80, 80))))
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def _checked(logits: np.ndarray) -> np.ndarray | errors.ModelError:
    if np.isfinite(logits).all():
        return logits
    return errors.ModelError(
        reason="its scores are not numbers; with float16, EARMARK_MODEL__DTYPE=float32 mends it"
    )


def _translated(error: Exception) -> errors.ClipError:
    if isinstance(error, errors.ClipError):
        return error
    exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if exhausted or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    ):
        return errors.OutOfMemory()
    return errors.ModelError(reason=f"{type(error).__name__}: {error}")


def load(model: settings.Model, labels: Sequence[str] = ()) -> Classifier:
    """Load a model and score one window of silence with it; `labels` are what a zero-shot model listens for.

    Raises ServiceError with the cure where the model, the device or the dtype cannot be had.
    """
    device = pick_device(model.device)
    dtype = pick_dtype(model.dtype, device)
    _set_precision(device)
    _keep_memory()
    found = checkpoint.open_checkpoint(model.name, model.revision)
    names = checkpoint.labels_of(found, labels)
    network = checkpoint.load_model(found, dtype, names).to(device)
    inputs = features.build(found.extractor, found.config, device)
    card = _card(found, names, inputs)
    limits = _limits(model, found, inputs, device)
    classifier = Classifier(
        network,
        inputs,
        card,
        str(device),
        str(dtype).removeprefix("torch."),
        limits,
        _lanes(model, device),
    )
    _warm_up(classifier)
    return classifier


def _card(
    found: checkpoint.Checkpoint, labels: tuple[str, ...], inputs: features.Features
) -> ModelCard:
    return ModelCard(
        name=found.name,
        revision=found.revision,
        sha256=found.sha256(),
        sample_rate=found.extractor.sampling_rate,
        function_to_apply=found.function_to_apply,
        labels=labels,
        window_s=inputs.window_s,
        fixed=inputs.fixed,
        min_samples=inputs.min_samples,
    )


def _limits(
    model: settings.Model,
    found: checkpoint.Checkpoint,
    inputs: features.Features,
    device: torch.device,
) -> Limits:
    on_cpu = device.type == "cpu"
    seconds = model.batch_s or (inputs.cpu_batch_s if on_cpu else _GPU_BATCH_S)
    windows = model.batch_windows or (_CPU_BATCH_WINDOWS if on_cpu else _GPU_BATCH_WINDOWS)
    padding = _PADDING if not on_cpu and masks_exactly(found.config, found.extractor) else 1.0
    return Limits(windows, seconds * found.extractor.sampling_rate, padding)


def _lanes(model: settings.Model, device: torch.device) -> int:
    if device.type == "cpu":
        return model.threads or settings.cores()
    return 2 if device.type == "cuda" else 1


def masks_exactly(config: Any, extractor: Any) -> bool:
    """Say whether padding leaves this checkpoint's scores as they are."""
    layer_norm = getattr(config, "feat_extract_norm", None) == "layer"
    return config.model_type in _MASKS_EXACTLY and layer_norm and extractor.return_attention_mask


def _warm_up(classifier: Classifier) -> None:
    outcome = classifier.silent_outcome()
    if isinstance(outcome, errors.ClipError):
        reason = f"{classifier.card.name} cannot score a window of silence on {classifier.device}: {outcome}"
        raise errors.ServiceError(reason=reason) from outcome


def pick_device(asked: str) -> torch.device:
    """Return the device asked for, or with `auto` the best there is; never another one in silence."""
    if asked == "auto":
        best = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
        logger.info("device auto: %s", best, extra={"action": "device_chosen"})
        return torch.device(best)
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        reason = f"EARMARK_MODEL__DEVICE is {asked}; it may be auto, cpu, cuda, cuda:1 or mps."
        raise errors.ServiceError(reason=reason) from error
    _require_present(device)
    return device


def _require_present(device: torch.device) -> None:
    present = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if (device.index or 0) >= present.get(device.type, 0):
        cure = "set it to auto or cpu, or install PyTorch and a driver for the device"
        reason = (
            f"EARMARK_MODEL__DEVICE asks for {device}, which PyTorch does not find here: {cure}."
        )
        raise errors.ServiceError(reason=reason)


def pick_dtype(asked: str, device: torch.device) -> torch.dtype:
    """Return the dtype asked for; `auto` is bfloat16 on CUDA that computes in it, else float32.

    On a CPU bfloat16 was measured 1.7 times slower.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if asked == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if asked not in known:
        raise errors.ServiceError(
            reason=f"EARMARK_MODEL__DTYPE is {asked}; it may be auto, {', '.join(known)}."
        )
    return known[asked]


def _keep_memory() -> None:
    """Let threads keep what they freed: glibc gives it back at once, and taking it again costs small models 7%."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in _MALLOC:
            libc.mallopt(parameter, value)


def _set_precision(device: torch.device) -> None:
    """Give features and float32 models full precision: TensorFloat-32 keeps 3 digits of a log-mel or a logit."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
