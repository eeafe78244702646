"""The guard against a loopback internet: no case may dial a refused address, hang or grow."""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
import traceback
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil
import pytest
import requests
import trustme

from earmark.core import errors, settings
from earmark.core.addresses import Addresses
from earmark.core.resolver import Resolver
from tests.workers.fetching.http_cases import LIMIT_BYTES, Case, every_case
from tests.workers.fetching.http_world import CLIP, PUBLIC, PUBLIC_6, Talk, World, answer, raw
from workers.fetching.fetch import Fetcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Script = Callable[[Talk], None]

TIMEOUT_S = 0.8
#: Without a deadline the scripts go on for ever, so a busy machine may have as long as this.
BOUND_S = 30
MEMORY_MB = 50
CASES = every_case()
LIMITS = settings.Fetch(timeout_s=TIMEOUT_S, max_bytes=LIMIT_BYTES)


@pytest.fixture
def world(internet: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    internet.reset()
    internet.install(monkeypatch)
    internet.names["public.test"] = [[PUBLIC]]
    yield internet
    internet.reset()


@pytest.fixture(scope="module")
def shared_fetcher(internet: World) -> Fetcher:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(internet.ca_file))
        return Fetcher(LIMITS)


@pytest.fixture
def fetcher(shared_fetcher: Fetcher) -> Iterator[Fetcher]:
    yield shared_fetcher
    shared_fetcher.close()
    shared_fetcher._guard._resolver = Resolver()


def outcome(fetcher: Fetcher, url: str) -> str:
    try:
        fetcher.fetch(url).file.close()
    except errors.DownloadError as error:
        return error.code
    return "ok"


def memory_mb(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_refused_address_is_dialled_and_every_case_is_bounded(
    case: Case, world: World, fetcher: Fetcher
) -> None:
    world.script = case.script
    world.names |= {name: list(answers) for name, answers in case.names.items()}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before_mb, start = memory_mb("VmRSS"), time.monotonic()
    result = outcome(fetcher, case.url)
    took_s = time.monotonic() - start
    assert world.refused == []
    assert result in case.outcomes
    assert took_s < BOUND_S
    assert memory_mb("VmHWM") - before_mb < MEMORY_MB


def test_there_are_enough_cases_and_no_two_are_the_same() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 200


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.plain_dials], ids=lambda case: case.name
)
def test_plain_requests_dials_the_refused_address(case: Case, world: World) -> None:
    """A case on which the unguarded library passes could never fail."""
    world.script = case.script
    world.names |= {name: list(answers) for name, answers in case.names.items()}
    with suppress(requests.RequestException):
        requests.get(case.url, timeout=TIMEOUT_S)
    assert world.refused


# what the environment may not change --------------------------------------------------------------


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"])
def test_a_proxy_in_the_environment_is_not_used(
    variable: str, world: World, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "http://10.0.0.9:3128")
    assert outcome(fetcher, "http://public.test/") == "ok"
    assert world.refused == []
    with suppress(requests.RequestException):
        requests.get("http://public.test/", timeout=TIMEOUT_S)
    assert world.refused


