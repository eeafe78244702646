"""A worker that fails every clip for a reason of its own gives them back, and pauses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from db.ledger import Claim, Claimed
from earmark.core import errors
from earmark.core.clips import Failure
from tests.db.facts import success
from workers.fitness import LONGEST_PAUSE_S, SHORTEST_PAUSE_S, STREAK, Fitness
from workers.tasks import only_failures

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from earmark.core.clips import Outcome
    from earmark.core.errors import ClipError

NOT_ALLOWED = errors.FileNotAllowed()


class Clock:
    """A clock that the test sets."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fitness(clock: Clock) -> Fitness:
    return Fitness("here", clock)


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


@pytest.mark.parametrize(("folder", "own"), [("full", True), ("empty", False), ("gone", False)])
def test_a_missing_file_is_the_clips_own_error_only_if_its_folder_is_there(
    fitness: Fitness, tmp_path: Path, folder: str, own: bool
) -> None:
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "other.wav").touch()
    uri = f"{tmp_path}/{folder}/a%20b.wav"
    for each in (uri, f"file://{uri}"):
        judged = judge(fitness, *[errors.FileNotFound()] * STREAK, uri=each)
        assert set(given_back(judged)) == {not own}
    assert (fitness.pause is None) == own


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
