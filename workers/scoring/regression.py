"""The regression head that popular checkpoints have and transformers lacks."""

from __future__ import annotations

from typing import Any

import torch

#: The weights that such a checkpoint has in place of those that transformers expects.
_OWN = {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"}
_EXPECTED = {"projector.weight", "projector.bias", "classifier.weight", "classifier.bias"}


class RegressionHead(torch.nn.Module):
    """Turns the mean of the encoder's frames into values: dense, tanh, projection."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = torch.nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, mean: torch.Tensor) -> torch.Tensor:
        """Return values, shape (windows, labels)."""
        values: torch.Tensor = self.out_proj(torch.tanh(self.dense(mean)))
        return values


def is_regression(config: Any, loading: dict[str, Any]) -> bool:
    """Return whether a checkpoint has exactly this head, by what transformers says of its keys."""
    means = getattr(config, "pooling_mode", "mean") == "mean"
    own = {f"classifier.{name}" for name in _OWN}
    exactly = set(loading["unexpected_keys"]) == own and set(loading["missing_keys"]) == _EXPECTED
    return exactly and means and getattr(config, "problem_type", None) == "regression"


def with_head(kind: Any) -> Any:
    """Return an architecture of transformers with this head; it has projector and classifier."""

    class Regression(kind):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.projector = torch.nn.Identity()
            self.classifier = RegressionHead(config)

    return Regression
