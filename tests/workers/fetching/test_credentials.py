"""Headers and logins reach the hosts they are for, and no other."""

from __future__ import annotations

import logging
import os
import traceback
from base64 import b64encode
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from earmark.children import environment
from earmark.core import errors, settings
from earmark.core.credentials import Credentials
from earmark.core.errors import ServiceError
from earmark.core.settings import Settings
from tests.workers.fetching.http_world import PUBLIC, Talk, World, answer, raw
from workers.fetching.fetch import Fetcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECRET = "CANARY0123456789"


@pytest.fixture
def world(internet: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    internet.reset()
    internet.install(monkeypatch)
    monkeypatch.setenv("SSL_CERT_FILE", str(internet.ca_file))
    internet.names["public.test"] = [[PUBLIC]]
    internet.names["other.test"] = [[PUBLIC]]
    yield internet
    internet.reset()


def ask(url: str, **limits: Any) -> str:
    """Fetch a URL with these settings; return how it ended."""
    with closing(Fetcher(settings.Fetch(timeout_s=5, **limits))) as fetcher:
        try:
            fetcher.fetch(url).file.close()
        except errors.DownloadError as error:
            return error.code
    return "ok"


# host patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "url", "matches"),
    [
        ("example.org", "https://example.org/a", True),
        ("EXAMPLE.org", "https://example.org:443/a", True),
        ("example.org", "http://example.org/a", False),
        ("http://example.org", "http://example.org/a", True),
        ("http://example.org", "https://example.org/a", False),
        ("example.org", "https://example.org:8443/a", False),
        ("example.org:8443", "https://example.org:8443/a", True),
        ("example.org", "https://www.example.org/a", False),
        ("*.example.org", "https://www.example.org/a", True),
        ("*.example.org", "https://a.b.example.org/a", True),
        ("*.example.org", "https://example.org/a", False),
        ("*.example.org", "https://badexample.org/a", False),
        ("example.org", "https://example.org.evil.test/a", False),
        ("example.org", "https://evil.test/example.org", False),
        ("example.org", "https://evil.test/?https://example.org", False),
        ("[2001:db8::1]:8443", "https://[2001:db8::1]:8443/a", True),
    ],
)
def test_a_pattern_names_whole_labels_a_scheme_and_a_port(
    pattern: str, url: str, matches: bool
) -> None:
    fetch = settings.Fetch(headers={pattern: {"X-Key": "1"}})
    assert bool(Credentials(fetch.headers, fetch.tokens, fetch.basic_auth).headers(url)) == matches


def test_the_later_of_two_patterns_wins() -> None:
    fetch = settings.Fetch(
        headers={"*.a.org": {"x-key": "1", "User-Agent": "me"}, "b.a.org": {"X-Key": "2"}},
        tokens={"b.a.org": "t"},
    )
    headers = Credentials(fetch.headers, fetch.tokens, fetch.basic_auth).headers("https://b.a.org/")
    assert headers == {"x-key": "2", "user-agent": "me", "authorization": "Bearer t"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HEADERS", f'{{"{SECRET}'),
        ("HEADERS", f'["{SECRET}"]'),
        ("HEADERS", f'{{"example.org": "{SECRET}"}}'),
        ("HEADERS", f'{{"example.org": {{"X": "{SECRET}\\r\\nHost: a"}}}}'),
        ("HEADERS", f'{{"example.org": {{"X Y": "{SECRET}"}}}}'),
        ("HEADERS", f'{{"example.org": {{"Host": "{SECRET}"}}}}'),
        ("TOKENS", f'{{"*": "{SECRET}"}}'),
        ("TOKENS", f'{{"*example.org": "{SECRET}"}}'),
        ("TOKENS", f'{{"example.org/path": "{SECRET}"}}'),
        ("TOKENS", f'{{"ftp://example.org": "{SECRET}"}}'),
        ("TOKENS", f'{{"example.org": "{SECRET}\\n"}}'),
        ("BASIC_AUTH", f'{{"example.org": "{SECRET}"}}'),
        ("PROXY", f"socks5://me:{SECRET}@proxy:1080"),
        ("PROXY", f"http://me:{SECRET}@proxy"),
        ("PROXY", f"http://me:{SECRET}@proxy:port"),
    ],
)
def test_a_wrong_setting_is_one_sentence_that_names_it_and_not_its_value(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"EARMARK_FETCH__{name}", value)
    with pytest.raises(ServiceError, match=f"The setting EARMARK_FETCH__{name} is wrong") as caught:
        Settings.read()
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_secrets_are_in_no_repr_and_reach_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EARMARK_FETCH__BASIC_AUTH", f'{{"example.org": "me:{SECRET}"}}')
    changed = Settings.read().changed(
        fetch={"tokens": {"a.org": SECRET}, "proxy": f"http://me:{SECRET}@proxy:3128"}
    )
    assert SECRET not in repr(changed)
    monkeypatch.setattr(os, "environ", environment(changed))
    assert Settings.read().fetch == changed.fetch


