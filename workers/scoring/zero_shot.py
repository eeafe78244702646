"""A CLAP model and a run's labels in, a classifier with these labels out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The sentence `pipeline("zero-shot-audio-classification")` compares the sound with.
_SENTENCE = "This is a sound of {}."


class ZeroShot(torch.nn.Module):
    """Scores audio against the text features of the labels, which are computed once."""

    def __init__(self, clap: Any, tokenizer: Any, labels: Sequence[str]) -> None:
        super().__init__()
        self.audio_model = clap.audio_model
        self.audio_projection = clap.audio_projection
        self.head = Comparison(_text_features(clap, tokenizer, labels), clap.logit_scale_a)

    def forward(self, **inputs: torch.Tensor) -> SimpleNamespace:
        """Return `logits`, shape (windows, labels), as an audio-classification model does."""
        audio = _unit(self.audio_projection(self.audio_model(**inputs).pooler_output))
        return SimpleNamespace(logits=self.head(audio))


class Comparison(torch.nn.Module):
    """Compares unit audio features, which are the embeddings, with those of texts."""

    text: torch.Tensor  # (labels, features)

    def __init__(self, text: torch.Tensor, scale: torch.nn.Parameter) -> None:
        super().__init__()
        self.out_features = len(text)
        self.scale = scale
        self.register_buffer("text", text)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """Return logits, shape (windows, labels)."""
        return audio @ self.text.T * self.scale.exp()


def _text_features(clap: Any, tokenizer: Any, labels: Sequence[str]) -> torch.Tensor:
    tokens = tokenizer(
        [_SENTENCE.format(label) for label in labels], return_tensors="pt", padding=True
    )
    with torch.inference_mode():
        return _unit(clap.text_projection(clap.text_model(**tokens).pooler_output))


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features, dim=-1)
