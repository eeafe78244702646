"""Checkpoints of transformers as models."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from earmark.core import errors, settings
from workers.scoring import checkpoint, devices, features, hub
from workers.scoring.model import Limits, Model, ModelCard

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

#: Of the models that take any length, those whose attention mask hides padding exactly if their
#: convolutions use layer norm. Group norm, and the deeper convolutions of data2vec and Conformer,
#: let padding leak into the scores.
_MASKS_EXACTLY = ("hubert", "unispeech", "unispeech-sat", "wav2vec2", "wavlm")
#: On a GPU, the longest window of a batch over its shortest: the shorter ones are padded.
_PADDING = 1.15


@dataclass(eq=False)
class Pretrained(Model):
    """A checkpoint of transformers with its features."""

    _network: Any
    _features: features.Features
    #: The path of the layer that makes the logits: its input are the embeddings.
    _head: str

    def batch(
        self, windows: Sequence[np.ndarray], *, embeddings: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs = {name: self._cast(tensor) for name, tensor in self._features(windows).items()}
        if not embeddings:
            return self._network(**inputs).logits.float(), None
        seen: list[torch.Tensor] = []
        head = self._network.get_submodule(self._head)
        hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            logits = self._network(**inputs).logits.float()
        finally:
            hook.remove()
        return logits, seen[0].float()

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(getattr(torch, self.dtype)) if tensor.is_floating_point() else tensor

    def twin(self) -> Pretrained:
        """Return the same for another thread; modules of its own, as some cache positions."""
        tensors = [*self._network.parameters(), *self._network.buffers()]
        weights = {id(tensor): tensor for tensor in tensors}
        other = copy.copy(self)
        other._network = copy.deepcopy(self._network, weights)
        return other


def load(
    model: settings.Model, folder: Path, commit: str | None, labels: Sequence[str]
) -> Pretrained:
    """Load the checkpoint in a folder; `labels` are for a zero-shot model.

    Raises:
        ServiceError: the model, the device or the dtype is not available; it names the cure.
    """
    device = devices.pick_device(model.device)
    dtype = devices.pick_dtype(model.dtype, device)
    devices.set_precision(device)
    devices.keep_memory()
    opened = checkpoint.open_checkpoint(model.name, folder, commit)
    names = checkpoint.labels_of(opened, labels)
    network = _placed(checkpoint.load_model(opened, dtype, names), device, model.name)
    inputs = features.build(opened.extractor, opened.config, device)
    return Pretrained(
        _card(opened, names, inputs),
        _limits(model, opened, inputs, device),
        str(device),
        str(dtype).removeprefix("torch."),
        devices.lanes_on(model, device),
        network,
        inputs,
        _head(network, len(names)),
    )


def _head(network: torch.nn.Module, labels: int) -> str:
    heads: list[str] = []
    for name, module in network.named_modules():
        if getattr(module, "out_features", None) == labels:
            heads.append(str(name))
    return heads[-1]


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
        license=hub.license_of(opened.name, opened.revision),
    )


def _limits(
    model: settings.Model,
    opened: checkpoint.Checkpoint,
    inputs: features.Features,
    device: torch.device,
) -> Limits:
    rate = opened.extractor.sampling_rate
    limits = devices.batch_limits(model, device, rate, inputs.cpu_batch_s)
    if device.type != "cpu" and masks_exactly(opened.config, opened.extractor):
        limits.padding = _PADDING
    return limits


def masks_exactly(config: Any, extractor: Any) -> bool:
    """Return whether padding leaves this checkpoint's scores unchanged."""
    layer_norm = getattr(config, "feat_extract_norm", None) == "layer"
    return config.model_type in _MASKS_EXACTLY and layer_norm and extractor.return_attention_mask
