"""A model's reference clip: a model that scores it otherwise than it says is refused."""

from __future__ import annotations

import math
import wave
from typing import TYPE_CHECKING, Any

import numpy as np

from earmark.core import errors
from workers.scoring import onnx_description

if TYPE_CHECKING:
    from collections.abc import Callable

    from workers.scoring.model import ModelCard
    from workers.scoring.onnx_description import Described

#: Other processors and GPUs round differently, 8-bit graphs by up to a percent. A wrong rate, order
#: of labels or function differs by more.
_RELATIVE, _ABSOLUTE = 1e-2, 1e-3


def check(described: Described, card: ModelCard, outcomes: Callable[..., list[Any]]) -> None:
    """Score the reference clip; raise ServiceError if its scores are not those of earmark.json."""
    content = described.description()
    (scores,) = outcomes([_samples(described, card)], card.function_to_apply)
    if isinstance(scores, errors.ClipError):
        raise described.refused(f"its reference clip cannot be scored: {scores}")
    for label, score in content.scores.items():
        if label not in card.labels:
            raise described.refused(f"the reference names {label}, which is none of its labels")
        found = float(scores[card.labels.index(label)])
        if not math.isclose(found, score, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE):
            raise described.refused(f"it scores {label} with {found:.4f} and not {score:.4f}")


def _samples(described: Described, card: ModelCard) -> np.ndarray:
    """Read the clip: a WAV file of 16 bits and one channel, which needs no decoder."""
    name = described.description().reference
    path = described.file(name, onnx_description.MOST_CLIP)
    try:
        with wave.open(str(path)) as file:
            form = file.getframerate(), file.getnchannels(), file.getsampwidth()
            if form != (card.sample_rate, 1, 2):
                raise described.refused(f"{name} is not mono, of 16 bits and {card.sample_rate} Hz")
            pcm = np.frombuffer(file.readframes(round(card.window_s * card.sample_rate)), "<i2")
    except (wave.Error, EOFError, ValueError) as error:
        raise described.refused(f"{name} is no WAV file of 16 bits: {error}") from error
    samples = pcm.astype(np.float32) / 2**15
    return np.pad(samples, (0, max(0, card.min_samples - len(samples))))
