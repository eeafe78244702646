"""The device and the number format that a model computes with."""

from __future__ import annotations

import ctypes
import logging
import sys

import torch

from earmark.core import errors, settings
from workers.scoring.model import Limits

logger = logging.getLogger(__name__)

#: What a batch may hold at most: padded seconds of audio, and windows.
_GPU_BATCH_S, _GPU_BATCH_WINDOWS = 640.0, 64
CPU_BATCH_S, _CPU_BATCH_WINDOWS = 10.0, 8

#: glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, with values at which a lane keeps its memory.
_MALLOC = ((-3, 32 * 1024**2), (-1, 256 * 1024**2))


def lanes_on(model: settings.Model, device: torch.device) -> int:
    """Return how many threads may score at once."""
    if device.type == "cpu":
        return model.threads or settings.cores()
    return 2 if device.type == "cuda" else 1


def batch_limits(
    model: settings.Model, device: torch.device, rate: int, cpu_batch_s: float = CPU_BATCH_S
) -> Limits:
    """Return what a batch may hold at most, of windows of one length."""
    windows, seconds = _GPU_BATCH_WINDOWS, _GPU_BATCH_S
    if device.type == "cpu":
        windows, seconds = _CPU_BATCH_WINDOWS, cpu_batch_s
    return Limits(model.batch_windows or windows, (model.batch_s or seconds) * rate, padding=1.0)


def pick_device(name: str) -> torch.device:
    """Return the named device, or with `auto` the best available one.

    Raises:
        ServiceError: the device is unknown or missing; another one is never taken instead.
    """
    if name == "auto":
        best = _best_device()
        logger.info("device auto: %s", best, extra={"action": "device_chosen"})
        return torch.device(best)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        reason = f"EARMARK_MODEL__DEVICE is {name}; it may be auto, cpu, cuda, cuda:1 or mps."
        raise errors.ServiceError(reason=reason) from error
    _require_present(device)
    return device


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def _require_present(device: torch.device) -> None:
    present = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if (device.index or 0) >= present.get(device.type, 0):
        cure = "set it to auto or cpu, or install PyTorch and a driver for the device"
        reason = (
            f"EARMARK_MODEL__DEVICE asks for {device}, which PyTorch does not find here: {cure}."
        )
        raise errors.ServiceError(reason=reason)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the named dtype; `auto` is bfloat16 on CUDA that computes in it, else float32.

    On a CPU, bfloat16 was measured to be 1.7 times slower.

    Raises:
        ServiceError: the dtype is unknown.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if name not in known:
        reason = f"EARMARK_MODEL__DTYPE is {name}; it may be auto, {', '.join(known)}."
        raise errors.ServiceError(reason=reason)
    return known[name]


def keep_memory() -> None:
    """Let glibc keep freed memory: giving it back and taking it again costs small models 7%."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, value in _MALLOC:
            libc.mallopt(parameter, value)


def use_one_thread() -> None:
    """Compute with one thread, as each lane of a CPU does."""
    torch.set_num_threads(1)


def set_precision(device: torch.device) -> None:
    """Compute float32 in full precision: TensorFloat-32 keeps 3 digits of a log-mel or a logit."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
