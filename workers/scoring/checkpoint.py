"""A model's name in, its checkpoint out: files, identity, feature extractor and weights."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import transformers
from safetensors import SafetensorError
from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES

from earmark.core import errors
from workers.scoring import hub, regression, zero_shot

# Only the losses of object detectors need scipy, which takes 23 MB of a worker.
with mock.patch.object(transformers.utils, "is_scipy_available", return_value=False):
    import transformers.modeling_utils

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

    from earmark.core import options

transformers_logging: Any = transformers.logging

#: Parameters that only training uses; many good checkpoints lack them.
_TRAINING_ONLY = "masked_spec_embed"
_UNREADABLE = (
    OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError,
)  # fmt: skip
_FUNCTIONS: dict[str | None, options.FunctionToApply] = {
    "regression": "none",
    "multi_label_classification": "sigmoid",
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's files and configuration, without its weights."""

    name: str
    folder: Path
    #: The commit of a hub model.
    revision: str | None
    config: Any
    extractor: Any

    @property
    def zero_shot(self) -> bool:
        return bool(self.config.model_type == hub.ZERO_SHOT)

    @property
    def function_to_apply(self) -> options.FunctionToApply:
        """The function from logits to scores, chosen as `AudioClassificationPipeline` does."""
        return _FUNCTIONS.get(getattr(self.config, "problem_type", None), "softmax")

    def sha256(self) -> str:
        """Return the digest of the weights' files, in the order of their names."""
        return hub.sha256(sorted(self.folder.glob(_weights_pattern(self.folder))))


def open_checkpoint(name: str, folder: Path, commit: str | None) -> Checkpoint:
    """Read the configuration of the checkpoint in a folder; code in it never runs.

    Raises:
        ServiceError: it cannot be read, or is no audio classifier.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _require_audio_classifier(name, config)
        extractors: Any = transformers.AutoFeatureExtractor
        extractor = extractors.from_pretrained(folder, trust_remote_code=False)
    except _UNREADABLE as error:
        reason = f"{name} cannot be read as a model: {_first_line(error)}"
        raise errors.ServiceError(reason=reason) from error
    return Checkpoint(name, folder, commit, config, extractor)


def _require_audio_classifier(name: str, config: Any) -> None:
    known = [*MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, "clap"]
    if config.model_type not in known:
        usable = f"Earmark classifies with {', '.join(known)}"
        raise errors.ServiceError(reason=f"{name} is a {config.model_type} model; {usable}.")


def labels_of(checkpoint: Checkpoint, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the labels in the order of the scores.

    They are the checkpoint's own or, for a zero-shot model, those that the run asks for.

    Raises:
        ServiceError: the labels do not fit the model.
    """
    hub.check_labels(checkpoint.name, wanted, zero_shot=checkpoint.zero_shot)
    if checkpoint.zero_shot:
        return tuple(wanted)
    name = checkpoint.name
    named = {int(position): label for position, label in checkpoint.config.id2label.items()}
    if sorted(named) != list(range(len(named))):
        raise errors.ServiceError(
            reason=f"The labels in config.json of {name} are not numbered 0 to {len(named) - 1}."
        )
    return tuple(named[position] for position in range(len(named)))


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, labels: Sequence[str]
) -> torch.nn.Module:
    """Load the weights; the model returns `logits`, shape (windows, labels).

    Raises:
        ServiceError: a file is damaged, or a weight is missing, which would be random and make
            the scores random too.
    """
    kind: Any = transformers.AutoModelForAudioClassification
    if checkpoint.zero_shot:
        kind = transformers.ClapModel
    try:
        model, loading = _from_pretrained(kind, checkpoint, dtype)
        if regression.is_regression(checkpoint.config, loading):
            kind = regression.with_head(type(model))
            model, loading = _from_pretrained(kind, checkpoint, dtype)
        _require_all_weights(checkpoint.name, loading)
        if checkpoint.zero_shot:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                checkpoint.folder, trust_remote_code=False
            )
            model = zero_shot.ZeroShot(model, tokenizer, labels)
    except _UNREADABLE as error:
        cure = "delete its files and get them again"
        reason = f"The weights of {checkpoint.name} cannot be read ({_first_line(error)}): {cure}."
        raise errors.ServiceError(reason=reason) from error
    loaded: torch.nn.Module = model.eval().requires_grad_(requires_grad=False)
    return loaded


def text_vector(name: str, revision: str | None, words: str) -> np.ndarray:
    """Return the unit text features of words, which compare with a CLAP model's embeddings."""
    model: Any = load_model(
        open_checkpoint(name, *hub.locate(name, revision)), torch.float32, [words]
    )
    vector: np.ndarray = model.head.text[0].numpy()
    return vector


def _from_pretrained(kind: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Load a model of a kind; return it, and what transformers says of its weights."""
    return kind.from_pretrained(
        checkpoint.folder,
        config=checkpoint.config,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=_weights_pattern(checkpoint.folder) == hub.SAFE_WEIGHTS,
        weights_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )


def _require_all_weights(name: str, loading: dict[str, Any]) -> None:
    missing = sorted(key for key in loading["missing_keys"] if _TRAINING_ONLY not in key)
    if missing:
        reason = f"{name} is no audio classifier: its checkpoint lacks {', '.join(missing[:4])}"
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise errors.ServiceError(
            reason=f"{reason}{more}; choose one fine-tuned for audio classification."
        )
    for key, stored, expected in sorted(loading["mismatched_keys"]):
        shapes = f"{key} is {tuple(stored)} and not {tuple(expected)}"
        reason = f"The weights of {name} do not fit its config.json: {shapes}."
        raise errors.ServiceError(reason=reason)


def _weights_pattern(folder: Path) -> str:
    if any(folder.glob(hub.SAFE_WEIGHTS)):
        return hub.SAFE_WEIGHTS
    return hub.PICKLES


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
