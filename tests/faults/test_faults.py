"""Faults, one by one: whatever is killed, every clip ends in exactly one final state."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
import redis

from console.demo import EXAMPLES
from tests.faults.world import LEASE_S, World, check_invariants
from tests.servers import running_valkey, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLIPS = 64


@pytest.fixture
def world(tmp_path: Path, database_url: str) -> Iterator[World]:
    """One Valkey, a file server and a supervisor; no worker yet."""
    with running_valkey(tmp_path) as broker, serving(EXAMPLES, delay_s=0.05) as files:
        settings = {
            "EARMARK_BROKER__URL": broker,
            "EARMARK_DATABASE__URL": database_url,
            "EARMARK_LEDGER__LEASE_S": str(LEASE_S),
            "EARMARK_LEDGER__LOST_AFTER_S": "2",
            "EARMARK_FETCH__ALLOW_NETWORKS": "127.0.0.1/32",
            "EARMARK_FETCH__PORTS": files.rpartition(":")[2],
        }
        cluster = World(tmp_path, settings)
        cluster.files = files  # type: ignore[attr-defined]
        yield cluster
        cluster.end()


def urls(world: World, count: int = CLIPS) -> list[str]:
    return [f"{world.files}/dog.ogg?{number}" for number in range(count)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_zombie_writes_nothing_that_its_successor_has_written(world: World) -> None:
    world.submit(*urls(world))
    zombie = world.start_worker()
    world.until(lambda states: states.get("done", 0) >= 8, 90)
    os.kill(zombie.pid, signal.SIGSTOP)
    time.sleep(LEASE_S)
    world.start_worker()
    world.until_final()
    os.kill(zombie.pid, signal.SIGCONT)
    time.sleep(LEASE_S)
    check_invariants(world, CLIPS)


def test_a_wiped_redis_loses_nothing(world: World) -> None:
    world.submit(*urls(world, 1200))
    world.start_worker()
    world.until(lambda states: states.get("done", 0) >= 8, 90)
    with redis.Redis.from_url(world.settings["EARMARK_BROKER__URL"]) as client:
        client.flushall()
    world.until_final(180)
    check_invariants(world, 1200)
