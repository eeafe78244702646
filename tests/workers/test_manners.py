"""Politeness of several workers together, on a real embedded Valkey."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
import redis

from earmark import errors, settings
from tests.servers import running_valkey
from workers import manners
from workers.fetch import Fetcher
from workers.manners import Manners

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


def workers(client: redis.Redis, count: int, **limits: float) -> list[Manners]:
    return [Manners(client, settings.Fetch(**limits), LEDGER) for _ in range(count)]


def test_a_worker_keeps_to_its_own_connections(client: redis.Redis) -> None:
    (worker,) = workers(client, 1, host_concurrency=2)
    assert [worker.wait_s("a"), worker.wait_s("a")] == [0, 0]
    assert worker.wait_s("a") > 0
    assert worker.wait_s("b") == 0
    worker.done("a")
    assert worker.wait_s("a") == 0


def test_all_workers_together_keep_to_the_slots(client: redis.Redis) -> None:
    one, two = workers(client, 2, host_slots=3)
    assert [one.wait_s("a"), two.wait_s("a"), one.wait_s("a")] == [0, 0, 0]
    assert two.wait_s("a") > 0
    assert two.wait_s("b") == 0
    one.done("a")
    assert two.wait_s("a") == 0
    assert one.wait_s("a") > 0


def test_the_slot_of_a_dead_worker_is_free_again(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manners, "SLOT_GRACE_S", 0.3)
    dead, living = workers(client, 2, host_slots=2, timeout_s=0.3)
    assert dead.wait_s("a") == 0
    time.sleep(0.4)
    assert [living.wait_s("a"), living.wait_s("a") > 0] == [0, True]  # its slot keeps the host's list alive
    time.sleep(0.4)
    assert living.wait_s("a") == 0


def test_a_refused_clip_takes_nothing(client: redis.Redis) -> None:
    one, two = workers(client, 2, host_slots=1, host_concurrency=1)
    assert one.wait_s("a") == 0
    assert all(two.wait_s("a") > 0 for _ in range(5))
    one.done("a")
    assert two.wait_s("a") == 0


def test_who_comes_too_early_is_told_a_moment_of_its_own(client: redis.Redis) -> None:
    (worker,) = workers(client, 1, host_rate=10, host_concurrency=1000)
    waits = [worker.wait_s("a") for _ in range(23)]
    assert waits[:3] == [0, 0, 0]  # a quarter of a second may be caught up
    told = [wait for wait in waits if wait]
    assert len(told) == 20
    assert all(abs(wait - 0.1 * n) < 0.3 for n, wait in enumerate(told, 1))
    assert worker.wait_s("b") == 0


LOOP = """
import sys, time, redis
from earmark import errors, settings
from workers.manners import Manners
worker = Manners(redis.Redis.from_url(sys.argv[1]), settings.Fetch(host_rate=20), settings.Ledger())
worker.wait_s("warm-up")
print("ready", flush=True)
end = time.time() + float(sys.stdin.readline())
asked = 0
while time.time() < end:
    wait_s = worker.wait_s("a")
    if wait_s:
        time.sleep(min(wait_s, max(0, end - time.time())))
    else:
        asked += 1
        worker.done("a")
print(asked)
"""


def test_four_processes_together_hold_the_rate(client: redis.Redis, server: str) -> None:
    command = [sys.executable, "-c", LOOP, server]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(4)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("5\n")
    asked = [int(process.communicate()[0]) for process in processes]
    assert 20 * 5 * 0.9 <= sum(asked) <= 20 * 5 * 1.1
    assert min(asked) > 0


def test_a_host_that_asks_for_a_pause_gets_it_from_all_workers(client: redis.Redis) -> None:
    one, two = workers(client, 2)
    one.block("a", 7)
    assert 6 < two.wait_s("a") < 8
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


def test_nothing_stays_in_redis(client: redis.Redis) -> None:
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


def test_redis_is_asked_again_after_a_while(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manners, "AWAY_S", 0.2)
    (worker,) = workers(client, 1, host_slots=1)
    with monkeypatch.context() as broken:
        broken.setattr(client, "connection_pool", redis.ConnectionPool(port=1, retry=None))
        assert [worker.wait_s("a"), worker.wait_s("a")] == [0, 0]
    assert worker.wait_s("a") == 0
    time.sleep(0.3)
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


# robots.txt -----------------------------------------------------------------------------------------------------------

RULES = "User-agent: *\nDisallow: /private/\n\nUser-agent: Earmark\nDisallow: /secret/\n"


def outcomes(httpserver: HTTPServer, *paths: str, robots: bool = True) -> list[str]:
    httpserver.expect_request("/open/a.wav").respond_with_data(b"clip")
    httpserver.expect_request("/secret/a.wav").respond_with_data(b"clip")
    limits = settings.Fetch(allow_networks=("127.0.0.0/8", "::1/128"), ports=(httpserver.port,), robots=robots)
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


def test_robots_txt_is_asked_once_a_site_and_obeyed(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/robots.txt").respond_with_data(RULES)
    assert outcomes(httpserver, "/open/a.wav", "/secret/a.wav", "/open/a.wav") == ["ok", "robots", "ok"]
    assert asked_for_rules(httpserver) == 1


def test_robots_txt_is_not_asked_unless_wanted(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/robots.txt").respond_with_data(RULES)
    assert outcomes(httpserver, "/secret/a.wav", robots=False) == ["ok"]
    assert asked_for_rules(httpserver) == 0


def test_a_site_without_rules_allows_all(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/robots.txt").respond_with_data("", status=404)
    assert outcomes(httpserver, "/open/a.wav", "/secret/a.wav") == ["ok", "ok"]


def test_a_site_that_fails_to_say_is_asked_again_later(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/robots.txt").respond_with_data("", status=503)
    assert outcomes(httpserver, "/open/a.wav", "/open/a.wav") == ["server_error"] * 2
    assert asked_for_rules(httpserver) == 2


def test_a_url_that_does_not_parse_is_refused_before_its_robots_txt(httpserver: HTTPServer) -> None:
    limits = settings.Fetch(robots=True)
    with closing(Fetcher(limits)) as fetcher:
        assert [_outcome(fetcher, url) for url in ("http://[", "http://u@h/", "http://10.0.0.1/")] == [
            "bad_url",
            "bad_url",
            "blocked_address",
        ]
