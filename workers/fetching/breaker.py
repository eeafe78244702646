"""A circuit breaker for the worker's own network: results of downloads in, open or closed out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from earmark.core.errors import ClipError

#: Error codes of a missing network. Every other code came from a server that was reached.
NETWORK_CODES = ("dns", "connect")
#: The network is down if nearly all of so many downloads fail, from at least so many hosts.
DOWNLOADS, NEARLY_ALL, HOSTS = 20, 0.9, 5
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 15.0, 120.0


class Breaker:
    """Open while nearly all of the last downloads, from many hosts, failed to find a network.

    Use one per worker process, shared by its threads: `record` every download, and take no chunk
    while `open`. So a worker without a network fails no clips.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._pause_s = SHORTEST_PAUSE_S
        self._clock = clock
        self._lock = threading.Lock()
        #: Of the last downloads: the host if no network was found, else None.
        self._last: deque[str | None] = deque(maxlen=DOWNLOADS)
        self._opened_until = 0.0

    @property
    def open(self) -> bool:
        """Whether to take no work.

        After each pause it closes for a try; another failure opens it for twice as long.
        """
        return self._clock() < self._opened_until

    def record(self, host: str, error: ClipError | None) -> None:
        """Count the end of one download."""
        failed = error is not None and error.code in NETWORK_CODES
        with self._lock:
            if self._opened_until and not failed:
                self._last.clear()
                self._opened_until, self._pause_s = 0.0, SHORTEST_PAUSE_S
            self._last.append(host if failed else None)
            if self._network_is_down() and not self.open:
                self._opened_until = self._clock() + self._pause_s
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _network_is_down(self) -> bool:
        if len(self._last) < DOWNLOADS:
            return False
        failed = [host for host in self._last if host is not None]
        return len(failed) >= NEARLY_ALL * DOWNLOADS and len(set(failed)) >= HOSTS
