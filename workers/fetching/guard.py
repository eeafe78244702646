"""Fetch untrusted URLs safely (SSRF guard): every connection is checked at the address it dials."""

from __future__ import annotations

import http.client
import logging
import os
import re
import socket
import ssl
import time
from collections import Counter
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, partial
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urljoin

import certifi
import psutil
import requests
import requests.adapters
from requests.cookies import RequestsCookieJar, extract_cookies_to_jar
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import parse_url
from urllib3.util.ssltransport import SSLTransport

from earmark.core import errors
from earmark.core.credentials import DEFAULT_PORTS, Credentials, Proxy
from workers.fetching.names import Names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from urllib3 import BaseHTTPResponse

    from earmark.core import settings

REDIRECTS = (301, 302, 303, 307, 308)
#: The most that headers, chunk sizes and trailers may add to twice the largest body.
HEADER_BYTES = 256 * 1024
#: Addresses tried of each family (IPv4, IPv6). If none of these answers, the host is down.
ADDRESSES_TRIED = 2
#: Hosts kept connected: with 8 connections each, within the usual limit of 1,024 descriptors.
HOSTS_KEPT = 64
#: By these variables OpenSSL finds the system's authorities.
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
USER_INFO = re.compile(r"[^/]*//[^/?#]*@")
HOST_NAME = re.compile(
    r"(?=.{1,254}$)([a-z0-9_][a-z0-9_-]{0,62}\.)*[a-z0-9_][a-z0-9_-]{0,62}\.?", re.ASCII
)

#: A last label in numbers makes a host an address, as browsers read it.
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.IGNORECASE)

#: Some versions of `ipaddress` call these global: cloud metadata services (Azure, Oracle), 6to4,
#: multicast, Teredo, documentation.
NOT_PUBLIC = (
    "168.63.129.16 192.0.0.0/24 192.88.99.0/24 224.0.0.0/4"
    " 2001::/23 2001:db8::/32 2002::/16 3fff::/20"
)
REFUSED = [ip_network(text) for text in NOT_PUBLIC.split()]
#: ULA, link-local, site-local, multicast, v4-compatible, NAT64 and SRv6 lie outside.
PUBLIC_IPV6 = ip_network("2000::/3")
#: IPv6 prefixes that stand for an IPv4 address, and how many bits follow the address.
TRANSLATED = {"::ffff:0:0/96": 0, "::ffff:0:0:0/96": 0, "64:ff9b::/96": 0, "2002::/16": 80}

# urllib3's warnings quote whole URLs, with their signatures.
logging.getLogger("urllib3").setLevel(logging.ERROR)


class Observer(Protocol):
    """Sees each request of a guard, redirects included, and the answer to it."""

    def sending(self, url: str) -> None: ...

    def answered(self, url: str, answer: BaseHTTPResponse) -> None: ...


class Guard:
    """Opens untrusted http and https URLs, within the settings' limits.

    Use one per process, shared by its threads, for every URL that a user or a list supplies, and
    close it. It follows redirects itself and checks each hop: the URL, and the address dialled.
    It raises a DownloadError for any answer that cannot be used. Pass an `observer` to see each
    request and its answer.
    """

    def __init__(self, fetch_settings: settings.Fetch, observer: Observer | None = None) -> None:
        self._settings = fetch_settings
        self._observer = observer
        self._addresses = Addresses(fetch_settings)
        self._names = Names()
        self._credentials = Credentials(
            fetch_settings.headers, fetch_settings.tokens, fetch_settings.basic_auth
        )
        # No requests.Session: it reads the bodies of redirects, keeps cookies, and obeys proxies
        # and .netrc passwords of the environment.
        self._adapter = _Adapter(HOSTS_KEPT, fetch_settings.host_concurrency)
        contact = fetch_settings.contact
        self._headers = {"User-Agent": f"Earmark ({contact})" if contact else "Earmark"}
        self.close = self._adapter.close

    @contextmanager
    def open(
        self, url: str, body: bytes | None = None, byte_range: str | None = None
    ) -> Iterator[BaseHTTPResponse]:
        """Yield the final answer, after redirects, with its body unread.

        Args:
            body: JSON to post in place of a GET.
            byte_range: the bytes to ask for, such as `0-99`.

        Reading the body raises Timeout once the download's deadline has passed.

        Raises:
            DownloadError: the URL is refused, or its server gives no usable answer.
        """
        download = Download(self._settings, self._addresses, self._names)
        download.body = body
        if byte_range:
            download.headers["Range"] = f"bytes={byte_range}"
        if body is not None:
            download.headers["Content-Type"] = "application/json"
        token = _download.set(download)
        try:
            answer = self._follow(check_url(url, self._settings), download)
            try:
                yield answer
            finally:
                answer.close()
        finally:
            _download.reset(token)

    def _follow(self, url: str, download: Download) -> BaseHTTPResponse:
        for _ in range(self._settings.max_redirects + 1):
            answer = self._ask(url, download)
            location = answer.headers.get("Location")
            if location is None or answer.status not in REDIRECTS:
                return answer
            answer.close()
            url = self._next_url(url, location)
        raise errors.HttpError(reason=f"more than {self._settings.max_redirects} redirects")

    def _next_url(self, url: str, location: str) -> str:
        try:
            # http.client reads headers as Latin-1.
            target = urljoin(url, location.encode("latin-1").decode())
        except ValueError:
            raise errors.BadUrl(reason="its redirect does not parse") from None
        target = check_url(target, self._settings)
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
            headers = {**self._headers, **download.headers, **self._credentials.headers(url)}
            method = "GET" if download.body is None else "POST"
            request = requests.Request(
                method, url, headers, data=download.body, cookies=download.cookies
            ).prepare()
            answer: BaseHTTPResponse = self._adapter.send(
                request, stream=True, timeout=download.left_s()
            ).raw
            if "Set-Cookie" in answer.headers:
                download.cookies = download.cookies or RequestsCookieJar()
                extract_cookies_to_jar(download.cookies, request, answer)  # type: ignore[no-untyped-call]
        except (requests.RequestException, http.client.HTTPException, OSError, ValueError) as error:
            raise download.error(error) from None  # its text quotes the URL
        download.start_body()
        return answer


