"""The guard through an outbound proxy: the proxy is asked to connect to checked addresses only."""

from __future__ import annotations

from base64 import b64encode
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from earmark.core import errors, settings
from earmark.core.addresses import literal
from tests.workers.fetching import http_cases
from tests.workers.fetching.http_world import PROXY, PUBLIC, PUBLIC_6, World
from workers.fetching.fetch import Fetcher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.workers.fetching.http_cases import Case

ADDRESSES = [*http_cases.addresses(), *http_cases.tricks(), *http_cases.ports()]
#: Their answers do not depend on names that only this machine knows.
UNNAMED = [*ADDRESSES, *(case for case in http_cases.redirects() if not case.names)]
CASES = [*ADDRESSES, *http_cases.redirects(), *http_cases.named(), *http_cases.unicode_hosts()]


@pytest.fixture
def world(internet: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    internet.reset()
    internet.install(monkeypatch)
    monkeypatch.setenv("SSL_CERT_FILE", str(internet.ca_file))
    internet.names |= {"public.test": [[PUBLIC]], "proxy.test": [[PROXY]]}
    yield internet
    internet.reset()


def ask(url: str, **limits: Any) -> errors.DownloadError | None:
    """Fetch a URL through the proxy; return how it failed."""
    limits = {"proxy": "http://me:p%40ss@proxy.test:3128", "timeout_s": 5.0, **limits}
    with closing(Fetcher(settings.Fetch(**limits))) as fetcher:
        try:
            fetcher.fetch(url).file.close()
        except errors.DownloadError as error:
            return error
    return None


def code(error: errors.DownloadError | None) -> str:
    return error.code if error else "ok"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_proxy_is_asked_for_no_refused_address(case: Case, world: World) -> None:
    world.script = case.script
    world.names |= {name: list(answers) for name, answers in case.names.items()}
    assert code(ask(case.url, max_bytes=http_cases.LIMIT_BYTES)) in case.outcomes
    assert world.refused == []
    assert set(world.dialled) <= {PROXY}


@pytest.mark.parametrize("case", UNNAMED, ids=lambda case: case.name)
def test_addresses_and_redirects_are_checked_where_the_proxy_resolves(
    case: Case, world: World
) -> None:
    world.script = case.script
    ended = code(ask(case.url, max_bytes=http_cases.LIMIT_BYTES, proxy_resolves=True))
    # A name is the proxy's own affair.
    assert ended in case.outcomes or case.url == "http://inside.test/"
    tunnelled = {where.rpartition(":")[0].strip("[]") for where in world.tunnels}
    assert tunnelled <= {PUBLIC, PUBLIC_6, "public.test", "public.test."}
    assert set(world.resolved) <= {"proxy.test"}


def test_the_server_sees_the_name_and_the_proxy_the_checked_address(world: World) -> None:
    assert ask("https://public.test/a") is None
    assert world.tunnels == [f"{PUBLIC}:443"]
    assert world.server_names == ["public.test"]
    assert "Host: public.test\r\n" in world.heads[0]
    login = b64encode(b"me:p@ss").decode()
    assert f"Proxy-Authorization: Basic {login}\r\n" in world.proxy_heads[0]
    assert login not in world.heads[0]


def test_a_certificate_for_another_name_is_refused_through_a_proxy(world: World) -> None:
    world.names["other.test"] = [[PUBLIC]]
    assert code(ask("https://other.test/a")) == "tls"


def test_a_proxy_that_resolves_gets_names(world: World) -> None:
    assert ask("https://public.test/a", proxy_resolves=True) is None
    assert world.tunnels == ["public.test:443"]


def test_another_address_is_tried_when_the_proxy_does_not_reach_the_first(world: World) -> None:
    world.names["public.test"] = [[PUBLIC_6, PUBLIC]]
    world.proxy_answers = lambda where: "503 No route" if PUBLIC_6 in where else "200 OK"
    assert ask("http://public.test/a") is None
    assert world.tunnels == [f"[{PUBLIC_6}]:80", f"{PUBLIC}:80"]


@pytest.mark.parametrize(
    ("answer", "expected", "words"),
    [
        ("407 Proxy Authentication Required", "connect", "asks for a login"),
        ("502 Bad Gateway", "connect", "HTTP 502"),
        ("403 Forbidden", "http_error", "refuses this address"),
        ("\r\n", "connect", "not HTTP"),
    ],
)
def test_what_the_proxy_refuses_is_told_as_the_proxys(
    answer: str, expected: str, words: str, world: World
) -> None:
    world.proxy_answers = lambda _where: answer
    error = ask("http://public.test/a")
    assert code(error) == expected
    assert "proxy" in str(error)
    assert words in str(error)


def test_a_dead_proxy_is_told_as_dead(world: World) -> None:
    world.dead.add(PROXY)
    error = ask("http://public.test/a")
    assert isinstance(error, errors.Connect)
    assert str(error) == "The server cannot be reached: its proxy is away, Connection refused."


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.1", "127.0.0.1"),
        ("127.0.0.1.", "127.0.0.1"),
        ("0x7f.1", "127.0.0.1"),
        ("017700000001", "127.0.0.1"),
        ("fd00::1", "fd00::1"),
        ("localhost", "127.0.0.1"),
        ("a.localhost.", "127.0.0.1"),
        ("example.org", ""),
        ("1.example.org", ""),
        ("0x.org", ""),
    ],
)
def test_an_address_is_known_in_any_form(host: str, address: str) -> None:
    assert literal(host) == address


@pytest.mark.parametrize("host", ["1.2.3.4.5", "1.2.3.256", "0xg.0x7", "example.1"])
def test_a_host_that_ends_in_a_number_and_is_no_address_is_refused(host: str) -> None:
    with pytest.raises(errors.Dns):
        literal(host)
