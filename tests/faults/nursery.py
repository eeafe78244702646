"""Starts real worker processes in half a second: each is forked from a process that has imported all that is heavy."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping

HOOKS = Path(__file__).with_name("hooks")


class Nursery:
    """The process workers are forked from; a line in says what to run, a line out says its pid."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.faults.nursery"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start_worker(self, folder: Path, environment: Mapping[str, str]) -> psutil.Process:
        """Start `earmark worker`, in a process group of its own, its output going to `worker.log`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"folder": str(folder), "environment": dict(environment)}) + "\n")
        self._process.stdin.flush()
        return psutil.Process(int(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(20)
        self._process.stdout.close()  # type: ignore[union-attr]


def main() -> None:
    _import_what_is_heavy()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that the dead leave nothing behind
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _become_worker(**json.loads(line))
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


def _import_what_is_heavy() -> None:
    import torch

    from earmark.settings import Model
    from workers import classifier, pipeline, sacrifice  # noqa: F401

    # Without a thread to leave behind, a fork is a whole process.
    torch.set_num_threads(1)
    classifier.load(Model(threads=1))


def _become_worker(folder: str, environment: dict[str, str]) -> None:
    from console import cli

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with Path(os.devnull).open() as nothing, Path("worker.log").open("a") as log:
        for stream, descriptor in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(stream.fileno(), descriptor)
    runpy.run_path(str(HOOKS / "sitecustomize.py"))
    sys.argv = ["earmark", "worker"]
    status: Any = 1
    try:
        cli.main()
        status = 0
    except SystemExit as ended:
        status = ended.code
    finally:
        os._exit(status or 0)


if __name__ == "__main__":
    main()
