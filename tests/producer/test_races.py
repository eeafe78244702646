"""Racing submissions of one new name: all succeed, and make one run with each clip once."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from db.models import Clip, Run
from db.session import reading
from tests.producer.races import FORKED, LONGEST_S, submit_one

if TYPE_CHECKING:
    from pathlib import Path

    from earmark.core.settings import Settings

pytestmark = pytest.mark.slow

SUBMITTERS = 8
CLIPS = 5000
ROUNDS = [pytest.param(1, id="1-round"), pytest.param(4, id="4-rounds", marks=pytest.mark.chaos)]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_racing_submissions_of_one_list_make_one_run(
    engine: sa.Engine, settings: Settings, tmp_path: Path, rounds: int
) -> None:
    path = tmp_path / "list.txt"
    write_list(path, range(CLIPS), seed=0)
    for turn in range(rounds):
        race(settings, f"same-{turn}", [path] * SUBMITTERS)
        assert clips_by_run(engine, f"same-{turn}") == [(CLIPS, CLIPS)]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_racing_submissions_of_overlapping_lists_make_one_run(
    engine: sa.Engine, settings: Settings, tmp_path: Path, rounds: int
) -> None:
    for turn in range(rounds):
        paths = [tmp_path / f"{turn}-{number}.txt" for number in range(SUBMITTERS)]
        for number, path in enumerate(paths):
            first = CLIPS // 2 * (number % 2)
            write_list(path, range(first, first + CLIPS), seed=turn * SUBMITTERS + number)
        race(settings, f"half-{turn}", paths)
        everything = CLIPS + CLIPS // 2
        assert clips_by_run(engine, f"half-{turn}") == [(everything, everything)]


def write_list(path: Path, numbers: range, seed: int) -> None:
    """Write a list in its own order, so that submitters insert common clips in different orders."""
    lines = [f"https://h.org/{number}\n" for number in numbers]
    random.Random(seed).shuffle(lines)
    path.write_text("".join(lines))


def race(settings: Settings, name: str, paths: list[Path]) -> None:
    """Submit every list at once, each in a process of its own; assert that all exit with 0."""
    start = FORKED.Barrier(len(paths))
    submitters = [
        FORKED.Process(target=submit_one, args=(start, settings, name, str(path))) for path in paths
    ]
    for submitter in submitters:
        submitter.start()
    for submitter in submitters:
        submitter.join(LONGEST_S)
    statuses = [submitter.exitcode for submitter in submitters]
    for submitter in submitters:
        submitter.kill()
    assert statuses == [0] * len(paths)


def clips_by_run(engine: sa.Engine, name: str) -> list[tuple[int, int]]:
    """Return, of each run of that name, its clips and how many different ones they are."""
    counted = sa.select(sa.func.count(), sa.func.count(Clip.uri.distinct()))
    statement = (
        counted.join_from(Run, Clip, Clip.run_id == Run.id).where(Run.name == name).group_by(Run.id)
    )
    with reading(engine) as connection:
        return [tuple(row) for row in connection.execute(statement)]