def check_url(url: str, fetch_settings: settings.Fetch) -> str:
    """Return the URL in canonical form, or raise BadUrl."""
    if len(url) > fetch_settings.max_url_chars:
        raise errors.BadUrl(reason=f"it is longer than {fetch_settings.max_url_chars} characters")
    if CONTROL.search(url) or "\\" in url:
        raise errors.BadUrl(reason="it holds control characters or backslashes")
    if USER_INFO.match(url):
        raise errors.BadUrl(reason="it holds a user name: use EARMARK_FETCH__BASIC_AUTH instead")
    try:
        parts = parse_url(url)
    except ValueError:
        raise errors.BadUrl(reason="it does not parse") from None
    if parts.scheme not in DEFAULT_PORTS or not _is_host(parts.host or ""):
        raise errors.BadUrl(reason="it names no http or https host")
    port = DEFAULT_PORTS[parts.scheme] if parts.port is None else parts.port
    if port not in fetch_settings.ports:
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
    """The addresses that may be dialled: public ones that are not this machine's own.

    EARMARK_FETCH__ALLOW_NETWORKS and EARMARK_FETCH__DENY_NETWORKS add to them and take from them.
    """

    def __init__(self, fetch_settings: settings.Fetch) -> None:
        self._denied = fetch_settings.deny_networks
        self._allowed = fetch_settings.allow_networks
        interfaces = psutil.net_if_addrs().values()
        self._own = {address.address for address in chain.from_iterable(interfaces)}
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
    """One download in progress: its deadline, and the bytes received of the current hop."""

    def __init__(self, fetch_settings: settings.Fetch, addresses: Addresses, names: Names) -> None:
        self._settings = fetch_settings
        self._addresses = addresses
        self._names = names
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
        places = []
        for family, _, _, _, place in self._names.resolve(host, port, self._connect_s()):
            self._addresses.check(place[0])
            places.append((family, place))
        return places

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
        places = []
        for family, _, _, _, place in self._names.resolve(
            proxy.host, proxy.port, self._connect_s()
        ):
            places.append((family, place))
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


def literal(host: str) -> str:
    """Return the address that a host in numbers stands for, in any form; empty for a name."""
    bare = host.removesuffix(".")
    with suppress(ValueError):
        return str(ip_address(bare))
    with suppress(OSError):
        return socket.inet_ntoa(socket.inet_aton(bare))
    last = bare.rpartition(".")[2]
    if last == "localhost":
        return "127.0.0.1"
    if NUMBER.fullmatch(last):
        raise errors.Dns(host=host)
    return ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions that led to this one, the latest first."""
    cause = error.__cause__ or error.__context__
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


#: The download of this thread. Without one, no connection can be made.
_download: ContextVar[Download] = ContextVar("download")


class _Socket(socket.socket):
    """A socket that waits no longer than the download's deadline, and counts every byte."""

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
        """Keep OpenSSL off the socket: endless empty handshake messages held it past a deadline."""
        return SSLTransport(sock, self, server_hostname)


@cache
def _tls_context(*_: str | None) -> _TlsContext:
    """Read the certificates of authorities, which takes 20 ms, once while the variables stay."""
    context = _TlsContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    context.load_verify_locations(certifi.where())
    return context


class _Answer(http.client.HTTPResponse):
    def _read_next_chunk_size(self) -> int:
        size: int = super()._read_next_chunk_size()  # type: ignore[misc]
        if size < 0:
            raise ValueError("a chunk of -1 bytes would be read without end")
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
        context = _tls_context(*map(os.environ.get, CERTIFICATES))
        super().init_poolmanager(*args, **kwargs, ssl_context=context)
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def cert_verify(self, *args: Any) -> None:
        """Leave this to our TLS context: requests would load its CA file for each connection."""
