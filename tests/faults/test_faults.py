"""Each fault by itself: every clip ends in exactly one final state, the right one."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from db import feeding, ledger, outcomes
from db.identity import ledger_id, own_queue
from db.models import Clip, Lease, Run
from earmark.core import broker
from earmark.core.clips import AudioFacts, Failure, Prediction, Source, Success
from earmark.core.errors import NotFound
from earmark.core.settings import Broker, Ledger
from tests.db.builders import chunk_of
from tests.end_to_end.conftest import wait_until
from tests.faults import faults
from tests.faults.world import LEASE_S, OTHER_MODEL, SUBMITTED_S, check_invariants
from tests.servers import answers, free_port
from workers.chunk import SUSPECT_CRASHES

if TYPE_CHECKING:
    from tests.faults.faults import Fault
    from tests.faults.world import World
    from tests.servers import PgBouncer

CLIPS = 64
#: After the lease, the longest a worker's death may hold up its clips.
RECOVERY_S = 15
#: Outlasts every outage.
LONG_LEASE_S = "60"
MODEL = {
    "name": "m",
    "revision": "",
    "sha256": "0",
    "sample_rate": 8000,
    "function_to_apply": "softmax",
    "window_s": 10.0,
}


def strike_amid_work(world: World, fault: Fault) -> None:
    """Have a fault happen to two workers at work, then let them end."""
    world.submit(*world.uris(CLIPS))
    world.start_workers()
    world.until_some_are_done()
    fault(world)
    world.until_final()
    check_invariants(world)


def named(fault: Fault) -> str:
    return fault.__name__


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("fault", faults.ON_SQLITE, ids=named)
def test_on_sqlite_nothing_is_lost_or_doubled(world: World, fault: Fault) -> None:
    strike_amid_work(world, fault)


@pytest.mark.postgresql
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("fault", faults.ON_POSTGRES, ids=named)
def test_on_postgresql_nothing_is_lost_or_doubled(world: World, fault: Fault) -> None:
    outage = fault in faults.OUTAGES_OF_POSTGRES
    if outage:
        world.settings["EARMARK_LEDGER__LEASE_S"] = LONG_LEASE_S
    strike_amid_work(world, fault)
    if outage:
        assert world.rows(sa.select(sa.func.max(Clip.crashes))) == [(0,)]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_behind_a_pooler_nothing_is_lost_failed_or_doubled(world: World, pooler: PgBouncer) -> None:
    world.settings["EARMARK_DATABASE__URL"] = pooler.url_of(world.database_url)
    strike_amid_work(world, lambda _: None)
    assert world.rows(sa.select(sa.func.max(Clip.attempts), sa.func.max(Clip.crashes))) == [(1, 0)]


def test_clips_that_fail_or_kill_workers_cost_no_other_clip(world: World) -> None:
    world.submit(
        *world.uris(
            CLIPS,
            *("busy", "broken", "cut", "gone", "endless", "poison", "venom", "unnamed", "renamed"),
        )
    )
    world.start_workers()
    world.until_final(120)
    check_invariants(world)
    lost = sa.select(Clip.crashes).where(Clip.error_code == "worker_lost").order_by(Clip.crashes)
    assert world.rows(lost)[-1] == (SUSPECT_CRASHES,)


def test_a_killed_workers_clips_end_within_its_lease_and_15_s(world: World) -> None:
    world.submit(*world.uris(CLIPS))
    world.start_workers(1)
    running = kill_all_workers_at_work(world)
    unfinished = sa.select(sa.func.count()).where(Clip.id.in_(running), Clip.state != "done")
    world.until(lambda: world.rows(unfinished)[0][0] == 0, LEASE_S + RECOVERY_S)
    world.until_final()
    check_invariants(world)


def test_a_stopped_worker_loses_no_clip_and_classifies_none_twice(world: World) -> None:
    world.submit(*world.uris(CLIPS))
    world.start_workers()
    world.until_some_are_done()
    for process in world.workers:
        process.terminate()
    world.until_final()
    check_invariants(world)
    assert world.classified_again == 0
    assert world.rows(sa.select(sa.func.max(Clip.crashes))) == [(0,)]


def test_a_worker_without_memory_for_a_batch_scores_windows_one_by_one(world: World) -> None:
    world.submit(*world.uris(CLIPS))
    world.start_workers(1, FAULT_MEMORY="1")
    world.until_final()
    check_invariants(world)
    assert world.rows(sa.select(sa.func.max(Clip.attempts))) == [(1,)]


@pytest.mark.parametrize("then", [False, True])
def test_a_model_without_memory_fails_its_run_and_leaves_the_other_one_of_a_pass_whole(
    world: World, *, then: bool
) -> None:
    world.use_two_models(then=then)
    uris = world.uris(CLIPS)
    world.submit(*uris)
    world.start_workers(1, FAULT_MEMORY_OF=OTHER_MODEL, EARMARK_LEDGER__MAX_ATTEMPTS="2")
    world.until_final()
    ends = sa.select(Run.name, Clip.error_code, Clip.unheard, Clip.attempts, Clip.crashes)
    found = Counter(world.rows(ends.join(Run, Run.id == Clip.run_id)))
    unheard = sum(uri[-1] in "369" for uri in uris) if then else 0
    first, second = world.runs
    assert found == +Counter(
        {
            (first, None, False, 1, 0): CLIPS,
            (second, None, True, 1, 0): unheard,
            (second, "out_of_memory", False, 2, 0): CLIPS - unheard,
        }
    )


def test_a_worker_that_loses_its_device_ends_and_its_clips_are_scored_by_the_next(
    world: World,
) -> None:
    world.submit(*world.uris(CLIPS))
    world.start_workers(1, FAULT_DEVICE="2")
    world.until_final()
    check_invariants(world)
    assert "fails on cpu even on silence" in (world.folder / "worker.log").read_text()
    assert world.rows(sa.select(sa.func.max(Clip.crashes))) == [(1,)]


def test_a_worker_without_its_model_takes_no_chunk(world: World) -> None:
    world.submit(*world.uris(8))
    world.start_workers(1, EARMARK_MODEL__NAME="./nowhere")
    world.workers.pop().wait(SUBMITTED_S)
    assert "nowhere" in world.log()
    assert world.states() == {"queued": 8}
    world.start_workers(1)
    world.until_final()
    check_invariants(world)


def test_an_outage_longer_than_results_wait_loses_no_clip(world: World) -> None:
    world.settings |= {"EARMARK_LEDGER__OUTAGE_S": "1", "EARMARK_LEDGER__LEASE_S": LONG_LEASE_S}
    strike_amid_work(
        world, faults.stop_postgres_for_10_s if world.postgres else faults.lock_sqlite_for_20_s
    )
    assert world.rows(sa.select(sa.func.max(Clip.crashes))) == [(0,)]


def test_a_killed_flower_harms_no_clip(world: World) -> None:
    port = free_port()
    command = [sys.executable, "-m", "earmark", "flower", "--port", str(port)]
    with (world.folder / "flower.log").open("wb") as log:
        flower = subprocess.Popen(
            command, env=world.environment(), cwd=world.folder, stdout=log, stderr=log
        )
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/healthcheck"))
        strike_amid_work(world, lambda _: flower.kill())
    finally:
        flower.kill()
        flower.wait()
        sys.stdout.write((world.folder / "flower.log").read_text())


def test_two_producers_of_one_list_make_one_run(world: World) -> None:
    uris = world.uris(2000)
    both = [world.submit(*uris, wait=False, name=name) for name in ("one", "two")]
    logs = [process.communicate(SUBMITTED_S)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], logs
    assert sum(world.states().values()) == 2000


def kill_all_workers_at_work(world: World) -> list[int]:
    """Kill all workers while they hold clips; return these."""
    held: list[int] = []

    def stopped_at_work() -> bool:
        for process in world.workers:
            process.suspend()
        held.extend(
            row[0] for row in world.rows(sa.select(Lease.clip_id).where(Lease.token.is_not(None)))
        )
        if not held:
            for process in world.workers:
                process.resume()
        return bool(held)

    world.until(stopped_at_work, 60)
    faults.kill_all_workers(world)
    return held


def test_a_worker_cut_off_from_the_queue_exits(world: World) -> None:
    world.start_workers(1, EARMARK_WORKER__IDLE_S="4")
    world.until(lambda: "ready" in world.log(), 60)
    deaf = world.workers[0]
    cut_off_from_the_queue(world)
    world.submit(*world.uris(8))
    deaf.wait(SUBMITTED_S)
    world.until_final()
    check_invariants(world)


def cut_off_from_the_queue(world: World) -> None:
    with world.database() as engine:
        queue = own_queue(ledger_id(engine))
    broker.configure(Broker(url=world.valkey.url, queue=queue))
    broker.app.control.cancel_consumer(queue)
    broker.app.close()


def test_the_checks_fail_for_a_feeder_that_takes_nothing_back(world: World) -> None:
    world.settings["FAULT_NO_RECOVERY"] = "1"
    world.submit(*world.uris(CLIPS))
    world.start_workers()
    kill_all_workers_at_work(world)
    with pytest.raises(AssertionError, match="'running'"):
        world.until_final(15)
    with pytest.raises(AssertionError):
        check_invariants(world)


def test_the_checks_fail_for_a_ledger_without_fencing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.submit(*world.uris(1))
    with world.database() as engine:
        (clip_id,) = world.rows(sa.select(Clip.id))[0]
        labels = ledger.register_model(engine, ["dog"], **MODEL)[1]
        zombie = ledger.claim(
            engine, chunk_of(engine, [clip_id]), worker="zombie", limits=Ledger(lease_s=-1.0)
        )
        feeding.take_back(engine, own_queue(ledger_id(engine)))
        successor = ledger.claim(
            engine, chunk_of(engine, [clip_id]), worker="successor", limits=Ledger()
        )
        success = Success(
            clip_id, Source("ab", 1), AudioFacts(1.0, 8000, 1, "pcm"), (Prediction(0, 1.0),)
        )
        ledger.finish(engine, successor, [success], labels, Ledger())
        late = [Failure(clip_id, NotFound(status=404))]
        ledger.finish(engine, zombie, late, labels, Ledger())
        check_invariants(world)
        switch_fencing_off(monkeypatch)
        ledger.finish(engine, zombie, late, labels, Ledger())
    with pytest.raises(AssertionError):
        check_invariants(world)


def switch_fencing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = "SELECT id, 'zombie', uri FROM clips WHERE 0 <> :token AND id IN {ids}"
    monkeypatch.setattr(outcomes, "SELECT_HELD", everything)
