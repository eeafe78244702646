"""Headers and logins that a person sets by host pattern: checked, and found for a URL."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import unquote, urlsplit

DEFAULT_PORTS = {"http": 80, "https": 443}
PATTERN = re.compile(
    r"(?:(?P<scheme>https?)://)?(?P<any>\*\.)?"
    r"(?P<host>[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?"
)
HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
#: Visible Latin-1 with inner blanks: what HTTP carries, and no line break.
HEADER_VALUE = re.compile(r"[\x21-\x7e\xa0-\xff](?:[\x20-\x7e\xa0-\xff]*[\x21-\x7e\xa0-\xff])?")
#: These say how the answer is sent, which is up to the fetcher.
OWN_HEADERS = frozenset(
    ["host", "connection", "content-length", "transfer-encoding", "accept-encoding", "range", "te"]
)


@dataclass(frozen=True, slots=True)
class HostPattern:
    """A host with its scheme and port, or `*.` and all hosts below one."""

    scheme: str
    host: str
    port: int
    below: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the pattern, or raise ValueError; https and its port are meant unless said."""
        match = PATTERN.fullmatch(text.lower())
        if match is None:
            raise ValueError(
                "a host pattern is example.org, *.example.org or http://example.org:8080"
            )
        scheme = match["scheme"] or "https"
        port = int(match["port"] or DEFAULT_PORTS[scheme])
        return cls(scheme, match["host"].strip("[]"), port, below=match["any"] is not None)

    def matches(self, scheme: str, host: str, port: int) -> bool:
        if (scheme, port) != (self.scheme, self.port):
            return False
        return host.endswith(f".{self.host}") if self.below else host == self.host


class Credentials:
    """Finds the headers for a URL. Where several patterns match, the later one wins."""

    def __init__(
        self,
        headers: Mapping[str, Mapping[str, str]],
        tokens: Mapping[str, str],
        logins: Mapping[str, str],
    ) -> None:
        """Take headers, bearer tokens and `USER:PASSWORD`, each by host pattern."""
        self._rules: list[tuple[HostPattern, Mapping[str, str]]] = []
        for pattern, own in headers.items():
            self._add(pattern, own)
        for pattern, token in tokens.items():
            self._add(pattern, {"Authorization": f"Bearer {token}"})
        for pattern, login in logins.items():
            self._add(pattern, {"Authorization": basic(login)})

    def headers(self, url: str) -> dict[str, str]:
        """Return the headers for exactly this URL; those of a redirect are looked up again."""
        headers: dict[str, str] = {}
        if self._rules:
            parts = urlsplit(url)
            port = parts.port or DEFAULT_PORTS[parts.scheme]
            for pattern, own in self._rules:
                if pattern.matches(parts.scheme, parts.hostname or "", port):
                    headers |= own
        return headers

    def _add(self, pattern: str, headers: Mapping[str, str]) -> None:
        # In lower case, so that one replaces the other.
        own = {name.lower(): value for name, value in headers.items()}
        self._rules.append((HostPattern.parse(pattern), own))


def basic(login: str) -> str:
    """Return the Basic credentials (RFC 7617) of USER:PASSWORD."""
    return f"Basic {b64encode(login.encode()).decode()}"


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy, with the value of Proxy-Authorization if it wants a login."""

    host: str
    port: int
    authorization: str = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the proxy of a URL, or raise ValueError."""
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if host is None or port is None or parts.scheme != "http" or parts.path.strip("/"):
            raise ValueError("a proxy is http://HOST:PORT or http://USER:PASSWORD@HOST:PORT")
        login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        return cls(host, port, basic(login) if login != ":" else "")


def by_host(value: Any) -> Any:
    """Return JSON as an object; check that its keys are host patterns. No error quotes a value."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, dict):
        raise ValueError('it must be JSON such as {"example.org": ...}')  # noqa: TRY004 - pydantic's
    for pattern in value:
        HostPattern.parse(str(pattern))
    return value


def check_headers(headers: dict[str, str]) -> dict[str, str]:
    for name, content in headers.items():
        if not HEADER_NAME.fullmatch(name) or name.lower() in OWN_HEADERS:
            raise ValueError("one of its header names cannot be used")
        check_header(content)
    return headers


def check_header(content: str) -> str:
    if not HEADER_VALUE.fullmatch(content):
        raise ValueError("a header's value is empty, or holds a line break or a control character")
    return content


def check_login(login: str) -> str:
    if ":" not in login:
        raise ValueError("a login is USER:PASSWORD")
    return login


def check_proxy(value: str | None) -> str | None:
    if value:
        Proxy.parse(value)
    return value
