"""The batcher whose callers wait for futures."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from workers.scoring.futures import FutureBatcher

from earmark.core import errors, settings
from tests.workers.scoring.test_batcher import Fake

if TYPE_CHECKING:
    from collections.abc import Iterator


def window(value: float, length: int = 10) -> np.ndarray:
    return np.full(length, value, np.float32)


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def queue(fake: Fake) -> Iterator[FutureBatcher]:
    queue = FutureBatcher(fake, settings.Worker(in_flight_bytes=1000))
    yield queue
    fake.free.set()
    queue.close()


def test_a_failed_window_fails_its_own_future_only(queue: FutureBatcher) -> None:
    bad, good = queue.submit(window(-1), "none"), queue.submit(window(1), "none")
    with pytest.raises(errors.OutOfMemory):
        bad.result(timeout=30)
    assert good.result(timeout=30)[0] == 1


def test_submitting_blocks_while_waiting_windows_hold_all_bytes_in_flight(
    fake: Fake, queue: FutureBatcher
) -> None:
    fake.free.clear()
    queue.submit(window(99), "none")
    assert fake.started.acquire(timeout=30)
    queue.submit(window(1, length=200), "none")
    submitted = threading.Event()
    late = threading.Thread(
        target=lambda: (queue.submit(window(2, length=200), "none"), submitted.set())
    )
    late.start()
    assert not submitted.wait(timeout=0.1)
    fake.free.set()
    assert submitted.wait(timeout=30)
    late.join()


def test_a_window_larger_than_the_bytes_in_flight_is_taken_alone(queue: FutureBatcher) -> None:
    assert queue.submit(window(1, length=5000), "none").result(timeout=30)[0] == 1
