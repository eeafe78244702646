"""The processor time of a process and its children, and their memory from second to second."""

from __future__ import annotations

import ctypes
import sys
import threading

import psutil

LOOK_S = 1.0
PR_SET_CHILD_SUBREAPER = 36


def adopt_daemons() -> None:
    """Count PostgreSQL too: what `pg_ctl` starts becomes a child of this process (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_s(pid: int) -> float:
    """Return the processor seconds of a process and its children, ended ones included."""
    seconds = 0.0
    for process in family(pid):
        try:
            seconds += sum(process.cpu_times()[:4])
        except psutil.Error:
            continue
    return seconds


def held_mb(pid: int) -> float:
    """Return the memory of a process and its children; pages they share count once."""
    held = 0
    for process in family(pid):
        try:
            held += process.memory_full_info().pss
        except psutil.Error:
            continue
    return held / 2**20


class Memory:
    """Measures the memory of a process and its children every second while the block runs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.held_mb: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    def __enter__(self) -> Memory:
        self.held_mb.append(held_mb(self._pid))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _go_on(self) -> None:
        while not self._over.wait(LOOK_S):
            self.held_mb.append(held_mb(self._pid))
