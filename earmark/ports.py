"""Ports of this machine, and the addresses that lead to them from this machine alone."""

from __future__ import annotations

import socket

from earmark.core.errors import UsageError

LOOPBACK = "127.0.0.1"


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
