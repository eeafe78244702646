"""How much of a GPU is in use."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Usage:
    """Memory in bytes, used by any process, and the share of the time that the GPU was busy."""

    used_bytes: int
    total_bytes: int
    #: None where nvidia-ml-py is not installed, or finds no driver.
    busy: float | None


def usage(device: str) -> Usage:
    """Return the use of a CUDA device such as `cuda:0`, at this moment."""
    free, total = torch.cuda.mem_get_info(device)
    try:
        busy = torch.cuda.utilization(device) / 100
    except (ModuleNotFoundError, RuntimeError):
        busy = None
    return Usage(total - free, total, busy)
