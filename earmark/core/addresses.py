"""Which URLs and addresses may be asked: those that are public, and those that settings name."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from itertools import chain
from typing import Any

import psutil
from urllib3.util import parse_url

from earmark.core import errors, settings
from earmark.core.credentials import DEFAULT_PORTS

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


def is_http(uri: str) -> bool:
    """Return whether a URI is one to ask a web server for."""
    return uri[:8].lower().startswith(("http://", "https://"))


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
