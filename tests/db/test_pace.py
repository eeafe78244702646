"""How fast a run goes and what holds it back, told only where there is enough to tell it by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from db import changes, ledger, runs
from db.dialects import now
from db.models import Clip, Run
from db.pace import Pace, measure, pace
from db.session import reading, writing
from earmark.core import clips as words
from earmark.core.settings import Ledger
from tests.db.builders import FACTS, chunk_of, labels, submit

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Clips that end, evenly, in this many seconds: one in a hundred seconds. Against hours, the time
#: that a busy machine takes for a test makes no difference.
ENDED, SECONDS, LEFT = 200, 20_000.0, 100


@pytest.fixture(autouse=True)
def hours_are_recent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("db.pace.LAST_S", 2 * SECONDS)


def finish(engine: sa.Engine, ids: Sequence[int], *, worker: str = "w", **timings: float) -> None:
    label_ids = labels(engine)
    claim = ledger.claim(engine, chunk_of(engine, ids), worker=worker, limits=Ledger())
    source, heard = words.Source("ab", 7), (words.Prediction(0, 0.5),)
    done = [words.Success(id_, source, FACTS, heard, (), words.Timings(**timings)) for id_ in ids]
    ledger.finish(engine, claim, done, label_ids, Ledger())


def going(
    engine: sa.Engine, *, ago_s: float = 0.0, seconds: float = SECONDS, **timings: float
) -> int:
    """A run of which most clips ended one by one, the last of them so long ago."""
    run_id, ids = submit(engine, ENDED + LEFT)
    finish(engine, ids[:ENDED], **timings)
    first = sa.select(sa.func.min(Clip.id)).where(Clip.run_id == run_id).scalar_subquery()
    ended = now() - ago_s - seconds + (Clip.id - first + 1) * (seconds / ENDED)
    with writing(engine) as connection:
        ids_ended = sa.update(Clip).where(Clip.run_id == run_id, Clip.state == "done")
        connection.execute(ids_ended.values(finished_at=ended))
    return run_id


def look(engine: sa.Engine, run_id: int) -> Pace:
    return pace(engine, run_id, runs.progress(engine, run_id))


def test_the_pace_is_that_of_the_last_minutes(engine: sa.Engine) -> None:
    found = look(engine, going(engine, fetch_ms=1, decode_ms=2, classify_ms=3))
    assert found.clips_per_s == pytest.approx(ENDED / SECONDS, rel=0.05)
    assert found.audio_s_per_s == pytest.approx(5 * ENDED / SECONDS, rel=0.05)
    assert found.eta_s == pytest.approx(LEFT * SECONDS / ENDED, rel=0.05)
    assert (found.fetch_ms, found.decode_ms, found.classify_ms) == pytest.approx((1, 2, 3))


def test_the_workload_is_the_clips_that_a_worker_has_in_each_stage(engine: sa.Engine) -> None:
    # With a clip every 100 seconds, 2500 seconds a clip are 25 clips at once.
    run_id = going(engine, fetch_ms=2_500_000, decode_ms=5_000, classify_ms=38_000)
    workload = look(engine, run_id).workload
    assert workload is not None
    stages = (workload.fetching, workload.decoding, workload.classifying)
    assert stages == pytest.approx((25, 0.05, 0.38), rel=0.05)
    assert workload.chunk_size == 16


def test_no_pace_is_shown_for_too_few_or_too_old_clips(engine: sa.Engine) -> None:
    run_id, ids = submit(engine, 100)
    assert look(engine, run_id) == Pace()
    finish(engine, ids[:60], fetch_ms=2_500_000)
    assert look(engine, run_id) == Pace()
    assert look(engine, going(engine, ago_s=2 * SECONDS, fetch_ms=2_500_000)) == Pace()


def test_no_bottleneck_is_named_while_workers_have_other_runs(engine: sa.Engine) -> None:
    run_id = going(engine, fetch_ms=2500)
    _, others = submit(engine, 3)
    ledger.claim(engine, chunk_of(engine, others), worker="w", limits=Ledger())
    found = look(engine, run_id)
    assert found.clips_per_s
    assert found.workload is None


def test_no_bottleneck_is_named_for_few_clips_of_many_workers(engine: sa.Engine) -> None:
    run_id = going(engine, fetch_ms=2500)
    with writing(engine) as connection:
        connection.execute(sa.update(Clip).values(worker=sa.cast(Clip.id % 50, sa.String)))
    assert look(engine, run_id).workload is None


def test_a_finished_run_has_its_average_pace(engine: sa.Engine) -> None:
    run_id, ids = submit(engine, ENDED)
    finish(engine, ids)
    with writing(engine) as connection:
        connection.execute(sa.update(Run).values(created_at=now() - SECONDS))
    found = look(engine, run_id)
    assert found.clips_per_s == pytest.approx(ENDED / SECONDS, rel=0.05)
    assert (found.eta_s, found.workload) == (None, None)


def test_the_few_seconds_of_a_small_run_are_no_pace(engine: sa.Engine) -> None:
    run_id, ids = submit(engine, 2)
    finish(engine, ids)
    with writing(engine) as connection:
        connection.execute(sa.update(Run).values(created_at=now() - SECONDS))
    assert look(engine, run_id) == Pace()


def test_pace_uses_the_index(engine: sa.Engine) -> None:
    run_id = going(engine)
    seen: list[tuple[str, Any]] = []
    sa.event.listen(
        engine, "before_cursor_execute", lambda *event: seen.append((event[2], event[3]))
    )
    look(engine, run_id)
    [(statement, values)] = [some for some in seen if "ended" in some[0]]
    with reading(engine) as connection:
        explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            connection.exec_driver_sql("SET LOCAL enable_sort = off")
        plan = "\n".join(
            str(line) for line in connection.exec_driver_sql(explain + statement, values)
        )
    assert "clips_finished" in plan


@pytest.mark.parametrize(("seconds", "rate"), [(0.4, None), (40.0, 5.0)])
def test_a_burst_of_clips_tells_no_rate(
    engine: sa.Engine, seconds: float, rate: float | None
) -> None:
    run_id = going(engine, seconds=seconds)
    changes.cancel(engine, run_id)
    with writing(engine) as connection:
        connection.execute(sa.delete(Clip).where(Clip.state == "cancelled"))
    expected = None if rate is None else pytest.approx(rate, rel=0.1)
    assert measure(engine, run_id).clips_per_s == expected
