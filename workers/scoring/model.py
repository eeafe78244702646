"""What a model is: what every kind of checkpoint has and does, its card, its limits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch


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
    #: As the checkpoint's card states it.
    license: str | None = None
    #: Seconds between windows unless the run says otherwise; None: they are side by side.
    hop_s: float | None = None

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
class Model(ABC):
    """A checkpoint on its device. `classifier.load` makes one, by the kind of its files.

    One thread at a time may use it; each further thread needs a `twin`.
    """

    card: ModelCard
    limits: Limits
    device: str
    dtype: str
    #: How many threads may score at once, each with a twin.
    lanes: int

    @abstractmethod
    def batch(
        self, windows: Sequence[np.ndarray], *, embeddings: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Score windows, each float32 of shape (samples,), that `limits` allow in one batch.

        Return logits, shape (windows, labels), and if they are wanted embeddings, shape
        (windows, dimensions), both float32 on the device. A model without embeddings returns None.
        It may raise any error: the classifier tells which windows it concerns.
        """

    @abstractmethod
    def twin(self) -> Model:
        """Return a model for another thread, with the same weights."""
