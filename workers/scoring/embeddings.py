"""A batch's embeddings in, vectors as they are stored out; on the device."""

from __future__ import annotations

import torch

from earmark.core.vectors import LEVELS

#: Vectors leave the device among float32 scores: four bytes each.
_BYTES_OF_FLOAT = 4


def quantised(embeddings: torch.Tensor) -> torch.Tensor:
    """Return the bytes of vectors, shape (windows, dimensions)."""
    largest = embeddings.abs().amax(dim=1, keepdim=True).clamp_(min=1e-30)
    return (embeddings / largest * LEVELS).round_().to(torch.int8)


def as_stored(embeddings: torch.Tensor) -> torch.Tensor:
    """Return the unit vectors that are read later."""
    return torch.nn.functional.normalize(quantised(embeddings).float(), dim=1)


def packed(embeddings: torch.Tensor) -> torch.Tensor:
    """Return stored vectors as float32 bit patterns, with zeros up to a whole number of them."""
    levels = quantised(embeddings)
    padded = torch.nn.functional.pad(levels, (0, -levels.shape[1] % _BYTES_OF_FLOAT))
    return padded.view(torch.float32)
