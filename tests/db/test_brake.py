"""A run pauses when its clips fail on every worker, and goes on when somebody says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from db import brake, changes, feeding, ledger, runs, worker_registry
from db.models import Clip, Run, Worker
from db.session import reading, writing
from db.worker_registry import Pause
from earmark.core.clips import Failure
from earmark.core.errors import FileNotAllowed, NotFound
from earmark.core.settings import Ledger
from tests.db.builders import chunk_of, labels, row, submit, success

if TYPE_CHECKING:
    from collections.abc import Sequence

UNFIT = "8 clips in a row ended with file_not_allowed: the path is outside."
LIMITS = Ledger()


def ended(engine: sa.Engine, ids: Sequence[int], worker: str, failed: int, **how: bool) -> None:
    """Let a worker end clips: so many fail, the others succeed."""
    claim = ledger.claim(engine, chunk_of(engine, ids), worker=worker, limits=LIMITS)
    outcomes = [Failure(clip_id, FileNotAllowed(folder="/a"), **how) for clip_id in ids[:failed]]
    outcomes += [success(clip_id) for clip_id in ids[failed:]]  # type: ignore[misc]
    ledger.finish(engine, claim, outcomes, labels(engine), LIMITS)


def failing_run(engine: sa.Engine, share: float, clips: int = 200) -> int:
    """Make a run of which a share failed on two workers after two others gave the clips back."""
    run_id, ids = submit(engine, clips + 1)
    with writing(engine) as connection:
        connection.execute(sa.update(Clip).values(given_back_by="a b"))
    half = clips // 2
    for worker, part in (("c", ids[:half]), ("d", ids[half:clips])):
        ended(engine, part, worker, int(half * share))
    return run_id


def test_a_clip_given_back_counts_no_try_and_tells_who_and_why(engine: sa.Engine) -> None:
    _, ids = submit(engine, 1)
    ended(engine, ids, "a", 1, given_back=True)
    clip = row(engine, ids[0])
    assert (clip.state, clip.attempts, clip.given_back_by) == ("pending", 0, "a")
    assert clip.error_code == "file_not_allowed"
    assert clip.not_before > 0
    with writing(engine) as connection:
        connection.execute(sa.update(Clip).values(not_before=1))
    ended(engine, ids, "b", 1, given_back=True)
    assert row(engine, ids[0]).given_back_by == "a b"


@pytest.mark.parametrize(("share", "paused"), [(0.2, False), (0.25, False), (0.5, True)])
def test_a_run_pauses_if_clearly_more_than_a_fifth_fails_on_every_worker(
    engine: sa.Engine, share: float, paused: bool
) -> None:
    run_id = failing_run(engine, share)
    sentences = brake.pause_failing(engine, "clips")
    assert bool(sentences) == paused
    assert bool(runs.progress(engine, run_id).paused) == paused
    if paused:
        assert sentences == [runs.progress(engine, run_id).paused]
        assert "100 of its last 200 clips" in sentences[0]
        assert "file_not_allowed: The file is outside" in sentences[0]
        assert f"earmark resume run-{run_id}" in sentences[0]


def test_a_run_goes_on_while_one_worker_does_well(engine: sa.Engine) -> None:
    run_id = failing_run(engine, 1.0)
    with writing(engine) as connection:
        connection.execute(sa.update(Clip).where(Clip.worker == "d").values(given_back_by=None))
    assert brake.pause_failing(engine, "clips") == []
    assert runs.get_run(engine, run_id).paused is None


def test_at_the_end_of_a_run_when_only_retries_are_left_it_is_not_paused(
    engine: sa.Engine,
) -> None:
    run_id = failing_run(engine, 1.0)
    with writing(engine) as connection:
        waiting = sa.update(Clip).where(Clip.state == "pending")
        connection.execute(waiting.values(error_code="dns", not_before=1.0))
    assert brake.pause_failing(engine, "clips") == []
    assert runs.get_run(engine, run_id).paused is None


def test_missing_files_on_a_disk_that_is_there_never_pause_a_run(engine: sa.Engine) -> None:
    run_id = failing_run(engine, 0.0)
    with writing(engine) as connection:
        connection.execute(sa.update(Clip).values(state="pending", not_before=0, finished_at=None))
        connection.execute(sa.update(Clip).values(given_back_by="a b"))
        ids = list(connection.scalars(sa.select(Clip.id)))
    ended(engine, ids[:200], "c", 200, own=True)
    assert row(engine, ids[0]).state == "failed"
    assert brake.pause_failing(engine, "clips") == []
    assert runs.get_run(engine, run_id).paused is None


def test_errors_of_the_clips_own_never_pause_a_run(engine: sa.Engine) -> None:
    run_id, ids = submit(engine, 201)
    claim = ledger.claim(engine, chunk_of(engine, ids[:200]), worker="a", limits=LIMITS)
    gone = [Failure(clip.id, NotFound(status=404)) for clip in claim.clips]
    ledger.finish(engine, claim, gone, (), LIMITS)
    assert brake.pause_failing(engine, "clips") == []
    assert runs.get_run(engine, run_id).paused is None


def test_a_run_that_may_fail_is_never_paused(engine: sa.Engine) -> None:
    run_id = failing_run(engine, 1.0)
    brake.resume(engine, run_id, brake.NEVER)
    assert brake.pause_failing(engine, "clips") == []


def test_a_list_of_which_a_fifth_is_missing_never_pauses_by_chance() -> None:
    assert not brake.clearly_more(144, 500, 0.2)
    assert brake.clearly_more(145, 500, 0.2)
    assert not brake.clearly_more(40, 100, 0.2)


def beat(engine: sa.Engine, name: str, pause: Pause | None, paused_s: float = 60.0) -> None:
    worker_registry.beat(engine, name, "clips", ["/data"], pause)
    with writing(engine) as connection:
        earlier = sa.update(Worker).where(Worker.name == name, Worker.paused_at.is_not(None))
        connection.execute(earlier.values(paused_at=Worker.paused_at - paused_s))


def test_a_run_pauses_if_no_worker_can_do_it(engine: sa.Engine) -> None:
    run_id, _ = submit(engine, 3)
    other, _ = submit(engine, 3)
    beat(engine, "a", Pause(UNFIT, run_id))
    beat(engine, "b", None)
    assert brake.pause_failing(engine, "clips") == []
    beat(engine, "b", Pause("no network"))
    assert brake.pause_failing(engine, "clips") == []
    beat(engine, "b", None)
    beat(engine, "b", Pause(UNFIT, run_id), paused_s=1.0)
    assert brake.pause_failing(engine, "clips") == []
    beat(engine, "b", Pause(UNFIT, run_id), paused_s=60.0)
    (sentence,) = brake.pause_failing(engine, "clips")
    assert UNFIT in sentence
    assert not runs.is_going(engine, run_id)
    assert runs.is_going(engine, other)


def test_no_clip_of_a_paused_run_begins_and_all_go_on_after_it(engine: sa.Engine) -> None:
    run_id, ids = submit(engine, 4)
    ended(engine, ids[:1], "a", 1, given_back=True)
    (picked,) = feeding.pick(engine, "clips", 1, LIMITS)
    running = ledger.claim(engine, chunk_of(engine, ids[1:2]), worker="a", limits=LIMITS)
    assert brake.pause(engine, run_id, "it fails \x1b[2J")
    assert not brake.pause(engine, run_id, "it fails")
    assert "it fails ?[2J" in str(runs.progress(engine, run_id).paused)
    assert runs.progress(engine, run_id).states["queued"] == 0
    assert feeding.pick(engine, "clips", 1, LIMITS) == []
    chunk = chunk_of(engine, [clip.id for clip in picked.clips])
    assert ledger.claim(engine, chunk, worker="a", limits=LIMITS).clips == ()
    # What was running ends as usual.
    finished = ledger.finish(engine, running, [success(ids[1])], labels(engine), LIMITS)
    assert finished["done"] == 1

    brake.resume(engine, run_id)
    assert row(engine, ids[0]).given_back_by is None
    assert len(ledger.claim(engine, chunk, worker="a", limits=LIMITS).clips) == 2


@pytest.mark.parametrize("how", ["retry", "submit again"])
def test_whoever_retries_or_submits_a_paused_run_lets_it_go_on(engine: sa.Engine, how: str) -> None:
    run_id = failing_run(engine, 1.0)
    assert brake.pause_failing(engine, "clips")
    if how == "retry":
        assert changes.retry_failed(engine, run_id) == 200
    else:
        run = runs.get_run(engine, run_id)
        ledger.open_run(engine, run.name, run.options, queue="clips", chunk_size=16)
    assert runs.is_going(engine, run_id)
    # What failed before the resumption is no reason to pause it again.
    assert brake.pause_failing(engine, "clips") == []


def test_a_paused_run_that_is_cancelled_is_at_its_end(engine: sa.Engine) -> None:
    run_id, _ = submit(engine, 1)
    brake.pause(engine, run_id, "it fails")
    changes.cancel(engine, run_id)
    state = runs.progress(engine, run_id)
    assert state.finished
    assert state.paused is None


def test_a_worker_is_up_until_it_leaves_or_is_not_seen(engine: sa.Engine) -> None:
    for name in ("a", "b", "c"):
        beat(engine, name, None)
    beat(engine, "b", Pause(UNFIT, 1))
    worker_registry.leave(engine, "c")
    a, b = worker_registry.up(engine, "clips")
    assert (a.name, a.file_roots, a.pause) == ("a", ("/data",), None)
    assert (b.name, b.pause) == ("b", Pause(UNFIT, 1))
    assert b.paused_s >= 60
    with writing(engine) as connection:
        connection.execute(sa.update(Worker).values(seen_at=Worker.seen_at - worker_registry.UP_S))
    assert worker_registry.up(engine, "clips") == []
    assert worker_registry.up(engine, "others") == []
    beat(engine, "a", None)
    with writing(engine) as connection:
        connection.execute(sa.update(Worker).values(seen_at=1.0))
    beat(engine, "a", None)
    with reading(engine) as connection:
        assert connection.scalars(sa.select(Worker.name)).all() == ["a"]
        assert connection.scalar(sa.select(sa.func.count()).select_from(Run)) == 0
