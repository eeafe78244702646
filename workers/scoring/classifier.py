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
from workers.scoring.windows import BEST

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

#: Of the models that take any length, those whose attention mask hides padding exactly if their
#: convolutions use layer norm. Group norm, and the deeper convolutions of data2vec and Conformer,
#: let padding leak into the scores.
_MASKS_EXACTLY = ("hubert", "unispeech", "unispeech-sat", "wav2vec2", "wavlm")
#: On a GPU, the longest window of a batch over its shortest: the shorter ones are padded.
_PADDING = 1.15
#: What a batch may hold at most: padded seconds of audio, and windows.
_GPU_BATCH_S, _GPU_BATCH_WINDOWS, _CPU_BATCH_WINDOWS = 640.0, 64, 16
#: What an error of a device without memory says; cuBLAS and cuDNN have words of their own.
_NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
#: glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, with values at which a lane keeps its memory.
_MALLOC = ((-3, 32 * 1024**2), (-1, 256 * 1024**2))


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model's identity, its labels, and the windows it takes."""

    name: str
    #: The commit of a hub model.
    revision: str | None
    #: The digest of the weights.
    sha256: str
    sample_rate: int
    function_to_apply: str
    labels: tuple[str, ...]
    #: The length of the model's own window.
    window_s: float
    #: The model ignores the part of a window beyond `window_s`.
    fixed: bool
    #: The shortest window the model can take.
    min_samples: int

    def usable_window_s(self, wanted: float | None) -> float:
        """Return the length of the windows to cut: never longer than the model hears."""
        if wanted is None:
            return self.window_s
        return min(wanted, self.window_s) if self.fixed else wanted


@dataclass(slots=True)
class Limits:
    """The most that a batch may hold; out of memory on the device shrinks `samples` for good."""

    windows: int
    #: Samples, padding included.
    samples: float
    #: A batch's longest window over its shortest; 1 if padding would change the scores.
    padding: float


@dataclass(eq=False)
class Classifier:
    """A model on its device, with the features it takes.

    Create it with `load`, and put a `Batcher` in front of it: one thread at a time may use a
    classifier, and each further thread (lane) needs a `twin`. Windows are float32 arrays, shape
    (samples,), at the card's sample rate and at least `card.min_samples` long.
    """

    _model: Any
    _features: features.Features
    card: ModelCard
    device: str
    dtype: str
    limits: Limits
    #: How many threads may score at once, each with a twin.
    lanes: int

    def choose(self, lengths: Sequence[int]) -> list[int]:
        """Choose a batch by the windows' lengths; return positions, the first always among them."""
        chosen = [0]
        shortest = longest = lengths[0]
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

    def outcomes(
        self, windows: Sequence[np.ndarray], function_to_apply: str = "none", top_k: int = 0
    ) -> list[np.ndarray | errors.ClipError]:
        """Score one batch: return for each window its scores, shape (labels,), or its error.

        With `top_k`, return the best labels of each window only: an array of `windows.BEST`.
        A batch that fails is halved, so that no window fails because of a neighbour.
        """
        try:
            return self._scores(windows, function_to_apply, top_k)
        except Exception as error:  # any error of a model fails one clip, never the worker
            failure = _translated(error)
        if isinstance(failure, errors.OutOfMemory):
            self._make_room(windows)
        if len(windows) == 1:
            return [failure]
        half = len(windows) // 2
        return [
            *self.outcomes(windows[:half], function_to_apply, top_k),
            *self.outcomes(windows[half:], function_to_apply, top_k),
        ]

    @torch.inference_mode()
    def _scores(
        self, windows: Sequence[np.ndarray], function_to_apply: str, top_k: int
    ) -> list[np.ndarray | errors.ClipError]:
        logits = self._forward(windows)
        # 0 for a window whose logits are all finite, else NaN.
        check = (logits * 0).sum(dim=1, keepdim=True)
        wanted = [apply(logits, function_to_apply)]
        if top_k:
            # `topk` would be faster, but it does not keep the order of equal scores.
            ranked, labels = wanted[0].sort(dim=1, descending=True, stable=True)
            wanted = [ranked[:, :top_k], labels[:, :top_k].float()]
        # One copy for all: a second one would wait for the batch of the other lane.
        packed = torch.cat([check, *wanted], dim=1).cpu().numpy()
        scores = packed[:, 1:]
        if top_k:
            count = wanted[0].shape[1]
            scores = _best(scores[:, :count], scores[:, count:])
        return _checked(list(scores), packed[:, 0])

    def _forward(self, windows: Sequence[np.ndarray]) -> torch.Tensor:
        """Return the logits, shape (windows, labels), float32, on the device."""
        inputs = {name: self._cast(tensor) for name, tensor in self._features(windows).items()}
        logits: torch.Tensor = self._model(**inputs).logits.float()
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
        """Return whether the device still scores silence; after a CUDA fault it never does."""
        return not isinstance(self.silent_outcome(), errors.ModelError)

    def silent_outcome(self) -> np.ndarray | errors.ClipError:
        """Score the shortest window of silence, which only a broken model or device cannot."""
        return self.outcomes([np.zeros(self.card.min_samples, np.float32)])[0]

    def twin(self) -> Classifier:
        """Return a classifier for another thread, with the same weights.

        It has its own modules, because some of them cache positions.
        """
        tensors = [*self._model.parameters(), *self._model.buffers()]
        weights = {id(tensor): tensor for tensor in tensors}
        other = copy.copy(self)
        other._model = copy.deepcopy(self._model, weights)
        return other


