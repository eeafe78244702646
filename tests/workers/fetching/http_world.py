"""A loopback internet: one public address, a canary behind all others, scripted servers."""

from __future__ import annotations

import errno
import socket
import ssl
import threading
from contextlib import suppress
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import trustme

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

PUBLIC = "93.184.216.34"
PUBLIC_6 = "2606:2800:220:1:248:1893:25c8:1946"
#: The address of a proxy, which nobody but the settings may name.
PROXY = "10.9.9.9"
CLIP = bytes(range(256)) * 16
NUMERIC = "0123456789abcdefx.:"

_real_connect = socket.socket.connect
_real_getpeername = socket.socket.getpeername
_real_getaddrinfo = socket.getaddrinfo


class Talk:
    """One request, and the connection to answer it on."""

    def __init__(self, connection: socket.socket, head: str, stopped: threading.Event) -> None:
        self._connection = connection
        self.head = head
        self.path = head.split(" ", 2)[1] if head else ""
        self.stopped = stopped

    def send(self, data: bytes) -> None:
        self._connection.sendall(data)

    def send_for_ever(self, data: bytes, *, every_s: float = 0.0) -> None:
        while not self.stopped.wait(every_s):
            self.send(data)

    def close(self) -> None:
        self._connection.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._connection.close()


def answer(body: bytes = CLIP, *headers: str, status: str = "200 OK") -> Callable[[Talk], None]:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return lambda talk: talk.send("\r\n".join(lines).encode() + body)


def raw(data: bytes, *, close: bool = True) -> Callable[[Talk], None]:
    def script(talk: Talk) -> None:
        talk.send(data)
        if close:
            talk.close()

    return script


class World:
    """Maps every dialled address to a loopback server and remembers which were dialled."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self.ca_file = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca_file))
        self.stopped = threading.Event()
        self.certificate = self.authority.issue_cert("public.test", PUBLIC)
        self._peers: WeakKeyDictionary[socket.socket, tuple[str, int]] = WeakKeyDictionary()
        self._ports = {
            80: self._listen("127.0.0.1", self._talk),
            443: self._listen("127.0.0.1", self._talk_tls),
            0: self._listen("127.0.0.2", self._talk),
            3128: self._listen("127.0.0.1", self._talk_as_proxy),
        }
        self.reset()

    def reset(self) -> None:
        """Forget the last case and end its scripts."""
        self.stopped.set()
        self.stopped = threading.Event()
        self.script: Callable[[Talk], None] = answer()
        self.names: dict[str, list[list[str]]] = {}
        self.dialled: list[str] = []
        self.heads: list[str] = []
        self.resolved: list[str] = []
        self.server_names: list[str | None] = []
        #: Where the proxy was asked to connect to.
        self.tunnels: list[str] = []
        self.proxy_heads: list[str] = []
        self.proxy_answers: Callable[[str], str] = lambda _where: "200 OK"
        self.tls = True
        self.dead: set[str] = set()

    @property
    def refused(self) -> list[str]:
        """Return the addresses dialled that nobody may dial."""
        tunnelled = [where.rpartition(":")[0].strip("[]") for where in self.tunnels]
        dialled = [*self.dialled, *tunnelled]
        return [address for address in dialled if address not in (PUBLIC, PUBLIC_6, PROXY)]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = self

        def connect(sock: socket.socket, place: tuple[str, int]) -> None:
            world._connect(sock, place)

        def getpeername(sock: socket.socket) -> tuple[str, int]:
            return world._peers.get(sock) or _real_getpeername(sock)

        monkeypatch.setattr(socket.socket, "connect", connect)
        monkeypatch.setattr(socket.socket, "getpeername", getpeername)
        monkeypatch.setattr(socket, "getaddrinfo", self._getaddrinfo)

    def _connect(self, sock: socket.socket, place: tuple[str, int]) -> None:
        self.dialled.append(place[0])
        if place[0] in self.dead:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        public = place[0] in (PUBLIC, PUBLIC_6, PROXY)
        host, port = (
            ("127.0.0.1", self._ports[place[1]]) if public else ("127.0.0.2", self._ports[0])
        )
        self._peers[sock] = place
        _real_connect(
            sock, (f"::ffff:{host}", port, 0, 0) if sock.family == socket.AF_INET6 else (host, port)
        )

    def _getaddrinfo(self, host: str, port: int, *args: int, **kwargs: int) -> list:
        self.resolved.append(host)
        name = host.rstrip(".").lower()
        if name not in self.names and set(name) <= set(NUMERIC):
            return _real_getaddrinfo(host, port, *args, **kwargs)
        if name not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        answers = self.names[name]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [_entry(address, port) for address in addresses]

    def _listen(self, host: str, talk: Callable[[socket.socket], None]) -> int:
        listener = socket.create_server((host, 0), backlog=64)

        def accept() -> None:
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return listener.getsockname()[1]

    def _talk(self, connection: socket.socket) -> None:
        script, stopped = self.script, self.stopped
        with suppress(OSError), connection:
            while not stopped.is_set():
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    received = connection.recv(65536)
                    if not received:
                        return
                    head += received
                self.heads.append(head.decode("latin-1"))
                script(Talk(connection, self.heads[-1], stopped))

    def _talk_as_proxy(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += connection.recv(1)
            where = head.decode("latin-1").split(" ", 2)[1]
            self.tunnels.append(where)
            self.proxy_heads.append(head.decode("latin-1"))
            status = self.proxy_answers(where)
            connection.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode())
            if status.startswith("200"):
                talk = self._talk_tls if where.endswith(":443") else self._talk
                talk(connection)

    def _talk_tls(self, connection: socket.socket) -> None:
        if not self.tls:
            with suppress(OSError), connection:
                self.script(Talk(connection, "", self.stopped))
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sni_callback = lambda _sock, name, _context: self.server_names.append(name)
        self.certificate.configure_cert(context)
        with suppress(OSError), connection:
            self._talk(context.wrap_socket(connection, server_side=True))


def _entry(address: str, port: int) -> tuple:
    if ":" in address:
        return (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port, 0, 0))
    return (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))
