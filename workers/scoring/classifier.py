"""Windows in, scores out: a model behind its batches, errors and best labels."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from earmark.core import errors, settings
from workers.scoring import embeddings, heads, hub, onnx, pretrained, reference_clip
from workers.scoring.best_labels import BEST, Embedded
from workers.scoring.onnx_description import Described

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workers.scoring.best_labels import Outcome
    from workers.scoring.model import Model

logger = logging.getLogger(__name__)

#: What an error of a device without memory says; cuBLAS and cuDNN have words of their own.
_NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "Failed to allocate memory")


class Classifier:
    """A model on its device, with batches that fit and errors that concern one clip.

    Create it with `load`, and put a `Batcher` in front of it: one thread at a time may use a
    classifier, and each further thread (lane) needs a `twin`. Windows are float32 arrays, shape
    (samples,), at the card's sample rate and at least `card.min_samples` long.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.card, self.limits = model.card, model.limits
        self.device, self.dtype, self.lanes = model.device, model.dtype, model.lanes
        #: From unit embeddings to logits, in place of the model's last layer.
        self.head: Callable[[torch.Tensor], torch.Tensor] | None = None

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
        self,
        windows: Sequence[np.ndarray],
        function_to_apply: str = "none",
        top_k: int = 0,
        *,
        embedded: bool = False,
    ) -> list[Outcome]:
        """Score one batch: return for each window its scores, shape (labels,), or its error.

        With `top_k`, return the best labels of each window only: an array of `best_labels.BEST`.
        With `embedded`, return `best_labels.Embedded`: the scores with the window's embedding.
        A batch that fails is halved, so that no window fails because of a neighbour.
        """
        try:
            return self._scores(windows, function_to_apply, top_k, embedded=embedded)
        except Exception as error:  # any error of a model fails one clip, never the worker
            failure = _translated(error)
        if isinstance(failure, errors.OutOfMemory):
            self._make_room(windows)
        if len(windows) == 1:
            return [failure]
        half = len(windows) // 2
        return [
            *self.outcomes(windows[:half], function_to_apply, top_k, embedded=embedded),
            *self.outcomes(windows[half:], function_to_apply, top_k, embedded=embedded),
        ]

    @torch.inference_mode()
    def _scores(
        self, windows: Sequence[np.ndarray], function_to_apply: str, top_k: int, *, embedded: bool
    ) -> list[Outcome]:
        logits, vectors = self._forward(windows, embedded=embedded)
        # 0 for a window whose logits are all finite, else NaN.
        check = (logits * 0).sum(dim=1, keepdim=True)
        wanted = [apply(logits, function_to_apply)]
        if top_k:
            # `topk` would be faster, but it does not keep the order of equal scores.
            ranked, labels = wanted[0].sort(dim=1, descending=True, stable=True)
            wanted = [ranked[:, :top_k], labels[:, :top_k].float()]
        count = wanted[0].shape[1]
        width = 1 + count * len(wanted)
        if vectors is not None:
            wanted.append(embeddings.packed(vectors))
        # One copy for all: a second one would wait for the batch of the other lane.
        packed = torch.cat([check, *wanted], dim=1).cpu().numpy()
        scores = packed[:, 1:width]
        if top_k:
            scores = _best(scores[:, :count], scores[:, count:])
        outcomes: list[Outcome] = [*scores]
        if vectors is not None:
            stored = [row.tobytes()[: vectors.shape[1]] for row in packed[:, width:]]
            outcomes = list(map(Embedded, scores, stored))
        return _checked(outcomes, packed[:, 0])

    def _forward(
        self, windows: Sequence[np.ndarray], *, embedded: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        needed = embedded or self.head is not None
        logits, vectors = self._model.batch(windows, embeddings=needed)
        if needed and vectors is None:
            raise errors.ModelError(reason=f"{self.card.name} gives no embeddings")
        if self.head is not None and vectors is not None:
            logits = self.head(embeddings.as_stored(vectors))
        return logits, vectors if embedded else None

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

    def silent_outcome(self) -> Outcome:
        """Score the shortest window of silence, which only a broken model or device cannot."""
        return self.outcomes([np.zeros(self.card.min_samples, np.float32)])[0]

    def twin(self) -> Classifier:
        """Return a classifier for another thread, with the same weights."""
        other = copy.copy(self)
        other._model = self._model.twin()
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


def _checked(outcomes: list[Outcome], check: np.ndarray) -> list[Outcome]:
    """Replace the scores of windows whose logits are not all numbers by an error."""
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


def load(model: settings.Model, labels: Sequence[str] = (), head: str | None = None) -> Classifier:
    """Load a model and score one window of silence with it.

    Args:
        labels: for a zero-shot model.
        head: the folder of a head in place of the model's last layer.

    Raises:
        ServiceError: the model, the device or the dtype is not available; it names the cure.
    """
    classifier = _classifier(model, labels)
    if head:
        _put_on(classifier, heads.load(head), head)
    _warm_up(classifier)
    return classifier


def _classifier(model: settings.Model, labels: Sequence[str]) -> Classifier:
    """Load a model by the kind of its files."""
    folder, commit = hub.locate(model.name, model.revision)
    if not hub.is_described(folder):
        return Classifier(pretrained.load(model, folder, commit, labels))
    hub.check_labels(model.name, labels, zero_shot=False)
    described = Described(model.name, folder, commit)
    classifier = Classifier(onnx.load(model, described))
    reference_clip.check(described, classifier.card, classifier.outcomes)
    return classifier


def _put_on(classifier: Classifier, head: heads.Head, folder: str) -> None:
    card = classifier.card
    identity = head.identity(card.name, card.sha256, folder)
    classifier.card = replace(card, labels=head.labels, **identity)
    weight, bias = (
        torch.from_numpy(each).to(classifier.device) for each in (head.weight, head.bias)
    )
    classifier.head = partial(torch.nn.functional.linear, weight=weight, bias=bias)


def _warm_up(classifier: Classifier) -> None:
    outcome = classifier.silent_outcome()
    if isinstance(outcome, errors.ClipError):
        name, device = classifier.card.name, classifier.device
        reason = f"{name} cannot score a window of silence on {device}: {outcome}"
        raise errors.ServiceError(reason=reason) from outcome
