"""A batch's embeddings in, vectors as they are stored out; on the device."""

from __future__ import annotations

import torch

from earmark.core.vectors import LEVELS

#: Vectors leave the device among float32 scores: four bytes each.
_BYTES_OF_FLOAT = 4


def quantised(embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales, shape (windows, 1), and the bytes of unit vectors: their product."""
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    scales = unit.abs().amax(dim=1, keepdim=True).clamp_(min=1e-30) / LEVELS
    return scales, (unit / scales).round_().to(torch.int8)


def packed(embeddings: torch.Tensor) -> torch.Tensor:
    """Return stored vectors as float32 bit patterns, with zeros up to a whole number of them."""
    scales, levels = quantised(embeddings)
    padded = torch.nn.functional.pad(levels, (0, -levels.shape[1] % _BYTES_OF_FLOAT))
    return torch.cat([scales, padded.view(torch.float32)], dim=1)
