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
from workers.scoring.batcher import QueuedWindow
from workers.scoring.model import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Fake(classifier.Classifier):
    """Takes four windows of one length at once; scores: the first sample and its negative."""

    def __init__(self, lanes: int = 1) -> None:
        self.card = SimpleNamespace(fixed=False, min_samples=1)  # type: ignore[assignment]
        self.limits = Limits(windows=4, samples=1e6, padding=1.0)
        self.device, self.lanes = "cpu", lanes
        self.free = threading.Event()
        self.free.set()
        self.started = threading.Semaphore(0)
        self.batches: list[list[float]] = []
        self.wanted: list[tuple[str, int]] = []

    def outcomes(
        self,
        windows: Sequence[np.ndarray],
        function_to_apply: str = "none",
        top_k: int = 0,
        **_: Any,
    ) -> list[np.ndarray | errors.ClipError]:
        self.started.release()
        self.free.wait(timeout=30)
        self.batches.append([float(window[0]) for window in windows])
        self.wanted.append((function_to_apply, top_k))
        return [
            errors.OutOfMemory() if window[0] < 0 else np.array([window[0], -window[0]])
            for window in windows
        ]

    def twin(self) -> Fake:
        return self


class Outcomes:
    """Collects what the batcher says of each window, by its tag."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._by_tag: dict[object, Any] = {}
        self.calls: list[list[object]] = []

    def scored(
        self, batch: list[QueuedWindow], outcomes: list[np.ndarray | errors.ClipError]
    ) -> None:
        with self._arrived:
            self.calls.append([window.tag for window in batch])
            for window, outcome in zip(batch, outcomes, strict=True):
                assert window.tag not in self._by_tag, "a window was scored twice"
                self._by_tag[window.tag] = outcome
            self._arrived.notify_all()

    def of(self, *tags: object) -> list[Any]:
        """Wait for these windows, and return their outcomes: the first score, or the error."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: self._by_tag.keys() >= set(tags), timeout=30)
            outcomes = [self._by_tag[tag] for tag in tags]
        return [float(each[0]) if isinstance(each, np.ndarray) else each for each in outcomes]

    @property
    def tags(self) -> set[object]:
        return set(self._by_tag)


def window(value: float, length: int = 10, function: str = "none", top_k: int = 0) -> QueuedWindow:
    return QueuedWindow(np.full(length, value, np.float32), function, tag=value, top_k=top_k)


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def outcomes() -> Outcomes:
    return Outcomes()


@pytest.fixture
def queue(fake: Fake, outcomes: Outcomes) -> Iterator[batcher.Batcher]:
    queue = batcher.Batcher(fake, settings.Worker(), outcomes.scored)
    yield queue
    fake.free.set()
    queue.close()


def hold(fake: Fake, queue: batcher.Batcher) -> None:
    """Keep the model busy with one window."""
    fake.free.clear()
    queue.put([window(99)])
    assert fake.started.acquire(timeout=30)


def test_the_windows_ready_when_the_model_is_free_make_a_batch(
    fake: Fake, queue: batcher.Batcher, outcomes: Outcomes
) -> None:
    hold(fake, queue)
    queue.put(window(number) for number in range(5))
    fake.free.set()
    assert outcomes.of(0, 1, 2, 3, 4) == [0, 1, 2, 3, 4]
    assert fake.batches == [[99], [0, 1, 2, 3], [4]]
    assert outcomes.calls == [[99], [0, 1, 2, 3], [4]]


def test_batches_hold_like_lengths_and_the_oldest_window_goes_first(
    fake: Fake, queue: batcher.Batcher, outcomes: Outcomes
) -> None:
    hold(fake, queue)
    queue.put(window(number, length=20 if number % 2 else 10) for number in range(4))
    fake.free.set()
    outcomes.of(*range(4))
    assert fake.batches == [[99], [0, 2], [1, 3]]


def test_windows_that_stay_behind_keep_their_order(
    fake: Fake, queue: batcher.Batcher, outcomes: Outcomes
) -> None:
    hold(fake, queue)
    lengths = [10, 30, 20, 30, 20, 10, 30]
    queue.put(window(number, length=length) for number, length in enumerate(lengths))
    fake.free.set()
    outcomes.of(*range(7))
    assert fake.batches == [[99], [0, 5], [1, 3, 6], [2, 4]]


def test_the_windows_of_a_batch_want_alike_scores(
    fake: Fake, queue: batcher.Batcher, outcomes: Outcomes
) -> None:
    hold(fake, queue)
    wanted = [("softmax", 5), ("sigmoid", 5), ("softmax", 5), ("softmax", 0)]
    queue.put(window(number, function=name, top_k=k) for number, (name, k) in enumerate(wanted))
    fake.free.set()
    outcomes.of(0, 1, 2, 3)
    assert fake.batches == [[99], [0, 2], [1], [3]]
    assert fake.wanted == [("none", 0), ("softmax", 5), ("sigmoid", 5), ("softmax", 0)]


