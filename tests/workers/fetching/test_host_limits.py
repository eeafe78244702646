"""Politeness of several workers together, on a real embedded Valkey."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import redis

from earmark.core import errors, settings
from tests.servers import running_valkey
from workers.fetching import host_limits
from workers.fetching.fetch import Fetcher
from workers.fetching.host_limits import HostLimits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_httpserver import HTTPServer

LEDGER = settings.Ledger(retry_cap_s=100)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
def client(server: str) -> Iterator[redis.Redis]:
    with closing(redis.Redis.from_url(server)) as client:
        client.flushall()
        yield client


def workers(client: redis.Redis, count: int, **limits: float) -> list[HostLimits]:
    return [HostLimits(client, settings.Fetch(**limits), LEDGER) for _ in range(count)]


def test_a_worker_keeps_its_own_connection_limit(client: redis.Redis) -> None:
    (worker,) = workers(client, 1, host_concurrency=2)
    assert [worker.wait_s("a"), worker.wait_s("a")] == [0, 0]
    assert worker.wait_s("a") > 0
    assert worker.wait_s("b") == 0
    worker.done("a")
    assert worker.wait_s("a") == 0


def test_all_workers_together_keep_the_slots(client: redis.Redis) -> None:
    one, two = workers(client, 2, host_slots=3)
    assert [one.wait_s("a"), two.wait_s("a"), one.wait_s("a")] == [0, 0, 0]
    assert two.wait_s("a") > 0
    assert two.wait_s("b") == 0
    one.done("a")
    assert two.wait_s("a") == 0
    assert one.wait_s("a") > 0


def test_the_slot_of_a_dead_worker_is_free_again(client: redis.Redis) -> None:
    dead, living = workers(client, 2, host_slots=2, timeout_s=60 - host_limits.SLOT_GRACE_S)
    assert dead.wait_s("a") == 0
    age_slots(client, 40)
    assert [living.wait_s("a"), living.wait_s("a") > 0] == [
        0,
        True,
    ]  # its slot keeps the host's list alive
    age_slots(client, 40)
    assert living.wait_s("a") == 0


def age_slots(client: redis.Redis, seconds: int) -> None:
    """Make the slots of host `a` and their key so much older, instead of waiting."""
    key = host_limits._keys("a")[2]
    for member in client.zrange(key, 0, -1):
        client.zincrby(key, -1000 * seconds, member)
    client.pexpire(key, client.pttl(key) - 1000 * seconds)


def test_a_refused_request_takes_no_slot(client: redis.Redis) -> None:
    one, two = workers(client, 2, host_slots=1, host_concurrency=1)
    assert one.wait_s("a") == 0
    assert all(two.wait_s("a") > 0 for _ in range(5))
    one.done("a")
    assert two.wait_s("a") == 0


def test_early_requests_are_spread_one_interval_apart(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A hundred times slower than usual, so that the time the questions take does not matter.
    interval_s = 10
    monkeypatch.setattr(host_limits, "BURST_S", 2.5 * interval_s)
    monkeypatch.setattr(host_limits, "LONGEST_WAIT_S", 100.0 * interval_s)
    (worker,) = workers(client, 1, host_rate=1 / interval_s, host_concurrency=1000)
    waits = [worker.wait_s("a") for _ in range(23)]
    assert waits[:3] == [0, 0, 0]  # two and a half intervals may be caught up
    for place, wait_s in enumerate(waits[3:], 3):
        assert interval_s * (place - 0.5) < wait_s <= interval_s * place * 1.05
    assert worker.wait_s("b") == 0


RATE, SECONDS = 20, 5
LOOP = """
import sys, time, redis
from earmark.core import settings
from workers.fetching.host_limits import BURST_S, HostLimits
rate, seconds = map(int, sys.argv[2:])
client = redis.Redis.from_url(sys.argv[1])
worker = HostLimits(client, settings.Fetch(host_rate=rate), settings.Ledger())
worker.wait_s("warm-up")
print("ready", flush=True)
sys.stdin.readline()
started = time.time()
asked, late_s = 0, 0.0
while (now := time.time()) < started + seconds:
    wait_s = worker.wait_s("a")
    if wait_s:
        time.sleep(wait_s)
        late_s += max(0, time.time() - now - wait_s - BURST_S)
    else:
        asked += 1
        worker.done("a")
