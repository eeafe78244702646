"""A head: a linear classifier over a model's embeddings, in a folder that anybody may have made."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from earmark.core.errors import ServiceError

#: The files of a head, and the most bytes that each may have.
FACTS, WEIGHTS = "head.json", "head.safetensors"
MOST_BYTES = {FACTS: 4 * 1024**2, WEIGHTS: 256 * 1024**2}
LONGEST_LABEL = 200


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """Scores are the sigmoid of `weight @ unit embedding + bias`, each label by itself."""

    labels: tuple[str, ...]
    #: Shape (labels, dimensions).
    weight: np.ndarray
    bias: np.ndarray
    #: The digest of the model whose embeddings it takes.
    model_sha256: str

    def scores(self, vectors: np.ndarray) -> np.ndarray:
        """Return the scores, shape (windows, labels), of unit vectors."""
        scores: np.ndarray = 1 / (1 + np.exp(-(vectors @ self.weight.T + self.bias)))
        return scores

    def identity(self, model: str, model_sha256: str, folder: str) -> dict[str, Any]:
        """Return what a model is with this head.

        Raises:
            ServiceError: the head takes the embeddings of another model.
        """
        if model_sha256 != self.model_sha256:
            raise ServiceError(
                reason=f"The head in {folder} is for another model than this {model}: train it"
                " again."
            )
        digest = hashlib.sha256(model_sha256.encode() + json.dumps(self.labels).encode())
        digest.update(self.weight.tobytes() + self.bias.tobytes())
        name = f"{model}+{Path(folder).name}"
        return {"name": name, "sha256": digest.hexdigest(), "function_to_apply": "sigmoid"}


def save(folder: Path, head: Head, facts: dict[str, Any]) -> None:
    """Write a head into a folder, with further facts for people."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"labels": head.labels, "model_sha256": head.model_sha256, **facts}
    (folder / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    save_file({"weight": head.weight, "bias": head.bias}, folder / WEIGHTS)


def load(name: str) -> Head:
    """Return the head in a folder. Its files hold no code, and are checked.

    Raises:
        ServiceError: the folder has no head, or one that does not fit together.
    """
    folder = Path(name)
    try:
        for file, most in MOST_BYTES.items():
            if (folder / file).stat().st_size > most:
                raise ValueError(f"{file} is larger than {most} bytes")  # noqa: TRY301
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        arrays = load_file(folder / WEIGHTS)
        head = Head(tuple(facts["labels"]), arrays["weight"], arrays["bias"], facts["model_sha256"])
        _check(head)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = f"{folder} is no head that `earmark train` wrote ({error}); check --head."
        raise ServiceError(reason=reason) from error
    return head


def _check(head: Head) -> None:
    for label in head.labels:
        if not label.isprintable() or not 0 < len(label) <= LONGEST_LABEL:
            raise ValueError("a label is no printable text")
    count = len(set(head.labels))
    shapes = len(head.labels), len(head.weight), head.bias.shape, head.weight.ndim
    if not count or shapes != (count, count, (count,), 2):
        raise ValueError("its labels and weights do not fit")
    for array in (head.weight, head.bias):
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise ValueError("its weights are not float32 numbers")
