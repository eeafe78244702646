"""The faults: each happens to a world with workers at work, and leaves its services as before."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
import psycopg
import redis
import sqlalchemy as sa

from db.identity import own_queue
from db.models import Clip, LedgerIdentity
from earmark.core import broker
from earmark.core.clips import Chunk
from earmark.core.settings import Broker
from tests.faults.nursery import LOADER

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.world import World

    Fault = Callable[[World], None]

#: A worker that is told to end does so within ten seconds, on a machine that is not this busy.
DRAINED_S = 20


# workers ------------------------------------------------------------------------------------------


def kill_a_worker(world: World) -> None:
    world.worker().kill()


def kill_a_worker_and_its_decoders(world: World) -> None:
    os.killpg(world.worker().pid, signal.SIGKILL)


def kill_a_loader(world: World) -> None:
    a_loader_of(world.worker()).kill()


def stop_a_loader(world: World) -> None:
    a_loader_of(world.worker()).suspend()


def a_loader_of(worker: psutil.Process) -> psutil.Process:
    """Return a worker's loader once it has decoders: from then on it ends with its worker."""
    while True:
        for child in worker.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if child.name() == LOADER and child.children():
                    return child
        time.sleep(0.1)


def kill_all_workers(world: World) -> None:
    for process in world.workers:
        process.kill()


def drain_a_worker(world: World) -> None:
    process = world.worker()
    process.terminate()
    process.wait(DRAINED_S)


def drain_a_worker_and_kill_it_3_s_later(world: World) -> None:
    process = world.worker()
    process.terminate()
    with suppress(psutil.TimeoutExpired, psutil.NoSuchProcess):
        process.wait(3)
    with suppress(psutil.NoSuchProcess):
        process.kill()


def stop_a_worker_past_its_lease(world: World) -> None:
    process = world.worker()
    process.suspend()
    time.sleep(1.5 * float(world.settings["EARMARK_LEDGER__LEASE_S"]))
    process.resume()


def put_a_clock_off(world: World) -> None:
    world.worker().kill()
    world.start_workers(1, FAULT_CLOCK_S=str(world.random.choice([-3600, 3600])))


def fill_the_disk(world: World) -> None:
    """Let no worker make a file longer: neither its downloads nor a SQLite database."""
    for process in world.workers:
        _limit_files(process, 0)
    time.sleep(4)
    for process in world.workers:
        _limit_files(process, resource.RLIM_INFINITY)


def _limit_files(process: psutil.Process, nbytes: int) -> None:
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        hard = process.rlimit(resource.RLIMIT_FSIZE)[1]
        process.rlimit(resource.RLIMIT_FSIZE, (nbytes, hard))


# Redis --------------------------------------------------------------------------------------------


def restart_redis_that_forgets(world: World) -> None:
    world.valkey.stop(signal.SIGKILL)
    time.sleep(1)
    world.valkey.start()


def restart_redis_that_remembers(world: World) -> None:
    with _redis(world) as client:
        client.config_set("appendonly", "yes")
        while client.info("persistence")["aof_rewrite_in_progress"]:
            time.sleep(0.1)
    world.valkey.stop(signal.SIGKILL)
    world.valkey.start("--appendonly", "yes")


def wipe_redis(world: World) -> None:
    with _redis(world) as client:
        client.flushall()


def make_redis_read_only(world: World) -> None:
    with _redis(world) as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        time.sleep(3)
        client.execute_command("REPLICAOF", "NO", "ONE")


def let_redis_run_out_of_memory(world: World) -> None:
    with _redis(world) as client:
        client.config_set("maxmemory", 1)
        time.sleep(3)
        client.config_set("maxmemory", 0)


def drop_redis_connections(world: World) -> None:
    with _redis(world) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def stop_redis_for_10_s(world: World) -> None:
    world.valkey.process.send_signal(signal.SIGSTOP)
    time.sleep(10)
    world.valkey.process.send_signal(signal.SIGCONT)


def send_a_chunk_twice_and_one_of_another_version(world: World) -> None:
    rows = world.rows(sa.select(Clip.id, Clip.display_uri).limit(8))
    [(identity,)] = world.rows(sa.select(LedgerIdentity.id))
    broker.configure(Broker(url=world.valkey.url, queue=own_queue(identity)))
    try:
        broker.send_chunks([Chunk(identity, 1, tuple(rows))] * 2)
        broker.app.send_task(broker.TASK, args=[{"v": 99, "clips": "?"}])
        broker.app.send_task(broker.TASK, args=["nothing of ours"])
    finally:
        broker.app.close()


def _redis(world: World) -> redis.Redis:
    return redis.Redis.from_url(world.valkey.url)


# the database -------------------------------------------------------------------------------------


def restart_postgres_at_once(world: World) -> None:
    assert world.postgres is not None
    world.postgres.stop("immediate")
    time.sleep(1)
    world.postgres.start()


END_CONNECTIONS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
)