def test_a_failed_window_costs_its_neighbour_nothing(
    fake: Fake, queue: batcher.Batcher, outcomes: Outcomes
) -> None:
    hold(fake, queue)
    queue.put([window(-1), window(1)])
    fake.free.set()
    failed, scored = outcomes.of(-1, 1)
    assert isinstance(failed, errors.OutOfMemory)
    assert scored == 1


def test_dropped_windows_are_not_scored_and_the_one_in_work_is(
    fake: Fake, queue: batcher.Batcher, outcomes: Outcomes
) -> None:
    hold(fake, queue)
    queue.put(window(number) for number in range(4))
    queue.drop(lambda waiting: waiting.tag in (1, 3))
    assert queue.waiting_bytes == 80
    fake.free.set()
    assert outcomes.of(99, 1, 3) == [99, 1, 3]
    queue.close()
    assert outcomes.tags == {99, 1, 3}


def test_the_bytes_that_wait_are_counted(
    fake: Fake, queue: batcher.Batcher, outcomes: Outcomes
) -> None:
    hold(fake, queue)
    queue.put([window(1, length=200), window(2, length=50)])
    assert queue.waiting_bytes == 1000
    fake.free.set()
    outcomes.of(1, 2)
    assert queue.waiting_bytes == 0


def test_closing_scores_the_waiting_windows_and_takes_no_more(
    fake: Fake, queue: batcher.Batcher, outcomes: Outcomes
) -> None:
    hold(fake, queue)
    queue.put([window(1)])
    fake.free.set()
    queue.close()
    assert outcomes.tags == {99, 1}
    with pytest.raises(RuntimeError, match="closed"):
        queue.put([window(2)])


def test_each_lane_takes_a_batch_of_its_own(outcomes: Outcomes) -> None:
    fake = Fake(lanes=2)
    queue = batcher.Batcher(fake, settings.Worker(), outcomes.scored)
    fake.free.clear()
    queue.put(window(number, length=10 * number) for number in (1, 2))
    assert all(fake.started.acquire(timeout=30) for _ in range(2))
    fake.free.set()
    assert outcomes.of(1, 2) == [1, 2]
    queue.close()


@pytest.mark.parametrize(("device", "largest"), [("cpu", 2), ("cuda:0", 4)])
def test_lanes_share_what_waits_on_a_cpu_and_fill_batches_on_a_gpu(
    outcomes: Outcomes, device: str, largest: int
) -> None:
    fake = Fake(lanes=2)
    fake.device = device
    queue = batcher.Batcher(fake, settings.Worker(), outcomes.scored)
    fake.free.clear()
    for number in (90, 91):
        queue.put([window(number)])
        assert fake.started.acquire(timeout=30)
    queue.put(window(number) for number in range(4))
    fake.free.set()
    outcomes.of(*range(4))
    queue.close()
    assert max(map(len, outcomes.calls)) == largest


def test_many_threads_get_their_own_scores(outcomes: Outcomes) -> None:
    fake = Fake(lanes=3)
    queue = batcher.Batcher(fake, settings.Worker(), outcomes.scored)

    def work(thread: int) -> None:
        for number in range(100):
            queue.put([window(100 * thread + number, length=1 + number % 7)])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.of(*range(800)) == list(range(800))
    queue.close()


BROKEN = """
import time
from earmark.core import errors, settings
from tests.workers.scoring.test_batcher import Fake, Outcomes, batcher, window
fake = Fake()
{fault}
queue = batcher.Batcher(fake, settings.Worker(silent_batcher_s=0.2), Outcomes().scored)
queue.put([window(1)])
time.sleep(60)
"""
SILENT = "fake.free.clear()"
#: What every batch ends with after a CUDA fault.
LOST = """
fake.outcomes = lambda windows, *_, **__: [errors.ModelError(reason="CUDA error")] * len(windows)
"""


@pytest.mark.parametrize(
    ("fault", "says"), [(SILENT, "has not answered"), (LOST, "even on silence: The model failed")]
)
def test_a_silent_or_lost_device_ends_the_process_and_dumps_its_stacks(
    fault: str, says: str
) -> None:
    program = BROKEN.format(fault=fault)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 70
    assert says in ended.stderr
    assert "in _score" in ended.stderr


def _fails_on_everything(fake: Fake) -> None:
    lost = errors.ModelError(reason="device lost")
    fake.outcomes = lambda windows, *_, **__: [lost] * len(windows)  # type: ignore[method-assign]


def _has_a_bug(fake: Fake) -> None:
    fake.choose = None  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize(
    ("fault", "says"), [(_fails_on_everything, "device lost"), (_has_a_bug, "the batcher failed")]
)
def test_a_broken_model_or_batcher_ends_the_process(
    monkeypatch: pytest.MonkeyPatch,
    fake: Fake,
    outcomes: Outcomes,
    fault: Callable[[Fake], None],
    says: str,
) -> None:
    ended = threading.Event()
    reasons: list[str] = []
    monkeypatch.setattr(batcher, "_die", lambda reason: (reasons.append(reason), ended.set()))
    fault(fake)
    batcher.Batcher(fake, settings.Worker(), outcomes.scored).put([window(1)])
    assert ended.wait(timeout=30)
    assert says in reasons[0]
