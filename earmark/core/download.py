"""One download: its deadline, its bytes, and connections to checked addresses or to a proxy."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

from requests.cookies import RequestsCookieJar

from earmark.core import errors, settings
from earmark.core.addresses import Addresses, literal
from earmark.core.credentials import Proxy
from earmark.core.resolver import Resolver

#: The most that headers, chunk sizes and trailers may add to twice the largest body.
HEADER_BYTES = 256 * 1024
#: Addresses tried of each family (IPv4, IPv6). If none of these answers, the host is down.
ADDRESSES_TRIED = 2


class Download:
    """One download in progress: its deadline, and the bytes received of the current hop."""

    def __init__(
        self, fetch_settings: settings.Fetch, addresses: Addresses, resolver: Resolver
    ) -> None:
        self._settings = fetch_settings
        self._addresses = addresses
        self._resolver = resolver
        self._proxy = Proxy.parse(fetch_settings.proxy) if fetch_settings.proxy else None
        self._deadline = time.monotonic() + fetch_settings.timeout_s
        self.headers: dict[str, str] = {}
        self.body: bytes | None = None
        self.cookies: RequestsCookieJar | None = None

    def start_hop(self) -> None:
        self.dialled = False
        self.received = 0
        self._most = HEADER_BYTES

    def start_body(self) -> None:
        self._most += 2 * self._settings.max_bytes

    def left_s(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self.late()
        return left

    def late(self) -> errors.Timeout:
        return errors.Timeout(timeout_s=self._settings.timeout_s)

    def count(self, received: int) -> None:
        self.received += received
        if self.received > self._most:
            raise errors.HttpError(reason="endless headers or trailers")

    def dial(self, host: str, port: int) -> socket.socket:
        """Connect to the host's first address that answers; refuse the host if one is forbidden."""
        self.dialled = True
        if self._proxy is None:
            return self._first(self._checked(host, port), self._connect)
        if not self._settings.proxy_resolves:
            return self._first(self._checked(host, port), self._tunnel)
        if address := literal(host):
            self._addresses.check(address)
        return self._first([(0, (address or host, port))], self._tunnel)

    def _checked(self, host: str, port: int) -> list[tuple[int, Any]]:
        places = self._resolved(host, port)
        for _, place in places:
            self._addresses.check(place[0])
        return places

    def _resolved(self, host: str, port: int) -> list[tuple[int, Any]]:
        answers = self._resolver.resolve(host, port, self._connect_s())
        return [(family, place) for family, _, _, _, place in answers]

    def _first(
        self, places: list[tuple[int, Any]], connect: Callable[[int, Any], _Socket]
    ) -> _Socket:
        tries: Counter[int] = Counter()
        reason = "it has no address"
        for family, place in places:
            tries[family] += 1
            if tries[family] <= ADDRESSES_TRIED:
                try:
                    return connect(family, place)
                except OSError as error:
                    reason = error.strerror or "no answer"
        raise errors.Connect(reason=reason)

    def _connect_s(self) -> float:
        return min(self._settings.connect_timeout_s, self.left_s())

    def _connect(self, family: int, place: Any, *, checked: bool = True) -> _Socket:
        connection = _Socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(self._connect_s())
            connection.connect(place)
            if checked:
                self._addresses.check(connection.getpeername()[0])
            connection.settimeout(self.left_s())
        except BaseException:
            connection.close()
            raise
        return connection

    def _tunnel(self, _family: int, place: Any) -> _Socket:
        """Have the proxy connect to a place that has been checked."""
        assert self._proxy
        connection = self._to_proxy(self._proxy)
        try:
            _ask_proxy(self._proxy, connection, place)
        except http.client.HTTPException:
            connection.close()
            raise errors.Connect(reason="the proxy's answer is not HTTP") from None
        except BaseException:
            connection.close()
            raise
        return connection

    def _to_proxy(self, proxy: Proxy) -> _Socket:
        places = self._resolved(proxy.host, proxy.port)
        try:
            return self._first(places, partial(self._connect, checked=False))
        except errors.Connect as error:
            raise errors.Connect(reason=f"its proxy is away, {error.reason}") from None

    def error(self, outside: BaseException) -> errors.DownloadError:
        """Return our error for one of requests, urllib3, http.client, ssl or the system."""
        for cause in _causes(outside):
            match cause:
                case ssl.SSLError():
                    reason = getattr(cause, "verify_message", "") or cause.reason
                    return errors.Tls(reason=reason or "the handshake failed")
                case TimeoutError():
                    return self.late()
                case OSError():
                    return errors.Connect(reason=cause.strerror or "it closed the connection")
        return errors.HttpError(reason="its answer is not HTTP")


def _ask_proxy(proxy: Proxy, connection: socket.socket, place: Any) -> None:
    host, port = place[:2]
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {where} HTTP/1.1", f"Host: {where}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    connection.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
    with http.client.HTTPResponse(connection, method="CONNECT") as answer:
        answer.begin()
    if answer.status == 407:
        raise errors.Connect(reason="the proxy asks for a login (EARMARK_FETCH__PROXY)")
    if answer.status >= 500:
        raise OSError(0, f"the proxy answers with HTTP {answer.status}")
    if answer.status >= 300:
        raise errors.HttpError(reason=f"the proxy refuses this address (HTTP {answer.status})")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions that led to this one, the latest first."""
    cause = error.__cause__ or error.__context__
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


#: The download of this thread. Without one, no connection can be made.
current: ContextVar[Download] = ContextVar("download")


class _Socket(socket.socket):
    """A socket that waits no longer than the download's deadline, and counts every byte."""

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        download = current.get()
        self.settimeout(download.left_s())
        try:
            received = super().recv_into(buffer, nbytes, flags)
        except TimeoutError:
            raise download.late() from None
        download.count(received)
        return received

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        buffer = bytearray(bufsize)
        return bytes(buffer[: self.recv_into(buffer, bufsize, flags)])