print(asked, started, time.time(), late_s)
"""


@pytest.mark.slow
def test_four_processes_together_hold_the_rate(client: redis.Redis, server: str) -> None:
    command = [sys.executable, "-c", LOOP, server, str(RATE), str(SECONDS)]
    with ExitStack() as stack:
        processes = [stack.enter_context(started(command)) for _ in range(4)]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
        reports = [map(float, process.communicate()[0].split()) for process in processes]
    asked, begun, ended, late_s = zip(*reports, strict=True)
    # What a busy machine oversleeps is lost to the host.
    assert sum(asked) >= 0.9 * RATE * (SECONDS - sum(late_s))
    assert sum(asked) <= 1.1 * RATE * (max(ended) - min(begun))
    assert min(asked) > 0


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_host_that_asks_for_a_pause_gets_it_from_all_workers(client: redis.Redis) -> None:
    one, two = workers(client, 2)
    one.block("a", 70)
    assert 50 < two.wait_s("a") <= 70 * 1.05
    assert two.wait_s("b") == 0


def test_a_pause_is_capped_and_only_ever_lengthened(client: redis.Redis) -> None:
    (worker,) = workers(client, 1)
    worker.block("a", 1e9)
    worker.block("a", 1)
    worker.block("a", -1)
    assert 90 < worker.wait_s("a") <= 105
    worker.block("b", 1)
    worker.block("b", 50)
    assert worker.wait_s("b") > 40


def test_every_key_in_redis_expires(client: redis.Redis) -> None:
    (worker,) = workers(client, 1, host_rate=10, host_slots=1)
    worker.block("b", 5)
    for host in ("a", "a", "a", "b", "c"):
        worker.wait_s(host)
    keys = client.keys()
    assert len(keys) == 5
    assert all(0 < client.ttl(key) <= 66 for key in keys)


def test_without_redis_only_the_workers_own_limit_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(redis.Redis(port=1, retry=None)) as nobody:
        (worker,) = workers(nobody, 1, host_rate=1, host_slots=1, host_concurrency=3)
        assert [worker.wait_s("a") for _ in range(3)] == [0, 0, 0]
        assert worker.wait_s("a") > 0
        worker.block("a", 60)
        worker.done("a")
        assert worker.wait_s("a") == 0


def test_redis_is_asked_again_after_a_while(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(host_limits, "time", SimpleNamespace(monotonic=lambda: clock.now))
    (worker,) = workers(client, 1, host_slots=1)
    with monkeypatch.context() as broken:
        broken.setattr(client, "connection_pool", redis.ConnectionPool(port=1, retry=None))
        assert [worker.wait_s("a"), worker.wait_s("a")] == [0, 0]
    assert worker.wait_s("a") == 0
    clock.now += host_limits.AWAY_S + 0.1
    assert [worker.wait_s("a") > 0, worker.wait_s("a") > 0] == [False, True]


def test_threads_never_hold_more_than_the_limit(client: redis.Redis) -> None:
    (worker,) = workers(client, 1, host_slots=4, host_concurrency=100)
    held, most = [], []

    def fetch(_: int) -> None:
        while worker.wait_s("a"):
            time.sleep(0.002)
        held.append(1)
        most.append(len(held))
        time.sleep(0.002)
        held.pop()
        worker.done("a")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(fetch, range(100)))
    assert max(most) == 4
    assert client.zcard("earmark:host:{a}:slots") == 0


# robots.txt ---------------------------------------------------------------------------------------

RULES = "User-agent: *\nDisallow: /private/\n\nUser-agent: Earmark\nDisallow: /secret/\n"


def outcomes(httpserver: HTTPServer, *paths: str, robots: bool = True) -> list[str]:
    httpserver.expect_request("/open/a.wav").respond_with_data(b"clip")
    httpserver.expect_request("/secret/a.wav").respond_with_data(b"clip")
    limits = settings.Fetch(
        allow_networks=("127.0.0.0/8", "::1/128"), ports=(httpserver.port,), robots=robots
    )
    with closing(Fetcher(limits)) as fetcher:
        return [_outcome(fetcher, httpserver.url_for(path)) for path in paths]


def _outcome(fetcher: Fetcher, url: str) -> str:
    try:
        fetcher.fetch(url).file.close()
    except errors.DownloadError as error:
        return error.code
    return "ok"


def asked_for_rules(httpserver: HTTPServer) -> int:
    return sum(request.path == "/robots.txt" for request, _ in httpserver.log)


def test_robots_txt_is_read_once_per_site_and_obeyed(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/robots.txt").respond_with_data(RULES)
    assert outcomes(httpserver, "/open/a.wav", "/secret/a.wav", "/open/a.wav") == [
        "ok",
        "robots",
        "ok",
    ]
    assert asked_for_rules(httpserver) == 1


def test_robots_txt_is_not_read_unless_enabled(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/robots.txt").respond_with_data(RULES)
    assert outcomes(httpserver, "/secret/a.wav", robots=False) == ["ok"]
    assert asked_for_rules(httpserver) == 0


def test_a_site_without_rules_allows_all(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/robots.txt").respond_with_data("", status=404)
    assert outcomes(httpserver, "/open/a.wav", "/secret/a.wav") == ["ok", "ok"]


def test_a_failed_robots_txt_is_asked_for_again(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/robots.txt").respond_with_data("", status=503)
    assert outcomes(httpserver, "/open/a.wav", "/open/a.wav") == ["server_error"] * 2
    assert asked_for_rules(httpserver) == 2


def test_a_url_that_does_not_parse_is_refused_before_its_robots_txt(httpserver: HTTPServer) -> None:
    limits = settings.Fetch(robots=True)
    with closing(Fetcher(limits)) as fetcher:
        assert [
            _outcome(fetcher, url) for url in ("http://[", "http://u@h/", "http://10.0.0.1/")
        ] == [
            "bad_url",
            "bad_url",
            "blocked_address",
        ]