def apply(logits: torch.Tensor, function_to_apply: str) -> torch.Tensor:
    """Turn logits, shape (windows, labels), into scores with softmax, sigmoid or no function."""
    if function_to_apply == "none":
        return logits
    if function_to_apply == "sigmoid":
        return logits.sigmoid()
    return logits.softmax(dim=1)


def _best(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    best = np.empty(scores.shape, BEST)
    best["score"] = scores
    best["label"] = labels
    return best


def _checked(scores: list[np.ndarray], check: np.ndarray) -> list[np.ndarray | errors.ClipError]:
    """Replace the scores of windows whose logits are not all numbers by an error."""
    outcomes: list[np.ndarray | errors.ClipError] = [*scores]
    for place in np.flatnonzero(check != 0):
        outcomes[place] = errors.ModelError(
            reason="its scores are not numbers; with float16, EARMARK_MODEL__DTYPE=float32 mends it"
        )
    return outcomes


def _translated(error: Exception) -> errors.ClipError:
    if isinstance(error, errors.ClipError):
        return error
    exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if exhausted or any(words in str(error) for words in _NO_MEMORY):
        return errors.OutOfMemory()
    return errors.ModelError(reason=f"{type(error).__name__}: {error}")


def load(model: settings.Model, labels: Sequence[str] = ()) -> Classifier:
    """Load a model and score one window of silence with it; `labels` are for a zero-shot model.

    Raises:
        ServiceError: the model, the device or the dtype is not available; it names the cure.
    """
    device = pick_device(model.device)
    dtype = pick_dtype(model.dtype, device)
    _set_precision(device)
    _keep_memory()
    opened = checkpoint.open_checkpoint(model.name, model.revision)
    names = checkpoint.labels_of(opened, labels)
    network = _placed(checkpoint.load_model(opened, dtype, names), device, model.name)
    inputs = features.build(opened.extractor, opened.config, device)
    classifier = Classifier(
        network,
        inputs,
        _card(opened, names, inputs),
        str(device),
        str(dtype).removeprefix("torch."),
        _limits(model, opened, inputs, device),
        _lanes(model, device),
    )
    _warm_up(classifier)
    return classifier


def _placed(network: torch.nn.Module, device: torch.device, name: str) -> torch.nn.Module:
    try:
        return network.to(device)
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        cure = "end what else uses the device, or take a smaller model or another device"
        reason = f"{name} cannot be put on {device}: {cure}. PyTorch says: {first_line}"
        raise errors.ServiceError(reason=reason) from error


def _card(
    opened: checkpoint.Checkpoint, labels: tuple[str, ...], inputs: features.Features
) -> ModelCard:
    return ModelCard(
        name=opened.name,
        revision=opened.revision,
        sha256=opened.sha256(),
        sample_rate=opened.extractor.sampling_rate,
        function_to_apply=opened.function_to_apply,
        labels=labels,
        window_s=inputs.window_s,
        fixed=inputs.fixed,
        min_samples=inputs.min_samples,
    )


def _limits(
    model: settings.Model,
    opened: checkpoint.Checkpoint,
    inputs: features.Features,
    device: torch.device,
) -> Limits:
    windows, seconds, padding = _GPU_BATCH_WINDOWS, _GPU_BATCH_S, 1.0
    if device.type == "cpu":
        windows, seconds = _CPU_BATCH_WINDOWS, inputs.cpu_batch_s
    elif masks_exactly(opened.config, opened.extractor):
        padding = _PADDING
    samples = (model.batch_s or seconds) * opened.extractor.sampling_rate
    return Limits(model.batch_windows or windows, samples, padding)


def _lanes(model: settings.Model, device: torch.device) -> int:
    if device.type == "cpu":
        return model.threads or settings.cores()
    return 2 if device.type == "cuda" else 1


def masks_exactly(config: Any, extractor: Any) -> bool:
    """Return whether padding leaves this checkpoint's scores unchanged."""
    layer_norm = getattr(config, "feat_extract_norm", None) == "layer"
    return config.model_type in _MASKS_EXACTLY and layer_norm and extractor.return_attention_mask


def _warm_up(classifier: Classifier) -> None:
    outcome = classifier.silent_outcome()
    if isinstance(outcome, errors.ClipError):
        name, device = classifier.card.name, classifier.device
        reason = f"{name} cannot score a window of silence on {device}: {outcome}"
        raise errors.ServiceError(reason=reason) from outcome


def pick_device(name: str) -> torch.device:
    """Return the named device, or with `auto` the best available one.

    Raises:
        ServiceError: the device is unknown or missing; another one is never taken instead.
    """
    if name == "auto":
        best = _best_device()
        logger.info("device auto: %s", best, extra={"action": "device_chosen"})
        return torch.device(best)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        reason = f"EARMARK_MODEL__DEVICE is {name}; it may be auto, cpu, cuda, cuda:1 or mps."
        raise errors.ServiceError(reason=reason) from error
    _require_present(device)
    return device


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


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


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the named dtype; `auto` is bfloat16 on CUDA that computes in it, else float32.

    On a CPU, bfloat16 was measured to be 1.7 times slower.

    Raises:
        ServiceError: the dtype is unknown.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if name not in known:
        reason = f"EARMARK_MODEL__DTYPE is {name}; it may be auto, {', '.join(known)}."
        raise errors.ServiceError(reason=reason)
    return known[name]


def _keep_memory() -> None:
    """Let glibc keep freed memory: giving it back and taking it again costs small models 7%."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, value in _MALLOC:
            libc.mallopt(parameter, value)


def _set_precision(device: torch.device) -> None:
    """Compute float32 in full precision: TensorFloat-32 keeps 3 digits of a log-mel or a logit."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
