"""A head: a linear classifier over a model's embeddings, in a folder that anybody may have made."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from earmark.core.errors import ServiceError

if TYPE_CHECKING:
    from workers.scoring.model import ModelCard

FACTS, WEIGHTS = "head.json", "head.safetensors"
#: The most bytes of each file, labels, and characters of a label.
MOST_BYTES = {FACTS: 4 * 1024**2, WEIGHTS: 256 * 1024**2}
MOST_LABELS, LONGEST_LABEL = 10_000, 200


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """Scores are the sigmoid of `weight @ unit embedding + bias`, each label by itself."""

    labels: tuple[str, ...]
    #: Shape (labels, dimensions).
    weight: np.ndarray
    bias: np.ndarray
    #: The digest of the model whose embeddings it takes.
    model_sha256: str

    @property
    def sha256(self) -> str:
        """The digest of the model with this head."""
        digest = hashlib.sha256(self.model_sha256.encode())
        digest.update(json.dumps(self.labels).encode())
        digest.update(self.weight.tobytes() + self.bias.tobytes())
        return digest.hexdigest()

    def scores(self, vectors: np.ndarray) -> np.ndarray:
        """Return the scores, shape (windows, labels), of unit vectors."""
        scores: np.ndarray = 1 / (1 + np.exp(-(vectors @ self.weight.T + self.bias)))
        return scores

    def identity(self, card: ModelCard | Any, name: str) -> dict[str, Any]:
        """Return what the model of this card is called once it has this head."""
        return {
            "name": f"{card.name}+{Path(name).name}",
            "sha256": self.sha256,
            "function_to_apply": "sigmoid",
        }

    def require(self, model_sha256: str, model: str) -> None:
        """Raise ServiceError if the head takes the embeddings of another model."""
        if model_sha256 != self.model_sha256:
            raise ServiceError(
                reason=f"The head was trained on another model than this {model}: train it again."
            )


def save(folder: Path, head: Head, facts: dict[str, Any]) -> None:
    """Write a head into a folder, with further facts for people."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"labels": head.labels, "model_sha256": head.model_sha256, **facts}
    (folder / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    save_file({"weight": head.weight, "bias": head.bias}, folder / WEIGHTS)


def load(name: str) -> Head:
    """Return the head in a folder; its files are checked, and hold no code.

    Raises:
        ServiceError: the folder has no head, or one that does not fit together.
    """
    folder = Path(name)
    try:
        for file, most in MOST_BYTES.items():
            if (folder / file).stat().st_size > most:
                raise ServiceError(reason=f"{folder / file} is larger than {most} bytes.")
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        head = Head(
            tuple(facts["labels"]), tensors["weight"], tensors["bias"], str(facts["model_sha256"])
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = f"{folder} is no head that `earmark train` wrote ({error!r}); check --head."
        raise ServiceError(reason=reason) from error
    if not (_are_labels(head.labels) and _fit(head)):
        raise ServiceError(reason=f"The labels and weights of the head in {folder} do not fit.")
    return head


def _are_labels(labels: tuple[Any, ...]) -> bool:
    if not 0 < len(labels) <= MOST_LABELS or len(set(map(str, labels))) < len(labels):
        return False
    return all(
        isinstance(label, str) and label.isprintable() and 0 < len(label) <= LONGEST_LABEL
        for label in labels
    )


def _fit(head: Head) -> bool:
    shapes = head.weight.ndim == 2 and len(head.weight) == len(head.labels)
    if not shapes or head.bias.shape != (len(head.labels),):
        return False
    arrays = (head.weight, head.bias)
    return all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays)