def stop_postgres_for_10_s(world: World) -> None:
    assert world.postgres is not None
    world.postgres.stop()
    time.sleep(10)
    world.postgres.start()


def end_postgres_connections(world: World) -> None:
    _ask_postgres(world, END_CONNECTIONS + " AND datname = current_database()")


def make_postgres_read_only_for_12_s(world: World) -> None:
    """Fail over to a server that is read-only, and back; connections are ended both times."""
    make_postgres_read_only(world, 12, pinned=False)


def make_postgres_read_only_for_6_s_and_keep_connections(world: World) -> None:
    """Fail over to a server that is read-only at first; connections made then stay read-only."""
    make_postgres_read_only(world, 6, pinned=True)


def make_postgres_read_only(world: World, seconds: float, *, pinned: bool) -> None:
    assert world.postgres is not None
    database = world.database_url.rpartition("/")[2]
    of_database = f"{END_CONNECTIONS} AND datname = '{database}'"
    with psycopg.connect(world.postgres.url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")  # type: ignore[call-overload]
        connection.execute(of_database)  # type: ignore[call-overload]
        time.sleep(seconds)
        connection.execute(f"ALTER DATABASE {database} RESET default_transaction_read_only")  # type: ignore[call-overload]
        if not pinned:
            connection.execute(of_database)  # type: ignore[call-overload]


def use_up_postgres_connections(world: World) -> None:
    assert world.postgres is not None
    held: list[psycopg.Connection] = []
    _take_connections(world.postgres.url, held)
    held[0].execute(END_CONNECTIONS + f" AND datname = '{world.database_url.rpartition('/')[2]}'")  # type: ignore[arg-type]
    _take_connections(world.postgres.url, held)
    time.sleep(3)
    for connection in held:
        connection.close()


def _take_connections(url: str, held: list[psycopg.Connection]) -> None:
    with suppress(psycopg.OperationalError):
        while True:
            held.append(psycopg.connect(url, autocommit=True))


def fail_postgres_transactions(world: World) -> None:
    """Fail each third update of a clip, in turns as serialization does and as a full disk does."""
    _ask_postgres(
        world,
        """
        CREATE SEQUENCE faults;
        CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE turn bigint := nextval('faults');
        BEGIN
            IF turn % 6 = 0 THEN RAISE 'no space' USING ERRCODE = 'disk_full'; END IF;
            IF turn % 6 = 3 THEN RAISE 'not now' USING ERRCODE = 'serialization_failure'; END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER fault BEFORE UPDATE ON clips EXECUTE FUNCTION fault();
        """,
    )
    time.sleep(4)
    _ask_postgres(world, "DROP TRIGGER fault ON clips; DROP FUNCTION fault; DROP SEQUENCE faults")


def _ask_postgres(world: World, statement: str) -> None:
    url = world.database_url.replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)  # type: ignore[call-overload]


def lock_sqlite_for_20_s(world: World) -> None:
    path = world.database_url.removeprefix("sqlite:///")
    connection = sqlite3.connect(path, timeout=30, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    time.sleep(20)
    connection.rollback()
    connection.close()


# users --------------------------------------------------------------------------------------------


def submit_again_and_kill_that(world: World) -> None:
    producer = world.submit(*sorted(world.submitted), wait=False, name="again")
    time.sleep(world.random.uniform(0.5, 3))
    producer.kill()
    producer.communicate()


ON_ANY: tuple[Fault, ...] = (
    kill_a_worker,
    kill_a_worker_and_its_decoders,
    kill_a_loader,
    stop_a_loader,
    kill_all_workers,
    drain_a_worker,
    drain_a_worker_and_kill_it_3_s_later,
    stop_a_worker_past_its_lease,
    put_a_clock_off,
    fill_the_disk,
    restart_redis_that_forgets,
    restart_redis_that_remembers,
    wipe_redis,
    make_redis_read_only,
    let_redis_run_out_of_memory,
    drop_redis_connections,
    stop_redis_for_10_s,
    send_a_chunk_twice_and_one_of_another_version,
    submit_again_and_kill_that,
)
ON_SQLITE: tuple[Fault, ...] = (*ON_ANY, lock_sqlite_for_20_s)
ON_POSTGRES: tuple[Fault, ...] = (
    *ON_ANY,
    restart_postgres_at_once,
    stop_postgres_for_10_s,
    end_postgres_connections,
    make_postgres_read_only_for_12_s,
    make_postgres_read_only_for_6_s_and_keep_connections,
    use_up_postgres_connections,
    fail_postgres_transactions,
)
#: After these every worker is alive: with a lease that outlasts them, no clip may count a crash.
OUTAGES_OF_POSTGRES: tuple[Fault, ...] = (
    restart_postgres_at_once,
    stop_postgres_for_10_s,
    end_postgres_connections,
    make_postgres_read_only_for_12_s,
    make_postgres_read_only_for_6_s_and_keep_connections,
)
