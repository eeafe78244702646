"""A model with a head of one's own in place of its last layer."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from earmark.core.errors import ServiceError
from workers.scoring import heads
from workers.scoring.embeddings import quantised

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.scoring.model import Limits, Model, ModelCard


@dataclass(eq=False)
class Headed:
    """The model below, with other labels. A `Model`."""

    _base: Model
    _weight: torch.Tensor
    _bias: torch.Tensor
    card: ModelCard
    limits: Limits
    device: str
    dtype: str
    lanes: int

    def batch(
        self, windows: Sequence[np.ndarray], *, embeddings: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        _, vectors = self._base.batch(windows, embeddings=True)
        assert vectors is not None
        # As stored, so that a clip has the scores that its stored vectors give.
        scales, levels = quantised(vectors)
        logits = (scales * levels) @ self._weight.T + self._bias
        return logits, vectors if embeddings else None

    def twin(self) -> Headed:
        other = copy.copy(self)
        other._base = self._base.twin()
        return other


def with_head(base: Model, name: str) -> Headed:
    """Return a model with the head of a folder.

    Raises:
        ServiceError: the folder has none, or it is another model's.
    """
    head, card = heads.load(name), base.card
    head.require(card.sha256, card.name)
    with torch.inference_mode():
        _, vectors = base.batch([np.zeros(card.min_samples, np.float32)], embeddings=True)
    if vectors is None or vectors.shape[1] != head.weight.shape[1]:
        raise ServiceError(reason=f"{card.name} does not give the embeddings that {name} takes.")
    card = replace(card, labels=head.labels, **head.identity(card, name))
    weight, bias = (torch.from_numpy(each).to(base.device) for each in (head.weight, head.bias))
    return Headed(base, weight, bias, card, base.limits, base.device, base.dtype, base.lanes)
