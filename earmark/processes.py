"""Child processes that leave nothing behind."""

from __future__ import annotations

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(how: int = signal.SIGTERM) -> None:
    """Have the system send this process a signal when its parent ends, even by a kill; Linux only, else do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, how)