# requests -----------------------------------------------------------------------------------------


def test_tokens_logins_and_headers_are_sent_to_their_host(world: World) -> None:
    login = b64encode(b"me:p:w").decode()
    for sent, limits in {
        f"authorization: Bearer {SECRET}": {"tokens": {"public.test": SECRET}},
        f"authorization: Basic {login}": {"basic_auth": {"public.test": "me:p:w"}},
        f"x-api-key: {SECRET}": {"headers": {"*.test": {"X-Api-Key": SECRET}}},
        "user-agent: Mozilla/5.0": {"headers": {"public.test": {"User-Agent": "Mozilla/5.0"}}},
    }.items():
        assert ask("https://public.test/a", **limits) == "ok"
        assert sent in world.heads[-1]


@pytest.mark.parametrize(
    "target",
    ["https://other.test/b", "https://public.test.other.test/b", "https://public.test:444/b"],
)
def test_a_redirect_to_another_host_or_port_gets_no_secret(target: str, world: World) -> None:
    world.names["public.test.other.test"] = [[PUBLIC]]
    world._ports[444] = world._ports[443]
    world.certificate = world.authority.issue_cert(
        "public.test", "other.test", "public.test.other.test"
    )

    def script(talk: Talk) -> None:
        if talk.path == "/a":
            answer(b"", f"Location: {target}", "Set-Cookie: c=CANARY", status="302 Found")(talk)
        else:
            answer()(talk)

    world.script = script
    limits = {
        "tokens": {"public.test": SECRET},
        "headers": {"public.test": {"X-Key": SECRET, "Cookie": SECRET}},
        "ports": (443, 444),
    }
    assert ask("https://public.test/a", **limits) == "ok"
    first, second = world.heads
    assert first.count(SECRET) == 3
    assert SECRET not in second


def test_a_secret_is_not_sent_over_plain_http_unless_its_pattern_says_so(world: World) -> None:
    assert ask("http://public.test/a", tokens={"public.test": SECRET}) == "ok"
    assert SECRET not in world.heads[-1]
    assert ask("http://public.test/a", tokens={"http://public.test": SECRET}) == "ok"
    assert SECRET in world.heads[-1]


# cookies ------------------------------------------------------------------------------------------


def cookie_gate(target: str = "") -> Callable[[Talk], None]:
    def script(talk: Talk) -> None:
        if talk.path == "/a":
            answer(b"", f"Location: {target}/b", "Set-Cookie: seen=1; Path=/", status="302 Found")(
                talk
            )
        else:
            answer()(talk)

    return script


def test_a_cookie_is_kept_within_one_clips_redirects_only(world: World) -> None:
    world.script = cookie_gate()
    with closing(Fetcher(settings.Fetch(timeout_s=5))) as fetcher:
        for _ in range(2):
            fetcher.fetch("http://public.test/a").file.close()
    cookies = ["seen=1" in head for head in world.heads]
    assert cookies == [False, True, False, True]


@pytest.mark.parametrize("target", ["http://other.test", f"http://{PUBLIC}"])
def test_a_cookie_goes_to_no_other_host(target: str, world: World) -> None:
    world.script = cookie_gate(target)
    assert ask("http://public.test/a") == "ok"
    assert len(world.heads) == 2
    assert "seen=1" not in world.heads[1]


# errors -------------------------------------------------------------------------------------------

SECRETS = {
    "headers": {"public.test": {"X-Key": SECRET}, "http://public.test": {"X-Key": SECRET}},
    "tokens": {"public.test": SECRET, "http://public.test": SECRET},
    "proxy": f"http://{SECRET}:{SECRET}@proxy.test:3128",
}


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "script",
    [
        answer(status="401 Unauthorized"),
        raw(b"not HTTP"),
        Talk.close,
        answer(b"", "Location: http://10.0.0.1/", status="302 Found"),
    ],
)
@pytest.mark.parametrize("proxied", ["200 OK", "407 Login", "502 Bad", "403 No", None])
def test_no_error_traceback_or_log_contains_a_secret(
    scheme: str,
    script: Callable[[Talk], None],
    proxied: str | None,
    world: World,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    world.script = script
    limits = dict(SECRETS)
    if proxied is None:
        del limits["proxy"]
    else:
        world.names["proxy.test"] = [["10.9.9.9"]]
        world.proxy_answers = lambda _: proxied
    with (
        closing(Fetcher(settings.Fetch(timeout_s=5, **limits))) as fetcher,
        pytest.raises(errors.DownloadError) as caught,
    ):
        fetcher.fetch(f"{scheme}://public.test/a")
    logging.getLogger("tests").error("failed", exc_info=caught.value)
    for text in (caplog.text, repr(caught.value.facts), str(caught.value)):
        assert SECRET not in text
        assert b64encode(f"{SECRET}:{SECRET}".encode()).decode() not in text
