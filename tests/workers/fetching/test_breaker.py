"""When a worker believes that the network is down."""

from __future__ import annotations

import pytest

from earmark.core import errors
from workers.fetching.breaker import LONGEST_PAUSE_S, Breaker

DNS = errors.Dns(host="h")
CONNECT = errors.Connect(reason="Network is unreachable")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock)


def fail(breaker: Breaker, times: int, *, hosts: int = 10) -> None:
    for n in range(times):
        breaker.record(f"host{n % hosts}", (DNS, CONNECT)[n % 2])


def test_the_breaker_opens_if_downloads_from_many_hosts_find_no_network(breaker: Breaker) -> None:
    fail(breaker, 19)
    assert not breaker.open
    fail(breaker, 1)
    assert breaker.open


@pytest.mark.parametrize(("successes", "expected"), [(2, True), (3, False)])
def test_nine_failures_in_ten_open_the_breaker(
    successes: int, expected: bool, breaker: Breaker
) -> None:
    for _ in range(successes):
        breaker.record("fine", None)
    fail(breaker, 20 - successes)
    assert breaker.open is expected


def test_a_few_dead_hosts_do_not_open_the_breaker(breaker: Breaker) -> None:
    fail(breaker, 200, hosts=4)
    assert not breaker.open


@pytest.mark.parametrize(
    "error",
    [
        errors.NotFound(status=404),
        errors.Timeout(timeout_s=1),
        errors.ServerError(status=500),
        None,
    ],
)
def test_any_answer_of_a_server_proves_a_network(
    error: errors.ClipError | None, breaker: Breaker
) -> None:
    for n in range(100):
        breaker.record(f"host{n}", error)
    assert not breaker.open


def test_the_breaker_closes_for_a_try_and_a_failure_doubles_its_pause(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker, 20)
    for pause_s in (15, 30, 60, LONGEST_PAUSE_S, LONGEST_PAUSE_S):
        clock.now += pause_s - 0.1
        assert breaker.open
        clock.now += 0.2
        assert not breaker.open
        fail(breaker, 1)
        assert breaker.open


def test_downloads_in_progress_do_not_prolong_the_pause(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 50)
    clock.now += 15.1
    assert not breaker.open


def test_a_success_closes_the_breaker_and_clears_its_history(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker, 20)
    breaker.record("host1", None)
    assert not breaker.open
    fail(breaker, 18)
    assert not breaker.open
    fail(breaker, 1)
    assert breaker.open
    clock.now += 15.1
    assert not breaker.open
