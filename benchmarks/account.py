"""What a process tree and a GPU do meanwhile: processor seconds by process and thread, GPU busy."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

LOOK_S = 0.25
#: What the command line of a process holds, and what the process is then.
KINDS = {
    "workers.decoding": "decoders",
    "workers.loading": "loaders",
    "valkey": "valkey",
    "bin/postgres": "postgres",
    "postgres:": "postgres",
    " worker": "worker",
}
#: Whose threads are told apart.
BY_THREAD = ("worker", "loaders")
THREAD = "thread: "


class Account:
    """Samples a process tree and the GPU, four times a second, while the block runs."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._cpu: list[tuple[float, dict[str, float]]] = []
        self._busy: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._sample, daemon=True)]
        self._smi: subprocess.Popen[str] | None = None

    def __enter__(self) -> Account:
        if program := shutil.which("nvidia-smi"):
            query = "--query-gpu=utilization.gpu --format=csv,noheader,nounits -lms 250"
            self._smi = subprocess.Popen(
                [program, *query.split()], stdout=subprocess.PIPE, text=True
            )
            self._threads.append(threading.Thread(target=self._watch_gpu, daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._smi:
            self._smi.terminate()
        for thread in self._threads:
            thread.join()

    def cpu_ms(
        self, begin: float, end: float, done_at: Callable[[float], float]
    ) -> dict[str, float]:
        """Return processor milliseconds a clip, by process and by thread, between two times."""
        within = [sample for sample in self._cpu if begin <= sample[0] <= end]
        if len(within) < 2:
            within = [self._cpu[0], self._cpu[-1]]
        (first_s, first), (last_s, last) = within[0], within[-1]
        clips = done_at(last_s) - done_at(first_s)
        # A thread or process that ended meanwhile is left out: its account went with it.
        return {name: 1000 * (last[name] - first.get(name, 0.0)) / clips for name in last}

    def busy(self, begin: float, end: float) -> float | None:
        """Return the share of the time in which the GPU was busy; None without nvidia-smi."""
        within = [share for at, share in self._busy if begin <= at <= end]
        return float(np.mean(within)) / 100 if within else None

    def _sample(self) -> None:
        while True:
            self._cpu.append((time.time(), cpu_s(self._pids)))
            if self._over.wait(LOOK_S):
                break
        self._cpu.append((time.time(), cpu_s(self._pids)))

    def _watch_gpu(self) -> None:
        assert self._smi is not None
        assert self._smi.stdout is not None
        for line in self._smi.stdout:
            with suppress(ValueError):
                self._busy.append((time.time(), float(line)))


def cpu_s(pids: list[int]) -> dict[str, float]:
    """Return the processor seconds of processes and their children, by kind and by thread."""
    spent: dict[str, float] = defaultdict(float)
    for pid in pids:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(psutil.Error):
                kind = _kind(process, pid)
                spent[kind] += sum(process.cpu_times()[:2])
                if kind in BY_THREAD:
                    _add_threads(process, kind, spent)
    return spent


def _kind(process: psutil.Process, root: int) -> str:
    command = " ".join(process.cmdline())
    for words, kind in KINDS.items():
        if words in command:
            return kind
    return "main" if process.pid == root else "children"


def _add_threads(process: psutil.Process, kind: str, spent: dict[str, float]) -> None:
    for thread in process.threads():
        with suppress(OSError):
            comm = Path(f"/proc/{process.pid}/task/{thread.id}/comm").read_text().strip()
            name = comm.rstrip("0123456789_-()") or comm
            spent[f"{THREAD}{kind}: {name}"] += thread.user_time + thread.system_time
