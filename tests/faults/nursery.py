"""Starts the real command line fast: each process is forked from one with all heavy imports."""

from __future__ import annotations

import ctypes
import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import psutil

from earmark import children
from earmark.core.processes import end_with_parent
from workers.loading import loader, process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

HOOKS = Path(__file__).with_name("hooks")
#: Verbs that start workers.
STARTS_WORKERS = ("demo", "run", "up")
#: The name of a loader's process.
LOADER = "loader"
PR_SET_NAME = 15
APPENDING = os.O_WRONLY | os.O_CREAT | os.O_APPEND


class Nursery:
    """The process that children are forked from; lines in are requests, lines out are answers."""

    def __init__(
        self, requests: IO[str], answers: IO[str], descriptors: socket.socket | None = None
    ) -> None:
        self._requests, self._answers, self._descriptors = requests, answers, descriptors
        self._asking = threading.Lock()

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

    def start_loader(self, *descriptors: int) -> Child:
        """Start a loader with copies of these descriptors."""
        assert self._descriptors is not None
        socket.send_fds(self._descriptors, [b"!"], descriptors)
        return Child(self, self._ask(loader=len(descriptors)), [])

    def status(self, pid: int) -> int | None:
        """Return a child's exit status, as subprocess does; None while it runs."""
        return self._ask(status_of=pid)

    def _ask(self, **question: Any) -> Any:
        with self._asking:
            self._requests.write(json.dumps(question) + "\n")
            self._requests.flush()
            return json.loads(self._answers.readline())


@contextmanager
def running_nursery() -> Iterator[Nursery]:
    """Yield a nursery in a process that ends with the block."""
    command = [sys.executable, "-m", "tests.faults.nursery"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Nursery(process.stdin, process.stdout)
    finally:
        # It forks and keeps nothing, so nothing has to end in order. It may still be importing.
        process.kill()
        process.communicate()


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
    _answer_all(sys.stdin, sys.stdout)


def _answer_all(
    requests: IO[str], answers: IO[str], descriptors: socket.socket | None = None
) -> None:
    ended: dict[int, int] = {}
    signal.signal(signal.SIGCHLD, lambda *_: ended.update(_reaped()))
    here = os.getpid()
    for line in requests:
        question = json.loads(line)
        if "status_of" in question:
            answer = ended.get(question["status_of"])
        elif "loader" in question:
            assert descriptors is not None
            received = socket.recv_fds(descriptors, 1, question["loader"])[1]
            answer = os.fork()
            if not answer:
                _become_loader(here, received)
            for descriptor in received:
                os.close(descriptor)
        else:
            answer = os.fork()
            if not answer:
                end_with_parent(here)
                _become_earmark(**question)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _fork_nursery() -> Nursery:
    """Return a nursery that is forked from this process, and ends with it."""
    here = os.getpid()
    requests, ours_to_write = os.pipe()
    ours_to_read, answers = os.pipe()
    ours, descriptors = socket.socketpair()
    if not os.fork():
        end_with_parent(here, signal.SIGKILL)
        ours.close()
        os.close(ours_to_write)
        os.close(ours_to_read)
        _answer_all(os.fdopen(requests), os.fdopen(answers, "w"), descriptors)
        os._exit(0)
    descriptors.close()
    os.close(requests)
    os.close(answers)
    return Nursery(os.fdopen(ours_to_write, "w"), os.fdopen(ours_to_read), ours)


def _fork_workers() -> None:
    """Have the workers of this process forked as well: each would import torch for 4 s."""
    nursery, start = _fork_nursery(), children.start

    def start_or_fork(command: list[str], log: Path, environment: Any = None) -> Any:
        if tuple(command) != (*children.EARMARK, "worker"):
            return start(command, log, environment)
        files = [Path(os.devnull), log, log]
        return nursery.start(
            "worker", folder=Path.cwd(), environment=environment, files=files, group=True
        )

    children.start = start_or_fork


def _become_loader(parent: int, descriptors: list[int]) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.modules["__main__"] = loader  # for the hooks
    sys.argv = [LOADER, str(parent), *map(str, descriptors)]
    ctypes.CDLL(None).prctl(PR_SET_NAME, LOADER.encode())
    _run(loader.main)


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
) -> NoReturn:
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
    # A fork of this process may come here again, and must not close the new files with the old.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    runpy.run_path(str(HOOKS / "sitecustomize.py"))
    if words[0] in STARTS_WORKERS:
        _fork_workers()
    elif words[0] == "worker":
        os.environ["FAULT_WORKER"] = str(os.getpid())
        process._start = _fork_nursery().start_loader  # type: ignore[assignment]
        del os.environ["FAULT_WORKER"]  # those of a quarantine are real, and name theirs
    sys.argv = ["earmark", *words]
    _run(cli.main)


def _run(program: Callable[[], None]) -> NoReturn:
    status: Any = 1
    try:
        program()
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
