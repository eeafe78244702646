"""URLs that strangers wrote, in; answers from public addresses only, out: the address really dialled decides."""

from __future__ import annotations

import http.client
import logging
import re
import socket
import ssl
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urljoin

import certifi
import psutil
import requests
import requests.adapters
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import parse_url
from urllib3.util.ssltransport import SSLTransport

from earmark.core import errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from urllib3 import BaseHTTPResponse

    from earmark.core import settings

DEFAULT_PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
#: Headers of one answer, and what chunk sizes and trailers may add to a body beyond doubling it.
HEADER_BYTES = 256 * 1024
#: In each family: a name none of whose first addresses answers is down.
ADDRESSES_TRIED = 2
#: Kept connected: with 8 connections to each, still within the usual 1,024 descriptors.
HOSTS_KEPT = 64

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
USER_INFO = re.compile(r"[^/]*//[^/?#]*@")
HOST_NAME = re.compile(
    r"(?=.{1,254}$)([a-z0-9_][a-z0-9_-]{0,62}\.)*[a-z0-9_][a-z0-9_-]{0,62}\.?", re.ASCII
)

#: What some Python's `ipaddress` calls global: metadata of Azure and Oracle, 6to4, multicast, Teredo, examples.
NOT_PUBLIC = "168.63.129.16 192.0.0.0/24 192.88.99.0/24 224.0.0.0/4 2001::/23 2001:db8::/32 2002::/16 3fff::/20"
REFUSED = [ip_network(text) for text in NOT_PUBLIC.split()]
#: Outside lie ULA, link-local, site-local, multicast, v4-compatible, NAT64 and SRv6.
PUBLIC_IPV6 = ip_network("2000::/3")
#: Forms in which a network may dial an IPv4 address, and how far left in them it stands.
TRANSLATED = {"::ffff:0:0/96": 0, "::ffff:0:0:0/96": 0, "64:ff9b::/96": 0, "2002::/16": 80}

logging.getLogger("urllib3").setLevel(
    logging.ERROR
)  # its warnings quote whole URLs, signatures and all


class Observer(Protocol):
    """Sees each request of a guard, redirects included, and the answer to it."""

    def sending(self, url: str) -> None: ...

    def answered(self, url: str, answer: BaseHTTPResponse) -> None: ...


class Guard:
    """Opens http and https URLs, hop by hop, within the limits."""

    def __init__(self, limits: settings.Fetch, observer: Observer | None = None) -> None:
        self._limits = limits
        self._observer = observer
        self._addresses = Addresses(limits)
        # requests' sessions are not used: they read redirect bodies and keep cookies, proxies and .netrc passwords.
        self._adapter = _Adapter(HOSTS_KEPT, limits.host_concurrency)
        self._headers = {
            "User-Agent": f"Earmark ({limits.contact})" if limits.contact else "Earmark"
        }
        self.close = self._adapter.close

    @contextmanager
    def open(self, url: str) -> Iterator[BaseHTTPResponse]:
        """Yield the answer behind the URL and its redirects, its body unread and its deadline running."""
        download = Download(self._limits, self._addresses)
        token = _download.set(download)
        try:
            answer = self._follow(check_url(url, self._limits), download)
            try:
                yield answer
            finally:
                answer.close()
        finally:
            _download.reset(token)

    def _follow(self, url: str, download: Download) -> BaseHTTPResponse:
        for _ in range(self._limits.max_redirects + 1):
            answer = self._ask(url, download)
            location = answer.headers.get("Location")
            if location is None or answer.status not in REDIRECTS:
                return answer
            answer.close()
            url = self._next_url(url, location)
        raise errors.HttpError(reason=f"more than {self._limits.max_redirects} redirects")

    def _next_url(self, url: str, location: str) -> str:
        try:
            target = urljoin(
                url, location.encode("latin-1").decode()
            )  # http.client reads headers as Latin-1
        except ValueError:
            raise errors.BadUrl(reason="its redirect does not parse") from None
        target = check_url(target, self._limits)
        if url.startswith("https:") and not target.startswith("https:"):
            raise errors.HttpError(reason="it redirects from https to http")
        return target

    def _ask(self, url: str, download: Download) -> BaseHTTPResponse:
        if self._observer is None:
            return self._send_twice(url, download)
        self._observer.sending(url)
        answer = self._send_twice(url, download)
        self._observer.answered(url, answer)
        return answer

    def _send_twice(self, url: str, download: Download) -> BaseHTTPResponse:
        try:
            return self._send(url, download)
        except errors.Connect:
            if download.dialled or download.received:
                raise
        return self._send(url, download)  # the server had closed a kept connection

    def _send(self, url: str, download: Download) -> BaseHTTPResponse:
        download.start_hop()
        try:
            request = requests.Request("GET", url, headers=self._headers).prepare()
            answer: BaseHTTPResponse = self._adapter.send(
                request, stream=True, timeout=download.left_s()
            ).raw
        except (requests.RequestException, http.client.HTTPException, OSError, ValueError) as error:
            raise download.error(error) from None  # its text quotes the URL
        download.start_body()
        return answer


def check_url(url: str, limits: settings.Fetch) -> str:
    """Return the URL in canonical form, or raise BadUrl."""
    if len(url) > limits.max_url_chars:
        raise errors.BadUrl(reason=f"it is longer than {limits.max_url_chars} characters")
    if CONTROL.search(url) or "\\" in url or USER_INFO.match(url):
        raise errors.BadUrl(reason="it holds control characters, backslashes or a user name")
    try:
        parts = parse_url(url)
    except ValueError:
        raise errors.BadUrl(reason="it does not parse") from None
    if parts.scheme not in DEFAULT_PORTS or not _is_host(parts.host or ""):
        raise errors.BadUrl(reason="it names no http or https host")
    port = DEFAULT_PORTS[parts.scheme] if parts.port is None else parts.port
    if port not in limits.ports:
        raise errors.BadUrl(reason=f"port {port} is not allowed (EARMARK_FETCH__PORTS)")
    return parts.url


