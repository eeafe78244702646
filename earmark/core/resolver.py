"""Host names in, their addresses out, as the system's resolver knows them."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import Future
from typing import Any

from earmark.core import errors

#: A host that is connected to again within this is not looked up again.
KEPT_S = 5.0
#: Hosts that are remembered.
HOSTS = 1000


class Resolver:
    """Looks hosts up, each at most once in KEPT_S.

    It checks nothing: the caller has to check each address for each connection.
    """

    def __init__(self) -> None:
        self._answers: dict[tuple[str, int], tuple[float, list[Any]]] = {}

    def resolve(self, host: str, port: int, timeout_s: float) -> list[Any]:
        """Return the answer of `getaddrinfo`; raise Dns if there is none."""
        until, answer = self._answers.get((host, port), (0.0, []))
        if time.monotonic() < until:
            return answer
        answer = resolve(host, port, timeout_s)
        if len(self._answers) >= HOSTS:
            self._answers.clear()
        self._answers[host, port] = time.monotonic() + KEPT_S, answer
        return answer


def resolve(host: str, port: int, timeout_s: float) -> list[Any]:
    """Look a host up in a thread: getaddrinfo has no timeout, and may run on after this returns."""
    answer: Future[list[Any]] = Future()

    def ask() -> None:
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="resolver", daemon=True).start()
    try:
        return answer.result(timeout_s)
    except (OSError, UnicodeError):
        raise errors.Dns(host=host) from None
