"""The memory of a GPU in use, and the share of time it is busy."""

from __future__ import annotations

import torch


def usage(device: str) -> tuple[int, int, float | None]:
    """Return the bytes of a CUDA device that all processes use, all its bytes, and how busy it is.

    That is a share of the time; None if nvidia-ml-py is not installed or finds no driver.
    """
    free, total = torch.cuda.mem_get_info(device)
    try:
        busy = torch.cuda.utilization(device) / 100
    except (ModuleNotFoundError, RuntimeError):
        busy = None
    return total - free, total, busy
