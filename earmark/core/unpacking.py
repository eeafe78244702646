"""Starts the process that reads a container, with nothing of ours but the container itself."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from earmark.core.processes import bare_environment

if TYPE_CHECKING:
    import socket
    from io import FileIO

PROGRAM = (sys.executable, "-P", "-m", "earmark.core.container_child")


def index(kind: str, size: int, container: FileIO | socket.socket) -> subprocess.Popen[bytes]:
    """Start a process that tells the members of a container on its standard output."""
    return _start("index", kind, size, container.fileno(), subprocess.PIPE)


def unpack(packing: str, most_bytes: int, container: FileIO, out: FileIO) -> bool:
    """Write a container's bytes unpacked to a file; return whether all of them were written."""
    process = _start("unpack", packing, most_bytes, container.fileno(), out.fileno())
    return process.wait() == 0


def _start(work: str, kind: str, number: int, stdin: int, stdout: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*PROGRAM, work, kind, str(number)],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        env={"POLARS_MAX_THREADS": "1", **bare_environment()},
        cwd="/",
    )
