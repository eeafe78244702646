"""The batcher, with a fake model that says what it was given and waits where a test wants it to."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from earmark.core import errors, settings
from workers.scoring import batcher, classifier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Fake(classifier.Classifier):
    """Takes four windows of one length at once; logits: the first sample and its negative."""

    def __init__(self, lanes: int = 1) -> None:
        self.card = SimpleNamespace(function_to_apply="none", fixed=False, min_samples=1)  # type: ignore[assignment]
        self.limits = classifier.Limits(windows=4, samples=1e6, padding=1.0)
        self.device, self.lanes = "cpu", lanes
        self.free = threading.Event()
        self.free.set()
        self.started = threading.Semaphore(0)
        self.batches: list[list[float]] = []

    def outcomes(self, windows: Sequence[np.ndarray]) -> list[np.ndarray | errors.ClipError]:
        self.started.release()
        self.free.wait(timeout=30)
        self.batches.append([float(window[0]) for window in windows])
        return [
            errors.OutOfMemory() if window[0] < 0 else np.array([window[0], -window[0]])
            for window in windows
        ]

    def twin(self) -> Fake:
        return self


def window(value: float, length: int = 10) -> np.ndarray:
    return np.full(length, value, np.float32)


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def queue(fake: Fake) -> Iterator[batcher.Batcher]:
    queue = batcher.Batcher(fake, settings.Worker(in_flight_bytes=1000))
    yield queue
    fake.free.set()
    queue.close()


def hold(fake: Fake, queue: batcher.Batcher) -> Any:
    """Keep the model busy with one window."""
    fake.free.clear()
    future = queue.submit(window(99))
    assert fake.started.acquire(timeout=30)
    return future


def test_each_windows_scores_have_its_own_function_applied(queue: batcher.Batcher) -> None:
    plain, sigmoid = queue.submit(window(2)), queue.submit(window(2), "sigmoid")
    assert plain.result(timeout=30).tolist() == [2, -2]
    assert sigmoid.result(timeout=30) == pytest.approx([0.880797, 0.119203])


def test_the_windows_ready_when_the_model_is_free_make_a_batch(
    fake: Fake, queue: batcher.Batcher
) -> None:
    hold(fake, queue)
    futures = [queue.submit(window(number)) for number in range(5)]
    fake.free.set()
    assert [future.result(timeout=30)[0] for future in futures] == [0, 1, 2, 3, 4]
    assert fake.batches == [[99], [0, 1, 2, 3], [4]]


def test_batches_hold_like_lengths_and_the_oldest_window_goes_first(
    fake: Fake, queue: batcher.Batcher
) -> None:
    hold(fake, queue)
    futures = [queue.submit(window(number, length=20 if number % 2 else 10)) for number in range(4)]
    fake.free.set()
    for future in futures:
        future.result(timeout=30)
    assert fake.batches == [[99], [0, 2], [1, 3]]


def test_a_failed_window_fails_its_own_future_only(queue: batcher.Batcher) -> None:
    bad, good = queue.submit(window(-1)), queue.submit(window(1))
    with pytest.raises(errors.OutOfMemory):
        bad.result(timeout=30)
    assert good.result(timeout=30)[0] == 1


def test_a_cancelled_window_is_not_scored(fake: Fake, queue: batcher.Batcher) -> None:
    hold(fake, queue)
    dropped, kept = queue.submit(window(1)), queue.submit(window(2))
    assert dropped.cancel()
    fake.free.set()
    kept.result(timeout=30)
    assert fake.batches == [[99], [2]]


def test_submitting_blocks_while_waiting_windows_hold_all_bytes_in_flight(
    fake: Fake, queue: batcher.Batcher
) -> None:
    hold(fake, queue)
    queue.submit(window(1, length=200))
    submitted = threading.Event()
    late = threading.Thread(target=lambda: (queue.submit(window(2, length=200)), submitted.set()))
    late.start()
    assert not submitted.wait(timeout=0.1)
    fake.free.set()
    assert submitted.wait(timeout=30)
    late.join()


def test_a_window_larger_than_the_bytes_in_flight_is_taken_alone(queue: batcher.Batcher) -> None:
    assert queue.submit(window(1, length=5000)).result(timeout=30)[0] == 1


def test_closing_scores_the_waiting_windows_and_takes_no_more(
    fake: Fake, queue: batcher.Batcher
) -> None:
    hold(fake, queue)
    waiting = queue.submit(window(1))
    fake.free.set()
    queue.close()
    assert waiting.result(timeout=0)[0] == 1
    with pytest.raises(RuntimeError, match="closed"):
        queue.submit(window(2))


def test_each_lane_takes_a_batch_of_its_own() -> None:
    fake = Fake(lanes=2)
    queue = batcher.Batcher(fake, settings.Worker())
    fake.free.clear()
    futures = [queue.submit(window(number, length=10 * number)) for number in (1, 2)]
    assert all(fake.started.acquire(timeout=30) for _ in range(2))
    fake.free.set()
    assert [future.result(timeout=30)[0] for future in futures] == [1, 2]
    queue.close()


def test_many_threads_get_their_own_scores() -> None:
    fake = Fake(lanes=3)
    queue = batcher.Batcher(fake, settings.Worker(in_flight_bytes=1000))
    got: dict[int, list[float]] = {}

    def work(thread: int) -> None:
        futures = [
            queue.submit(window(100 * thread + number, length=1 + number % 7))
            for number in range(100)
        ]
        got[thread] = [float(future.result(timeout=30)[0]) for future in futures]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.close()
    assert got == {
        thread: [100.0 * thread + number for number in range(100)] for thread in range(8)
    }


SILENT = """
import numpy as np
from earmark.core import settings
from tests.workers.scoring.test_batcher import Fake, batcher
fake = Fake()
fake.free.clear()
queue = batcher.Batcher(fake, settings.Worker(silent_batcher_s=0.2))
queue.submit(np.ones(10, np.float32)).result(timeout=60)
"""


def test_a_silent_model_ends_the_process_and_dumps_its_stacks() -> None:
    ended = subprocess.run([sys.executable, "-c", SILENT], capture_output=True, text=True)
    assert ended.returncode == 70
    assert "has not answered" in ended.stderr
    assert "in _deliver" in ended.stderr


def _fails_on_everything(fake: Fake) -> None:
    fake.outcomes = lambda windows: [errors.ModelError(reason="device lost")] * len(windows)  # type: ignore[method-assign]


def _has_a_bug(fake: Fake) -> None:
    fake.choose = None  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize(
    ("fault", "says"), [(_fails_on_everything, "device lost"), (_has_a_bug, "the batcher failed")]
)
def test_a_broken_model_or_batcher_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, fake: Fake, fault: Callable[[Fake], None], says: str
) -> None:
    ended = threading.Event()
    reasons: list[str] = []
    monkeypatch.setattr(batcher, "_die", lambda reason: (reasons.append(reason), ended.set()))
    fault(fake)
    batcher.Batcher(fake, settings.Worker()).submit(window(1))
    assert ended.wait(timeout=30)
    assert says in reasons[0]
