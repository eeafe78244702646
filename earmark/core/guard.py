"""Fetch untrusted URLs safely (SSRF guard): every connection is checked at the address it dials."""

from __future__ import annotations

import http.client
import logging
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol
from urllib.parse import urljoin

import certifi
import requests
import requests.adapters
from requests.cookies import RequestsCookieJar, extract_cookies_to_jar
from urllib3 import BaseHTTPResponse, HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util.ssltransport import SSLTransport

from earmark.core import errors, settings
from earmark.core.addresses import Addresses, check_url
from earmark.core.credentials import Credentials
from earmark.core.download import Download, current
from earmark.core.resolver import Resolver

REDIRECTS = (301, 302, 303, 307, 308)
#: Hosts kept connected: with 8 connections each, within the usual limit of 1,024 descriptors.
HOSTS_KEPT = 64
#: By these variables OpenSSL finds the system's authorities.
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")

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
        self._resolver = Resolver()
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
        download = Download(self._settings, self._addresses, self._resolver)
        download.body = body
        if byte_range:
            download.headers["Range"] = f"bytes={byte_range}"
        if body is not None:
            download.headers["Content-Type"] = "application/json"
        token = current.set(download)
        try:
            answer = self._follow(check_url(url, self._settings), download)
            try:
                yield answer
            finally:
                answer.close()
        finally:
            current.reset(token)

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
        return current.get().dial(self._dns_host, self.port)


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
