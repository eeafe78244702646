"""Child processes that leave nothing behind."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int, how: int = signal.SIGTERM) -> None:
    """Have the system send this process a signal when its parent (pid) ends, even by a kill; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, how)
        if os.getppid() != parent:  # it ended while this process was starting
            os.kill(os.getpid(), how)