def _is_host(host: str) -> bool:
    if not host.startswith("["):
        return HOST_NAME.fullmatch(host) is not None
    try:
        return IPv6Address(host[1:-1]).scope_id is None
    except ValueError:
        return False


class Addresses:
    """Which addresses may be dialled: public ones that are not this machine's, unless the settings say otherwise."""

    def __init__(self, limits: settings.Fetch) -> None:
        self._denied = limits.deny_networks
        self._allowed = limits.allow_networks
        self._own = {address.address for nic in psutil.net_if_addrs().values() for address in nic}
        self._translated = {ip_network(text): shift for text, shift in TRANSLATED.items()}

    def check(self, address: str) -> None:
        if not self._allows(ip_address(address)):
            raise errors.BlockedAddress(address=address)

    def _allows(self, ip: IPv4Address | IPv6Address) -> bool:
        if _within(ip, self._denied):
            return False
        allowed = _within(ip, self._allowed)
        for network, shift in self._translated.items():
            if ip in network:
                return allowed and self._allows(IPv4Address(int(ip) >> shift & 0xFFFFFFFF))
        return allowed or (_is_public(ip) and str(ip) not in self._own)


def _is_public(ip: IPv4Address | IPv6Address) -> bool:
    return ip.is_global and not _within(ip, REFUSED) and (ip.version == 4 or ip in PUBLIC_IPV6)


def _within(ip: IPv4Address | IPv6Address, networks: Iterable[Any]) -> bool:
    return any(ip in network for network in networks)


class Download:
    """One fetch on its way: its deadline, and what came from the server it is at."""

    def __init__(self, limits: settings.Fetch, addresses: Addresses) -> None:
        self._limits = limits
        self._addresses = addresses
        self._deadline = time.monotonic() + limits.timeout_s

    def start_hop(self) -> None:
        self.dialled = False
        self.received = 0
        self._most = HEADER_BYTES

    def start_body(self) -> None:
        self._most += 2 * self._limits.max_bytes

    def left_s(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self.late()
        return left

    def late(self) -> errors.Timeout:
        return errors.Timeout(timeout_s=self._limits.timeout_s)

    def count(self, received: int) -> None:
        self.received += received
        if self.received > self._most:
            raise errors.HttpError(reason="endless headers or trailers")

    def dial(self, host: str, port: int) -> socket.socket:
        """Return a connection to the first address of the host that answers, if all of them are allowed."""
        self.dialled = True
        tries: dict[int, list[Any]] = {}
        for family, _, _, _, place in resolve(host, port, self._connect_s()):
            self._addresses.check(place[0])
            tries.setdefault(family, []).append(place)
        reason = "it has no address"
        for family, places in tries.items():
            for place in places[:ADDRESSES_TRIED]:
                try:
                    return self._connect(family, place)
                except OSError as error:
                    reason = error.strerror or "no answer"
        raise errors.Connect(reason=reason)

    def _connect_s(self) -> float:
        return min(self._limits.connect_timeout_s, self.left_s())

    def _connect(self, family: int, place: Any) -> socket.socket:
        connection = _Socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(self._connect_s())
            connection.connect(place)
            self._addresses.check(connection.getpeername()[0])
            connection.settimeout(self.left_s())
        except BaseException:
            connection.close()
            raise
        return connection

    def error(self, outside: BaseException) -> errors.DownloadError:
        """Return our word for what requests, urllib3, http.client, ssl or the system raised."""
        cause: BaseException | None = outside
        while cause := cause and (cause.__cause__ or cause.__context__):
            match cause:
                case ssl.SSLError():
                    reason = getattr(cause, "verify_message", "") or cause.reason
                    return errors.Tls(reason=reason or "the handshake failed")
                case TimeoutError():
                    return self.late()
                case OSError():
                    return errors.Connect(reason=cause.strerror or "it closed the connection")
        return errors.HttpError(reason="its answer is not HTTP")


def resolve(host: str, port: int, timeout_s: float) -> list[Any]:
    """Ask the system, which knows no timeout and so may outlive this call."""
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


#: The fetch this thread is at; outside one nothing can be dialled.
_download: ContextVar[Download] = ContextVar("download")


class _Socket(socket.socket):
    """A socket on which every wait ends at the download's deadline and every byte counts."""

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        download = _download.get()
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


class _TlsContext(ssl.SSLContext):
    def wrap_socket(self, sock: socket.socket, server_hostname: str | None = None) -> Any:  # type: ignore[override]
        """Keep OpenSSL off the socket: endless empty handshake messages held it in there, beyond any deadline."""
        return SSLTransport(sock, self, server_hostname)


class _Answer(http.client.HTTPResponse):
    def _read_next_chunk_size(self) -> int:
        size: int = super()._read_next_chunk_size()  # type: ignore[misc]
        if size < 0:
            raise ValueError("a chunk of -1 would be read without end")
        return size


class _HttpConnection(HTTPConnection):
    response_class = _Answer

    def _new_conn(self) -> socket.socket:
        return _download.get().dial(self._dns_host, self.port)


class _HttpsConnection(_HttpConnection, HTTPSConnection):
    pass


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _HttpConnection


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _HttpsConnection


class _Adapter(requests.adapters.HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        context = _TlsContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_default_certs()
        context.load_verify_locations(certifi.where())
        super().init_poolmanager(*args, **kwargs, ssl_context=context)
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def cert_verify(self, *args: Any) -> None:
        """Leave it to our TLS context: requests would load its CA file anew for each connection."""
