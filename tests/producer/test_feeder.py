"""The feeder: a full queue and no more, hosts mixed, suspects alone, a wiped queue filled again."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from db import ledger
from db.models import Clip
from db.session import connect, reading
from earmark.core import broker
from earmark.core.clips import Clip as ListedClip
from earmark.core.errors import DatabaseError, ServiceError
from earmark.core.options import RunOptions
from earmark.core.settings import Broker, Database, Ledger, Settings
from producer.feeder import Feeder
from producer.submit import submit
from tests.db.builders import add_clips, chunk_of
from tests.servers import free_port

if TYPE_CHECKING:
    from pathlib import Path


def feed(engine: sa.Engine, settings: Settings) -> int:
    return Feeder(engine, settings).feed()


def new_run(
    engine: sa.Engine, count: int, *, host: str = "h", chunk_size: int = 8, priority: int = 1
) -> int:
    run_id = ledger.open_run(
        engine, None, RunOptions(), queue="clips", chunk_size=chunk_size, priority=priority
    )
    add_clips(
        engine, run_id, [ListedClip(f"https://{host}{n % 2}/{n}?key=secret") for n in range(count)]
    )
    return run_id


def taken_from_queue() -> list[dict[str, object]]:
    messages = [broker.client().rpop("earmark:clips") for _ in range(broker.queue_length())]
    decoded = []
    for message in messages:
        body = json.loads(base64.b64decode(json.loads(message)["body"]))
        decoded.append(body[0][0])
    return decoded


def test_the_queue_is_filled_to_its_high_water_mark(engine: sa.Engine, settings: Settings) -> None:
    new_run(engine, 1000)
    assert feed(engine, settings) == 4
    assert broker.queue_length() == 4
    assert feed(engine, settings) == 0
    taken_from_queue()
    assert feed(engine, settings) >= 4


def sizes_in_queue() -> set[int]:
    return {len(broker.decode(message).clips) for message in taken_from_queue()}


def test_a_chunk_has_two_batches_of_a_workers_device_unless_the_run_says_how_large(
    engine: sa.Engine, settings: Settings
) -> None:
    new_run(engine, 4000, chunk_size=0)
    of_submitter, of_gpu_worker, of_cpu_worker = (Feeder(engine, settings) for _ in range(3))
    of_cpu_worker.batch_windows, of_gpu_worker.batch_windows = 8, 64
    of_cpu_worker.feed()
    assert sizes_in_queue() == {32}
    of_gpu_worker.feed()
    assert sizes_in_queue() == {128}
    new_run(engine, 80, chunk_size=8)
    of_cpu_worker.feed()
    of_submitter.feed()
    assert sizes_in_queue() == {128, 8}


def test_the_batch_of_a_device_is_forgotten_with_its_workers(
    settings: Settings,
) -> None:
    broker.note_batch(64)
    key = f"{broker.BATCH_KEY}{settings.broker.queue}"
    assert 0 < broker.client().ttl(key) <= broker.BATCH_KEPT_S
    broker.client().delete(key)
    assert broker.noted_batch() == 0


def test_a_message_names_clips_without_their_signatures_and_mixes_hosts(
    engine: sa.Engine, settings: Settings
) -> None:
    run_id = new_run(engine, 8)
    feed(engine, settings)
    (message,) = taken_from_queue()
    chunk = broker.decode(message)
    assert chunk.run_id == run_id
    assert [uri[:10] for _, uri in chunk.clips] == ["https://h0", "https://h1"] * 4
    assert "secret" not in str(message)


def test_a_clip_of_a_crashed_chunk_travels_alone(engine: sa.Engine, settings: Settings) -> None:
    new_run(engine, 4)
    feed(engine, settings)
    taken_from_queue()
    with reading(engine) as connection:
        ids = [row.id for row in connection.execute(Clip.__table__.select())]
    ledger.claim(engine, chunk_of(engine, ids[:2]), worker="w", limits=Ledger(lease_s=-1.0))
    feed(engine, settings)
    chunks = [broker.decode(message).clips for message in taken_from_queue()]
    assert sorted(len(clips) for clips in chunks) == [1, 1, 2]


def test_a_wiped_queue_is_filled_again(engine: sa.Engine, settings: Settings) -> None:
    new_run(engine, 16)
    assert feed(engine, settings) == 2
    broker.client().flushall()
    assert feed(engine, settings) == 2


def test_clips_whose_worker_died_before_it_claimed_them_are_sent_again(
    engine: sa.Engine, settings: Settings
) -> None:
    patient = settings.model_copy(update={"ledger": Ledger(lost_after_s=10.0)})
    impatient = settings.model_copy(update={"ledger": Ledger(lost_after_s=0.0)})
    new_run(engine, 16)
    feed(engine, settings)
    for message in taken_from_queue():
        broker.client().hset(
            "earmark:unacked:clips", str(message), "taken by a worker that is dead"
        )
    assert feed(engine, patient) == 0
    assert feed(engine, impatient) == 2


def test_after_a_database_outage_workers_have_time_to_renew_their_leases(
    engine: sa.Engine, settings: Settings
) -> None:
    new_run(engine, 8)
    feeder = Feeder(engine, settings.model_copy(update={"ledger": Ledger(settle_s=600.0)}))
    feeder.feed()
    with reading(engine) as connection:
        ids = list(connection.scalars(sa.select(Clip.id)))
    ledger.claim(engine, chunk_of(engine, ids), worker="w", limits=Ledger(lease_s=-1.0))
    out_of_reach(feeder)
    assert feeder.feed() == 0
    assert Feeder(engine, settings).feed() == 8


def out_of_reach(feeder: Feeder) -> None:
    engine = feeder._engine
    feeder._engine = connect("postgresql://nobody@127.0.0.1:1/none", Database(connect_timeout_s=2))
    with pytest.raises(DatabaseError):
        feeder.feed()
    feeder._engine.dispose()
    feeder._engine = engine


def test_two_runs_share_the_queue_in_proportion_to_their_priorities(
    engine: sa.Engine, settings: Settings
) -> None:
    slow, fast = new_run(engine, 500), new_run(engine, 500, priority=3)
    feeder = Feeder(engine, settings)
    for _ in range(5):
        feeder.feed()
        runs = [broker.decode(message).run_id for message in taken_from_queue()]
        assert sorted(runs) == [slow, fast, fast, fast]


def test_chunks_wiped_a_moment_ago_are_sent_again(engine: sa.Engine, settings: Settings) -> None:
    patient = settings.model_copy(update={"ledger": Ledger(lost_after_s=600.0)})
    new_run(engine, 32)
    assert feed(engine, patient) == 4
    broker.client().flushall()
    assert feed(engine, patient) == 4


def test_the_high_water_mark_grows_with_the_chunks_in_hand(
    engine: sa.Engine, settings: Settings
) -> None:
    new_run(engine, 1000)
    for tag in range(20):
        broker.client().hset("earmark:unacked:clips", str(tag), "chunk")
    assert feed(engine, settings) == 40


def test_another_versions_message_is_distinguished_from_a_foreign_one() -> None:
    for other in ({"v": 1, "run_id": 1, "clips": [[1, "u"]]}, {"v": 3}):
        with pytest.raises(broker.OtherVersionError):
            broker.decode(other)
    for none in (
        {"v": 2, "ledger": "l", "run_id": 1, "clips": [["x"]]},
        {"v": 2, "run_id": 1, "clips": []},
        {},
        "?",
    ):
        with pytest.raises(broker.MessageError):
            broker.decode(none)


def test_submit_counts_every_line(engine: sa.Engine, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("https://h/a\nhttps://h/b\n\nHTTPS://h:443/a\n")
    first = submit([str(tmp_path / "list.txt")], engine, settings, name="mine")
    assert (first.added, first.known, first.tally.blank) == (2, 1, 1)
    again = submit([str(tmp_path / "list.txt")], engine, settings, name="mine")
    assert (again.run_id, again.added, again.known) == (first.run_id, 0, 3)
    assert submit(["https://h/c", "https://h/d"], engine, settings, limit=1).tally.clips == 1


def test_an_unreachable_broker_raises_one_sentence(engine: sa.Engine) -> None:
    unreachable = Settings(broker=Broker(url=f"redis://127.0.0.1:{free_port()}/0", queue="clips"))
    broker.configure(unreachable.broker)
    new_run(engine, 1)
    with pytest.raises(ServiceError, match="EARMARK_BROKER__URL"):
        feed(engine, unreachable)
    broker.app.close()
