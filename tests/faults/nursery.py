"""Starts the real command line fast: each process is forked from one with all heavy imports."""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

from earmark import children
from earmark.core.processes import end_with_parent
from tests.shared import locked
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
#: A request has the environment of a child.
LONGEST_PACKET = 2**17
MOST_DESCRIPTORS = 8
#: Its first client comes at once.
LONGEST_UNUSED_S = 60


class Nursery:
    """The process that children are forked from; each packet is a request, or its answer."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
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
        with ExitStack() as opened:
            descriptors = []
            for file, flags in zip(files, (os.O_RDONLY, APPENDING, APPENDING), strict=True):
                descriptors.append(os.open(file, flags))
                opened.callback(os.close, descriptors[-1])
            child = self.start_with(
                descriptors, *words, folder=folder, environment=environment, group=group
            )
        child.files = files
        return child

    def start_with(
        self,
        descriptors: Sequence[int],
        *words: str,
        folder: Path,
        environment: Mapping[str, str],
        group: bool = False,
        longest_file: int | None = None,
    ) -> Child:
        """Start `earmark` with these standard streams; a longer file cannot be written."""
        pid = self._ask(
            descriptors,
            words=words,
            folder=str(folder),
            environment=dict(environment),
            group=group,
            longest_file=longest_file,
        )
        return Child(self, pid)

    def start_loader(self, *descriptors: int) -> Child:
        """Start a loader with copies of these descriptors."""
        return Child(self, self._ask(descriptors, loader=True))

    def status(self, pid: int) -> int | None:
        """Return a child's exit status, as subprocess does; None while it runs."""
        return self._ask(status_of=pid)

    def descendants(self) -> list[psutil.Process]:
        """Return the processes that were forked for us and still run, and theirs."""
        return psutil.Process(self._ask(who=True)).children(recursive=True)

    def _ask(self, descriptors: Sequence[int] = (), **question: Any) -> Any:
        with self._asking:
            socket.send_fds(self.connection, [json.dumps(question).encode()], descriptors)
            return json.loads(self.connection.recv(LONGEST_PACKET))


@contextmanager
def running_nursery(folder: Path) -> Iterator[Nursery]:
    """Yield the nursery of this folder, which ends with the last block that uses it."""
    address = str(folder / "nursery")
    with locked(folder / "nursery.lock"):
        try:
            nursery = _connected(address)
        except OSError:
            # It goes to the background when it is ready.
            subprocess.run([sys.executable, "-m", "tests.faults.nursery", address], check=True)
            nursery = _connected(address)
    with nursery.connection:
        yield nursery


def _connected(address: str) -> Nursery:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(address)
        nursery = Nursery(connection)
        # It may be about to end with its last client.
        nursery.descendants()
    except (OSError, ValueError) as error:
        connection.close()
        raise ConnectionError(address) from error
    return nursery


class Child:
    """A process of the nursery, with what the tests use of a `subprocess.Popen`."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery = nursery
        self.files: Sequence[Path] = ()
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._nursery.status(self.pid)
        return self.returncode

    def communicate(self, timeout: float = math.inf) -> tuple[bytes, bytes]:
        """Wait for the end; return what was written."""
        self.wait(timeout)
        return self.files[1].read_bytes(), self.files[2].read_bytes()

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
    """Answer on a socket at this address, in the background."""
    _import_what_is_heavy()
    address = sys.argv[1]
    Path(address).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    listener.settimeout(LONGEST_UNUSED_S)
    if not os.fork():
        _serve(listener)


def _serve(listener: socket.socket) -> NoReturn:
    """Fork a nursery for each client, until the last of them is gone."""
    clients: set[int] = set()

    def end_with_the_last(*_: Any) -> None:
        clients.difference_update(dict(_reaped()))
        if not clients:
            os._exit(0)

    signal.signal(signal.SIGCHLD, end_with_the_last)
    with suppress(TimeoutError):
        while True:
            connection = listener.accept()[0]
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
            clients.add(os.fork())
            if 0 in clients:
                listener.close()
                _answer_all(connection)
            connection.close()
            listener.settimeout(None)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    os._exit(0)


def _answer_all(connection: socket.socket) -> NoReturn:
    ended: dict[int, int] = {}
    signal.signal(signal.SIGCHLD, lambda *_: ended.update(_reaped()))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    here = os.getpid()
    while True:
        try:
            asked = socket.recv_fds(connection, LONGEST_PACKET, MOST_DESCRIPTORS)
        except ConnectionResetError:  # who asked has ended before it read an answer
            os._exit(0)
        packet, descriptors, _, _ = asked
        if not packet:
            os._exit(0)
        question = json.loads(packet)
        if "status_of" in question:
            answer = ended.get(question["status_of"])
        elif "who" in question:
            answer = here
        else:
            answer = os.fork()
            if not answer:
                connection.close()
                _become(here, descriptors, **question)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(json.dumps(answer).encode())


def _become(parent: int, descriptors: list[int], loader: bool = False, **earmark: Any) -> NoReturn:
    if loader:
        _become_loader(parent, descriptors)
    end_with_parent(parent)
    _become_earmark(descriptors, **earmark)


def _fork_nursery() -> Nursery:
    """Return a nursery that is forked from this process, and ends with it."""
    here = os.getpid()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if not os.fork():
        end_with_parent(here, signal.SIGKILL)
        ours.close()
        _answer_all(theirs)
    theirs.close()
    return Nursery(ours)


def forking(nursery: Nursery) -> Callable[..., Any]:
    """Return a `children.start` that forks workers: each would import torch for 4 s."""
    start = children.start

    def start_or_fork(command: list[str], log: Path, environment: Any = None) -> Any:
        if tuple(command) != (*children.EARMARK, "worker"):
            return start(command, log, environment)
        files = [Path(os.devnull), log, log]
        return nursery.start(
            "worker", folder=Path.cwd(), environment=environment, files=files, group=True
        )

    return start_or_fork


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
    descriptors: list[int],
    words: list[str],
    folder: str,
    environment: dict[str, str],
    group: bool,
    longest_file: int | None,
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
    if longest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest_file, longest_file))
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    # A fork of this process may come here again, and must not close the new files with the old.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    runpy.run_path(str(HOOKS / "sitecustomize.py"))
    if words[0] in STARTS_WORKERS:
        children.start = forking(_fork_nursery())
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
