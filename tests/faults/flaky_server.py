"""A loopback server of two sounds under many URLs, whose paths say how it misbehaves.

Every other clip has bytes of its own; the others are copies of each other.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from earmark.demo import EXAMPLES

if TYPE_CHECKING:
    from collections.abc import Iterator

#: How a clip ends whose path begins so: with a result (None), or with this error.
KINDS = {
    "sound": None,
    "busy": None,  # 429 with Retry-After, once
    "broken": None,  # 500, once
    "cut": None,  # the connection is reset in the middle, once
    "gone": "not_found",
    "endless": "timeout",
    "poison": "worker_lost",
    "venom": "worker_lost",  # it kills loaders and no worker
    "unnamed": "dns",
    "renamed": None,
}
#: Those that are on another host, or on one each.
HOSTS = {"unnamed": "nowhere.test", "renamed": "flaky-{}.test"}


class FlakyServer(ThreadingHTTPServer):
    """Counts how often each clip was asked for."""

    daemon_threads = True

    def __init__(self, delay_s: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.delay_s = delay_s
        #: Of every third clip it is the second.
        self.sounds = [(EXAMPLES / name).read_bytes() for name in ("dog.ogg", "rain.ogg")]
        self.asked: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """Say nothing: workers that are killed leave connections half open."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FlakyServer

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        time.sleep(self.server.delay_s)
        kind, first = self.path.split("/")[1], self.server.asked[self.path] == 1
        if kind == "gone":
            self._answer(404, b"gone")
        elif kind == "endless":
            self._never_end()
        elif first and kind == "busy":
            self._answer(429, b"later", ("Retry-After", "1"))
        elif first and kind == "broken":
            self._answer(500, b"broken")
        elif first and kind == "cut":
            self._cut()
        else:
            self._answer(200, self._sound())

    def _answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _sound(self) -> bytes:
        number = self.path.rpartition("/")[2]
        # No decoder reads what lies behind the sound.
        own = number.encode() if number[-1:] in "13579" else b""
        return self.server.sounds[number[-1:] in "369"] + own

    def _never_end(self) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(b"0" * 100)
                time.sleep(0.1)

    def _cut(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self._sound())))
        self.end_headers()
        self.wfile.write(self._sound()[:1000])
        self.wfile.flush()
        # With nothing to linger for, closing is a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def flaky_server(delay_s: float) -> Iterator[FlakyServer]:
    """Run a server until the block ends."""
    server = FlakyServer(delay_s)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
