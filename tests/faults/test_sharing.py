"""Ledgers that share a Redis: each classifies its own clips with its own options."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from alembic import command

from db import schema
from db.identity import own_queue
from db.models import Lease, LedgerIdentity, Run
from db.session import connect, execute, writing
from earmark.core import broker
from earmark.core.clips import uri_key
from earmark.core.options import RunOptions
from earmark.core.settings import Broker, Database
from tests.faults.sharing import SHARED_QUEUE, Member, Schedules, until, write_files
from tests.servers import Valkey, free_port, upgraded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.faults.nursery import Nursery
    from tests.servers import Postgres

INSERT_OLD_RUN = (
    "INSERT INTO runs (id, name, options, queue, chunk_size, created_at)"
    " VALUES (1, 'old', :options, 'clips', 4, 1)"
)
INSERT_OLD_CLIP = (
    "INSERT INTO clips (run_id, uri, uri_key, state) VALUES (1, :uri, :key, 'pending')"
)
INSERT_OLD_COUNT = (
    "INSERT INTO run_counts (run_id, state, writer, clips, audio_s, finished_at)"
    " VALUES (1, 'pending', 0, :clips, 0, 0)"
)
WITHIN_S = 90.0
FEW = 12


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    server = Valkey(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return write_files(tmp_path / "files", FEW)


@pytest.fixture
def member(tmp_path: Path, valkey: Valkey, nursery: Nursery) -> Iterator[Callable[..., Member]]:
    """Make ledgers on SQLite that share the Valkey."""
    members: list[Member] = []

    def make(queue: str | None = SHARED_QUEUE, **more: str) -> Member:
        folder = tmp_path / f"member-{len(members)}"
        folder.mkdir()
        url = upgraded(f"sqlite:///{folder}/earmark.db")
        members.append(Member(folder, valkey.url, url, queue, nursery, more))
        return members[-1]

    yield make
    for one in members:
        one.kill_workers()


def identity_of(member: Member) -> str:
    [(identity,)] = member.rows(sa.select(LedgerIdentity.id))
    return str(identity)


def ready(port: int) -> int | None:
    """Return the status of /ready, None while nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def send(member: Member, message: dict[str, Any]) -> None:
    """Put a message of any kind into a member's queue."""
    queue = member.queue or own_queue(identity_of(member))
    broker.configure(Broker(url=member.broker_url, queue=queue))
    broker.app.send_task(broker.TASK, args=[message])
    broker.app.close()


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_two_ledgers_on_one_redis_give_no_wrong_result(
    database: str, tmp_path: Path, valkey: Valkey, nursery: Nursery, request: pytest.FixtureRequest
) -> None:
    postgres: Postgres | None = None
    if database == "postgresql":
        postgres = request.getfixturevalue("postgres_server")
    schedules = Schedules(tmp_path, valkey, nursery, postgres)
    for seed in (4, 5):  # a queue of each, and a shared one
        schedules.run(seed)
    assert (schedules.wrong, schedules.failed) == ([], 0)


def test_a_worker_that_gets_only_foreign_chunks_puts_them_back_and_is_not_ready(
    member: Callable[..., Member], files: list[Path]
) -> None:
    port = free_port()
    idle, busy = member(EARMARK_WORKER__METRICS_PORT=str(port)), member()
    idle.start_worker()
    until(lambda: ready(port) == 200, WITHIN_S, idle.log)
    busy.submit(files, RunOptions())
    until(lambda: ready(port) == 503, WITHIN_S, idle.log)
    assert busy.states() == {"queued": FEW}
    assert idle.log().count("holds chunks of another database") == 1
    assert "set EARMARK_DATABASE__URL" in idle.log()
    assert idle.workers[0].is_running()
    # What this ledger gets to do is done although the other's chunks fill the queue.
    idle.submit(files, RunOptions(top_k=1))
    until(lambda: idle.final, WITHIN_S, idle.log)
    busy.start_worker()
    until(lambda: busy.final, WITHIN_S, busy.log)
    assert busy.states() == idle.states() == {"done": FEW}


def test_unusable_messages_cost_no_clip_and_leave_the_queue(
    member: Callable[..., Member], files: list[Path]
) -> None:
    one = member(None)
    one.submit(files, RunOptions())
    ids = [[number, "u"] for number in range(1, FEW + 1)]
    send(one, {"v": 1, "run_id": 1, "clips": ids})
    send(one, {"v": 2, "ledger": identity_of(one), "run_id": 7, "clips": ids})
    send(one, {"v": 2, "ledger": "of a database that was replaced", "run_id": 1, "clips": ids})
    one.start_worker()
    until(lambda: one.final, WITHIN_S, one.log)
    assert one.states() == {"done": FEW}
    assert one.log().count("message version 1") == 1
    # The queue's lease is short here.
    broker.configure(Broker(url=one.broker_url, queue=own_queue(identity_of(one))))
    until(lambda: broker.queue_length() + broker.chunks_in_hand() == 0, WITHIN_S, one.log)
    broker.app.close()


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_clips_queued_by_an_older_earmark_are_classified_after_the_upgrade(
    database: str, member: Callable[..., Member], files: list[Path], request: pytest.FixtureRequest
) -> None:
    one = member(None)
    one.database_url = f"sqlite:///{one.folder}/old.db"
    if database == "postgresql":
        one.database_url = request.getfixturevalue("postgres_server").new_database()
    engine = connect(one.database_url, Database())
    with writing(engine) as connection:
        command.upgrade(schema._config(connection), "v0_1_0")
    options = json.dumps(RunOptions().as_json())
    with writing(engine) as connection:
        execute(connection, INSERT_OLD_RUN, options=options)
        for file in files:
            execute(connection, INSERT_OLD_CLIP, uri=str(file), key=uri_key(str(file)))
        execute(connection, INSERT_OLD_COUNT, clips=len(files))
    one.submitted = len(files)
    lease = (
        "INSERT INTO leases (clip_id, run_id, until)"
        " SELECT id, run_id, {now} + 10 FROM clips WHERE id < 6"
    )
    with writing(engine) as connection:
        execute(connection, lease)
    engine.dispose()
    upgraded(one.database_url)
    one.start_worker()
    until(lambda: one.final, WITHIN_S, one.log)
    assert one.states() == {"done": FEW}
    assert one.rows(sa.select(Run.queue)) == [(own_queue(identity_of(one)),)]
    assert one.rows(sa.select(Lease.clip_id)) == []


def test_a_worker_with_an_empty_sqlite_file_logs_it_and_is_not_ready(
    member: Callable[..., Member], files: list[Path]
) -> None:
    port = free_port()
    right, wrong = member(None), member(None, EARMARK_WORKER__METRICS_PORT=str(port))
    # Another name of this machine, which Earmark takes for another machine's.
    wrong.broker_url = wrong.broker_url.replace("127.0.0.1", "127.0.0.2")
    right.start_worker()
    wrong.start_worker()
    until(
        lambda: "has no runs, while another database is at work" in wrong.log(), WITHIN_S, wrong.log
    )
    until(lambda: ready(port) == 503, WITHIN_S)
    right.submit(files, RunOptions())
    until(lambda: right.final, WITHIN_S, right.log)
    assert right.states() == {"done": FEW}
    assert wrong.log().count("has no runs") == 1
    assert wrong.workers[0].is_running()
    # As soon as there is work for it, all is well.
    wrong.submit(files, RunOptions())
    until(lambda: wrong.final and ready(port) == 200, WITHIN_S, wrong.log)
