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


#: Of the faults on SQLite, those that `make test` has happen: one for each process that may die,
#: for the queue and for the database. `make test-chaos` has the others, which go the same ways.
IN_EACH_TEST_RUN = (
    "kill_a_worker-", "kill_a_loader", "stop_a_worker_past", "drain_a_worker-", "wipe_redis",
    "fill_the_disk", "submit_again_and_kill",
)  # fmt: skip
#: Tests that take half a minute.
LASTING = ("kill_workers_cost", "outage_longer_than", "takes_nothing_back")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Leave faults on PostgreSQL, and more of those on SQLite, to `make test-chaos`."""
    lasts = any(name in item.name for name in LASTING)
    if "on_sqlite_nothing" in item.name:
        lasts = not any(name in item.name for name in IN_EACH_TEST_RUN)
    if lasts or "postgresql" in item.name:
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
