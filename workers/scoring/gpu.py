"""The memory of a GPU in use, and the share of time it is busy."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Usage:
    """Memory in bytes, used by any process, and the share of the time that the GPU was busy."""

    used_bytes: int
    total_bytes: int
    #: None if nvidia-ml-py is not installed or finds no driver.
    busy: float | None


def usage(device: str) -> Usage:
    """Return the current use of a CUDA device such as `cuda:0`."""
    free, total = torch.cuda.mem_get_info(device)
    try:
        busy = torch.cuda.utilization(device) / 100
    except (ModuleNotFoundError, RuntimeError):
        busy = None
    return Usage(total - free, total, busy)