def test_no_password_from_netrc_is_sent(
    world: World, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine public.test login me password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert outcome(fetcher, "http://public.test/") == "ok"
    requests.get("http://public.test/", timeout=TIMEOUT_S)
    assert ["Authorization" in head for head in world.heads] == [False, True]


def test_cookies_are_neither_kept_nor_sent(world: World, fetcher: Fetcher) -> None:
    world.script = answer(CLIP, "Set-Cookie: id=1; Path=/")
    assert [outcome(fetcher, "http://public.test/") for _ in range(2)] == ["ok", "ok"]
    assert not any("Cookie" in head for head in world.heads)


def test_the_request_names_its_contact_and_accepts_no_compression(world: World) -> None:
    limits = settings.Fetch(contact="https://example.org/bot")
    with closing(Fetcher(limits)) as fetcher:
        assert outcome(fetcher, "http://public.test/a b?c=d#e") == "ok"
    head = world.heads[0]
    assert head.startswith("GET /a%20b?c=d HTTP/1.1\r\n")
    assert "User-Agent: Earmark (https://example.org/bot)\r\n" in head
    assert "Accept-Encoding: identity\r\n" in head
    assert "Host: public.test\r\n" in head


# TLS ----------------------------------------------------------------------------------------------


def test_the_certificate_is_checked_against_the_name(world: World, fetcher: Fetcher) -> None:
    world.names["other.test"] = [[PUBLIC]]
    assert outcome(fetcher, "https://public.test/") == "ok"
    assert outcome(fetcher, f"https://{PUBLIC}/") == "ok"
    assert outcome(fetcher, "https://other.test/") == "tls"
    assert world.server_names == ["public.test", None, "other.test"]


def test_an_expired_certificate_is_refused(
    world: World, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    expired = world.authority.issue_cert("public.test", not_before=yesterday, not_after=yesterday)
    monkeypatch.setattr(world, "certificate", expired)
    with pytest.raises(errors.Tls, match="certificate has expired"):
        fetcher.fetch("https://public.test/")


def test_an_unknown_authority_is_refused(
    world: World, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "certificate", trustme.CA().issue_cert("public.test"))
    assert outcome(fetcher, "https://public.test/") == "tls"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        pytest.param(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na"), "tls", id="plain HTTP"),
        pytest.param(lambda talk: talk.stopped.wait(), "timeout", id="a stalled handshake"),
        pytest.param(lambda talk: talk.close(), "tls", id="a closed handshake"),
        pytest.param(
            lambda talk: talk.send_for_ever(b"\x16\x03\x03\x40\x00" + bytes(16384)),
            "http_error",
            id="noise",
        ),
        pytest.param(
            lambda talk: talk.send_for_ever(b"\x16\x03\x03\x00\x04\0\0\0\0", every_s=0.05),
            "timeout",
            id="a dripping handshake",
        ),
    ],
)
def test_a_server_without_tls_ends_in_time(
    script: Script, code: str, world: World, fetcher: Fetcher
) -> None:
    world.tls, world.script = False, script
    start = time.monotonic()
    assert outcome(fetcher, "https://public.test/") == code
    assert time.monotonic() - start < BOUND_S


def test_the_deadline_holds_inside_tls(world: World, fetcher: Fetcher) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"
    world.script = lambda talk: (talk.send(head), talk.send_for_ever(b"a", every_s=0.05))
    start = time.monotonic()
    assert outcome(fetcher, "https://public.test/") == "timeout"
    assert time.monotonic() - start < BOUND_S


# names --------------------------------------------------------------------------------------------


def test_a_resolver_that_hangs_costs_no_more_than_the_deadline(
    world: World, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: released.wait())
    start = time.monotonic()
    assert outcome(fetcher, "http://public.test/") == "dns"
    assert time.monotonic() - start < BOUND_S
    released.set()


@pytest.mark.parametrize(
    "error", [socket.gaierror(socket.EAI_AGAIN, "later"), UnicodeError("label too long")]
)
def test_a_resolver_that_fails_is_a_dns_error(
    error: Exception, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert outcome(fetcher, "http://public.test/") == "dns"


def test_a_name_is_resolved_once_for_each_connection_and_the_checked_address_is_dialled(
    world: World, fetcher: Fetcher
) -> None:
    world.names["rebind.test"] = [[PUBLIC], ["10.0.0.1"]]
    assert [outcome(fetcher, "http://rebind.test/") for _ in range(3)] == ["ok"] * 3
    assert world.resolved == ["rebind.test"]
    assert world.dialled == [PUBLIC]


def test_a_name_is_looked_up_once_in_a_while_and_its_addresses_checked_each_time(
    world: World, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.names["kept.test"] = [[PUBLIC], ["10.0.0.1"]]
    checked: list[str] = []
    check = Addresses.check
    monkeypatch.setattr(
        Addresses,
        "check",
        lambda self, address: (checked.append(address), check(self, address)),
    )
    for _ in range(2):
        assert outcome(fetcher, "http://kept.test/a") == "ok"
        fetcher.close()
    assert world.resolved == ["kept.test"]
    assert checked == [PUBLIC] * 4
    monkeypatch.setattr("earmark.core.resolver.KEPT_S", -1.0)
    fetcher._guard._resolver = Resolver()
    for expected in ("blocked_address", "blocked_address"):
        assert outcome(fetcher, "http://kept.test/a") == expected
        fetcher.close()
    assert world.resolved == ["kept.test"] * 3
    assert world.refused == []


def test_the_next_address_is_tried_when_one_does_not_answer(world: World, fetcher: Fetcher) -> None:
    world.names["twice.test"] = [[PUBLIC_6, PUBLIC]]
    world.dead = {PUBLIC_6}
    assert outcome(fetcher, "http://twice.test/") == "ok"
    assert world.dialled == [PUBLIC_6, PUBLIC]


def test_a_server_that_does_not_listen_is_a_connect_error(world: World, fetcher: Fetcher) -> None:
    world.dead = {PUBLIC}
    with pytest.raises(errors.Connect, match="Connection refused"):
        fetcher.fetch("http://public.test/")


def test_a_peer_that_is_not_the_checked_address_is_refused(
    world: World, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "getpeername", lambda _sock: ("10.0.0.1", 80))
    assert outcome(fetcher, "http://public.test/") == "blocked_address"
    assert world.heads == []


# kept connections ---------------------------------------------------------------------------------


def test_connections_are_reused(world: World, fetcher: Fetcher) -> None:
    assert [outcome(fetcher, f"https://public.test/{n}") for n in range(5)] == ["ok"] * 5
    assert world.dialled == [PUBLIC]


def test_a_kept_connection_the_server_closes_on_the_next_request_is_replaced(
    world: World, fetcher: Fetcher
) -> None:
    served: list[str] = []

    def second_request_is_cut(talk: Talk) -> None:
        served.append(talk.path)
        talk.close() if len(served) == 2 else answer()(talk)

    world.script = second_request_is_cut
    assert [outcome(fetcher, f"http://public.test/{n}") for n in range(2)] == ["ok", "ok"]
    assert served == ["/0", "/1", "/1"]


def test_a_server_that_always_closes_is_asked_once(world: World, fetcher: Fetcher) -> None:
    world.script = Talk.close
    assert outcome(fetcher, "http://public.test/") == "connect"
    assert len(world.heads) == 1


def test_bytes_left_over_from_one_answer_never_become_the_next(
    world: World, fetcher: Fetcher
) -> None:
    world.script = raw(
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nxyz",
        close=False,
    )
    for _ in range(3):
        with fetcher.fetch("http://public.test/").file as file:
            assert file.read() == b"abc"


# the settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "address", "code"),
    [
        ({"allow_networks": "10.0.0.0/8"}, "10.1.2.3", None),
        ({"allow_networks": "10.0.0.0/8"}, "192.168.0.1", "blocked_address"),
        ({"allow_networks": "10.0.0.0/8"}, "::ffff:10.1.2.3", "blocked_address"),
        (
            {"allow_networks": "10.0.0.0/8", "deny_networks": "10.1.0.0/16"},
            "10.1.2.3",
            "blocked_address",
        ),
        ({"allow_networks": "fd00::/8"}, "fd00::1", None),
        ({"allow_networks": "::1/128"}, "::1", None),
        ({"deny_networks": "93.184.216.0/24"}, PUBLIC, "blocked_address"),
        ({"deny_networks": "2606:2800::/32"}, PUBLIC_6, "blocked_address"),
        ({"allow_networks": "64:ff9b::/96"}, "64:ff9b::5db8:d822", None),
        ({"allow_networks": "64:ff9b::/96"}, "64:ff9b::a9fe:a9fe", "blocked_address"),
        (
            {"allow_networks": "64:ff9b::/96", "deny_networks": "93.184.216.0/24"},
            "64:ff9b::5db8:d822",
            "blocked_address",
        ),
        ({"allow_networks": "2002::/16"}, "2002:a00:1::1", "blocked_address"),
        ({"allow_networks": "::/0"}, "::ffff:10.1.2.3", "blocked_address"),
        ({"allow_networks": "::ffff:0:0/96,10.0.0.0/8"}, "::ffff:10.1.2.3", None),
    ],
)
def test_networks_can_be_allowed_and_denied(
    options: dict[str, str], address: str, code: str | None
) -> None:
    addresses = Addresses(settings.Fetch(**options))
    if code is None:
        addresses.check(address)
    else:
        with pytest.raises(errors.BlockedAddress):
            addresses.check(address)


def test_this_machine_is_not_dialled_by_its_public_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": [SimpleNamespace(address=PUBLIC)]})
    with pytest.raises(errors.BlockedAddress):
        Addresses(settings.Fetch()).check(PUBLIC)


def test_no_redirect_is_followed_when_none_is_allowed(world: World) -> None:
    world.script = answer(b"", "Location: /next", status="302 Found")
    with closing(Fetcher(settings.Fetch(max_redirects=0))) as fetcher:
        assert outcome(fetcher, "http://public.test/") == "http_error"
    assert len(world.heads) == 1


# secrets ------------------------------------------------------------------------------------------

SIGNED = "http://public.test/clip.wav?X-Amz-Signature=CANARY"


def fails_with_the_url_in_its_text(talk: Talk) -> None:
    talk.send(b"HTTP/1.1 200 OK\r\nno header\r\nContent-Length: 9000\r\n\r\n")
    talk.close()


@pytest.mark.parametrize(
    ("url", "script"),
    [
        (SIGNED, fails_with_the_url_in_its_text),
        (SIGNED, raw(b"not HTTP")),
        (SIGNED, Talk.close),
        (SIGNED, answer(status="404 Not Found")),
        (SIGNED, answer(b"", "Location: http://10.0.0.1/?CANARY", status="302 Found")),
        (SIGNED, answer(b"", "Location: http://[?CANARY", status="302 Found")),
        (SIGNED, answer(b"", "Location: http://CANARY@10.0.0.1/", status="302 Found")),
        (SIGNED.replace("http:", "https:").replace("public", "other"), answer()),
        (SIGNED.replace("public", "unknown"), answer()),
        (SIGNED.replace("public.test", "public.test:99"), answer()),
        (SIGNED.replace("public.test", "[public.test"), answer()),
        (SIGNED.replace("http:", "ftp:"), answer()),
    ],
)
def test_no_error_traceback_or_log_contains_a_signature(
    url: str, script: Script, world: World, fetcher: Fetcher, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    world.script = script
    world.names["other.test"] = [[PUBLIC]]
    with pytest.raises(errors.DownloadError) as caught:
        fetcher.fetch(url)
    logging.getLogger("tests").error("failed", exc_info=caught.value)
    assert "CANARY" not in caplog.text
    assert "CANARY" not in "".join(traceback.format_exception(caught.value))
    assert "CANARY" not in repr(caught.value.facts)
