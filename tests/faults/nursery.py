"""Starts the real command line fast: each process is forked from one with all heavy imports."""

from __future__ import annotations

import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

HOOKS = Path(__file__).with_name("hooks")
APPENDING = os.O_WRONLY | os.O_CREAT | os.O_APPEND


class Nursery:
    """The process that children are forked from; lines in are requests, lines out are answers."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.faults.nursery"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start_worker(self, folder: Path, environment: Mapping[str, str]) -> psutil.Process:
        """Start `earmark worker` in its own process group; its output goes to `worker.log`."""
        log = folder / "worker.log"
        child = self.start(
            "worker",
            folder=folder,
            environment=environment,
            files=[Path(os.devnull), log, log],
            group=True,
        )  # fmt: skip
        return psutil.Process(child.pid)

    def start(
        self,
        *words: str,
        folder: Path,
        environment: Mapping[str, str],
        files: Sequence[Path],
        group: bool = False,
    ) -> Child:
        """Start `earmark` with these words, its standard streams being these files."""
        names = [str(file) for file in files]
        pid = self._ask(
            words=words, folder=str(folder), environment=dict(environment), files=names, group=group
        )
        return Child(self, pid, files)

    def status(self, pid: int) -> int | None:
        """Return a child's exit status, as subprocess does; None while it runs."""
        return self._ask(status_of=pid)

    def _ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        # It forks and keeps nothing, so nothing has to end in order. It may still be importing.
        self._process.kill()
        self._process.communicate()


class Child:
    """A process of the nursery, with what the tests use of a `subprocess.Popen`."""

    def __init__(self, nursery: Nursery, pid: int, files: Sequence[Path]) -> None:
        self._nursery = nursery
        self._files = files
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._nursery.status(self.pid)
        return self.returncode

    def communicate(self, timeout: float = math.inf) -> tuple[bytes, bytes]:
        """Wait for the end; return what was written."""
        self.wait(timeout)
        return self._files[1].read_bytes(), self._files[2].read_bytes()

    def wait(self, timeout: float = math.inf) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("earmark", timeout)
            time.sleep(0.02)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def main() -> None:
    _import_what_is_heavy()
    ended: dict[int, int] = {}
    signal.signal(signal.SIGCHLD, lambda *_: ended.update(_reaped()))
    for line in sys.stdin:
        question = json.loads(line)
        if "status_of" in question:
            answer = ended.get(question["status_of"])
        else:
            answer = os.fork()
            if not answer:
                _become_earmark(**question)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _reaped() -> Iterator[tuple[int, int]]:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            yield pid, os.waitstatus_to_exitcode(status)


def _import_what_is_heavy() -> None:
    import torch

    from db import browse, query, results, schema  # noqa: F401
    from earmark import cli, output, progress  # noqa: F401
    from earmark.core.settings import Model
    from workers import quarantine  # noqa: F401
    from workers.scoring import classifier

    # Without a thread to leave behind, a fork is a whole process.
    torch.set_num_threads(1)
    classifier.load(Model(threads=1))


def _become_earmark(
    words: list[str], folder: str, environment: dict[str, str], files: list[str], group: bool
) -> None:
    import torch

    from earmark import cli

    # A fork leaves torch's thread pool broken; it is mended here, where no threads can race for it.
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if group:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, (file, flags) in enumerate(
        zip(files, (os.O_RDONLY, *[APPENDING] * 2), strict=True)
    ):
        os.dup2(os.open(file, flags), descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    runpy.run_path(str(HOOKS / "sitecustomize.py"))
    sys.argv = ["earmark", *words]
    status: Any = 1
    try:
        cli.main()
        status = 0
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status or 0)


if __name__ == "__main__":
    main()
