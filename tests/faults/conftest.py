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


#: Faults that take their time, beside all on PostgreSQL.
LASTING = (
    "lock_sqlite_for_20_s", "stop_redis_for_10_s", "outage_longer_than", "takes_nothing_back",
)  # fmt: skip


def pytest_itemcollected(item: pytest.Item) -> None:
    """Leave each fault on SQLite to `make test`, and the others to `make test-chaos`."""
    if "postgresql" in item.name or any(name in item.name for name in LASTING):
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
