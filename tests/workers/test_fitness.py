"""A worker that fails every clip for a reason of its own gives them back, and pauses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from db.claims import Claim, Claimed
from db.worker_registry import Pause
from earmark.core import errors
from earmark.core.clips import Failure
from tests.db.builders import success
from workers.fitness import LONGEST_PAUSE_S, REFUSALS, SHORTEST_PAUSE_S, STREAK, Fitness
from workers.tasks import only_failures

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from earmark.core.clips import Outcome
    from earmark.core.errors import ClipError

NOT_ALLOWED = errors.FileNotAllowed(folder="/a")


class Clock:
    """A clock that the test sets."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fitness(clock: Clock, tmp_path: Path) -> Fitness:
    return Fitness("here", [tmp_path / "data"], clock)


def judge(
    fitness: Fitness, *ended: ClipError | None, uri: str = "/a/1.wav", before: str | None = None
) -> list[Outcome]:
    """Judge one outcome a clip of a claim: an error, or a success."""
    clips = [Claimed(n, uri, 1, 0, before) for n in range(len(ended))]
    outcomes: list[Outcome] = []
    for clip, error in zip(clips, ended, strict=True):
        outcomes.append(Failure(clip.id, error) if error else success(clip.id))
    return fitness.judge(Claim(1, tuple(clips), run_id=7), outcomes)


def given_back(outcomes: list[Outcome]) -> Iterator[bool]:
    for outcome in outcomes:
        yield isinstance(outcome, Failure) and outcome.given_back


@pytest.mark.parametrize(
    "error",
    [NOT_ALLOWED, errors.NoSpace(), errors.ModelError(reason="x"), errors.Dns(host="h")],
)
@pytest.mark.parametrize(
    ("before", "given"), [(None, True), ("there", True), ("here", False), ("there yonder", False)]
)
def test_a_clip_is_given_back_once_a_worker_and_twice_in_all(
    fitness: Fitness, error: ClipError, before: str | None, given: bool
) -> None:
    assert list(given_back(judge(fitness, error, before=before))) == [given]


@pytest.mark.parametrize(
    "error", [errors.NotFound(status=404), errors.NotAudio(kind="text"), errors.Corrupt(reason="x")]
)
def test_an_error_of_the_clip_is_final_and_pauses_nobody(
    fitness: Fitness, error: ClipError
) -> None:
    assert not any(given_back(judge(fitness, *[error] * 10 * STREAK)))
    assert fitness.pause is None


def test_a_streak_pauses_the_worker_and_says_why(fitness: Fitness, clock: Clock) -> None:
    judge(fitness, *[NOT_ALLOWED] * (STREAK - 1))
    assert fitness.pause is None
    judge(fitness, NOT_ALLOWED)
    assert fitness.pause
    assert fitness.pause.run_id == 7
    assert "file_not_allowed" in fitness.pause.reason
    assert "EARMARK_FETCH__FILE_ROOTS" in fitness.pause.reason
    clock.now_s += SHORTEST_PAUSE_S
    assert fitness.pause is None


def test_a_full_disk_pauses_the_worker_and_not_the_run(fitness: Fitness) -> None:
    judge(fitness, *[errors.NoSpace()] * STREAK)
    assert fitness.pause
    assert fitness.pause.run_id is None


def test_a_success_or_an_error_of_a_clip_ends_a_streak(fitness: Fitness) -> None:
    for ended in (None, errors.NotFound(status=404)):
        judge(fitness, *[NOT_ALLOWED] * (STREAK - 1), ended, *[NOT_ALLOWED] * (STREAK - 1))
        assert fitness.pause is None


def test_a_worker_that_stays_unfit_pauses_longer_each_time(fitness: Fitness, clock: Clock) -> None:
    judge(fitness, *[NOT_ALLOWED] * STREAK)
    pauses = []
    for _ in range(5):
        began = clock.now_s
        while fitness.pause:
            clock.now_s += 1.0
        pauses.append(clock.now_s - began)
        judge(fitness, NOT_ALLOWED)
    assert pauses[:2] == [SHORTEST_PAUSE_S, 2 * SHORTEST_PAUSE_S]
    assert max(pauses) == LONGEST_PAUSE_S
    judge(fitness, None)
    assert fitness.pause is None


def test_errors_of_the_network_are_left_to_the_breaker(fitness: Fitness) -> None:
    assert all(given_back(judge(fitness, *[errors.Connect(reason="no route")] * 2 * STREAK)))
    assert fitness.pause is None


@pytest.mark.parametrize(
    ("folder", "given", "own"),
    [
        ("data/full", False, True),
        ("data/removed", True, True),
        ("data/removed/below", True, True),
        ("data/empty", True, False),
        ("data/empty/below", True, False),
        ("elsewhere", True, False),
    ],
)
def test_a_missing_file_is_the_workers_fault_only_if_its_disk_is_not_there(
    fitness: Fitness, tmp_path: Path, folder: str, given: bool, own: bool
) -> None:
    for name in ("full", "empty"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data" / "full" / "other.wav").touch()
    uri = f"{tmp_path}/{folder}/a%20b.wav"
    for each in (uri, f"file://{uri}"):
        judged = judge(fitness, *[errors.FileNotFound()] * STREAK, uri=each)
        assert set(given_back(judged)) == {given}
        assert {outcome.own for outcome in judged if isinstance(outcome, Failure)} == {own}
    assert (fitness.pause is None) == own


def test_what_other_workers_gave_back_is_no_sign_of_this_one(fitness: Fitness) -> None:
    judge(fitness, *[NOT_ALLOWED] * 2 * STREAK, before="there")
    assert fitness.pause is None


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ({"failed": 3, "not_found": 2, "not_audio": 1}, "not_found (2), not_audio (1)"),
        ({"given_back": 16, "file_not_allowed": 16}, "file_not_allowed (16)"),
        ({"skipped": 15, "failed": 1, "empty": 1}, "empty (1)"),
        ({"done": 1, "failed": 15, "not_found": 15}, None),
        ({"late": 1, "failed": 15, "not_found": 15}, None),
        ({"skipped": 16}, None),
    ],
)
def test_a_chunk_with_nothing_but_failures_is_a_failure(
    counts: dict[str, int], sentence: str | None
) -> None:
    from collections import Counter

    assert only_failures(Counter(counts)) == sentence


def test_statements_that_the_database_refuses_pause_a_worker(fitness: Fitness) -> None:
    wrong = errors.DatabaseError(reason="no such column: codec", bug=True)
    for _ in range(REFUSALS - 1):
        fitness.refused(7, wrong)
    fitness.recorded()
    for _ in range(REFUSALS - 1):
        fitness.refused(7, wrong)
        judge(fitness, None)
    assert fitness.pause is None
    fitness.refused(7, wrong)
    assert fitness.pause == Pause("no such column: codec", 7)
