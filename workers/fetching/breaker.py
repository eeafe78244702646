"""Outcomes of downloads, in; whether the network itself seems down, out."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from earmark.core.errors import ClipError

#: What a missing network looks like; everything else was said by a server that was reached.
NETWORK_CODES = ("dns", "connect")
NEARLY_ALL = 0.9
LONGEST_PAUSE_S = 120.0


class Breaker:
    """Open while nearly all of the last downloads, from many hosts, found no network; shared by a worker's threads."""

    def __init__(
        self,
        window: int = 20,
        *,
        hosts: int = 5,
        pause_s: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hosts = hosts
        self._shortest_s = self._pause_s = pause_s
        self._clock = clock
        self._lock = threading.Lock()
        self._last: deque[str | None] = deque(maxlen=window)
        self._opened_until = 0.0

    @property
    def open(self) -> bool:
        """Whether to take no work; after each pause it closes for a try, and a failure opens it for twice as long."""
        return self._clock() < self._opened_until

    def record(self, host: str, error: ClipError | None) -> None:
        """Count the end of one download."""
        failed = error is not None and error.code in NETWORK_CODES
        with self._lock:
            if self._opened_until and not failed:
                self._last.clear()
                self._opened_until, self._pause_s = 0.0, self._shortest_s
            self._last.append(host if failed else None)
            if self._network_is_down() and not self.open:
                self._opened_until = self._clock() + self._pause_s
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _network_is_down(self) -> bool:
        failed = [host for host in self._last if host is not None]
        enough = len(self._last) == self._last.maxlen and len(failed) >= NEARLY_ALL * len(
            self._last
        )
        return enough and len(set(failed)) >= self._hosts
