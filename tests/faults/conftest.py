"""A world for each test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.world import running_world
from tests.shared import new_postgres

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.faults.nursery import Nursery
    from tests.faults.world import World
    from tests.servers import Postgres


#: The faults that `make test` has happen, on SQLite: one for each process that may die, for the
#: queue and for the database. `make test-chaos` has the others, which go the same ways.
IN_EACH_TEST_RUN = (
    "kill_a_worker-sqlite", "kill_a_loader-sqlite", "stop_a_worker_past_its_lease-sqlite",
    "drain_a_worker-sqlite", "wipe_redis-sqlite", "fill_the_disk-sqlite",
    "submit_again_and_kill_that-sqlite",
)  # fmt: skip


def pytest_itemcollected(item: pytest.Item) -> None:
    """Leave the other tests of this folder to `make test-chaos`."""
    if not any(f"[{name}]" in item.name for name in IN_EACH_TEST_RUN):
        item.add_marker("chaos")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL server that may be stopped: no other process uses it."""
    server = new_postgres()
    yield server
    server.remove()


@pytest.fixture
def world(
    tmp_path: Path, database_url: str, nursery: Nursery, request: pytest.FixtureRequest
) -> Iterator[World]:
    server: Postgres | None = None
    if database_url.startswith("postgresql"):
        server = request.getfixturevalue("postgres_server")
    with running_world(tmp_path, database_url, nursery, server) as running:
        yield running
