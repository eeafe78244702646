"""What many tests share: both databases, each test with a schema of its own."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import psycopg
import pytest
from playwright.sync_api import Browser, sync_playwright

from db.session import connect
from earmark.settings import Database
from tests.servers import PgBouncer, Postgres, upgraded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import sqlalchemy as sa

#: A browser that keeps to the pages it is shown.
CHROMIUM = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, so that they are not left to run alone at the end."""
    items.sort(key=lambda item: "test_chaos" not in item.nodeid)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, which `make test` installs."""
    program = shutil.which("chromium")
    assert program, "the tests need the Debian package chromium"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL server with a template database at our schema."""
    server = Postgres()
    try:
        _run(server.url, "CREATE DATABASE template_earmark")
        upgraded(_named(server.url, "template_earmark"))
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def postgres(postgres_server: Postgres) -> str:
    return postgres_server.url


@pytest.fixture
def postgres_url(postgres: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a database of the test's own."""
    name = f"test_{abs(hash(request.node.nodeid))}"
    _run(postgres, f"CREATE DATABASE {name} TEMPLATE template_earmark")
    yield _named(postgres, name)
    _run(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def empty_postgres_url(postgres: str) -> Iterator[str]:
    """The URL of a database that no Earmark has seen."""
    _run(postgres, "CREATE DATABASE empty")
    yield _named(postgres, "empty")
    _run(postgres, "DROP DATABASE empty WITH (FORCE)")


@pytest.fixture
def pooler(postgres_server: Postgres) -> Iterator[PgBouncer]:
    """A PgBouncer whose clients share two server connections, a transaction each."""
    bouncer = PgBouncer(postgres_server.url, pool_size=2)
    yield bouncer
    bouncer.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an upgraded database; the test runs once on each kind."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return upgraded(f"sqlite:///{tmp_path}/earmark.db")


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = connect(database_url, Database())
    yield engine
    engine.dispose()


def _named(url: str, database: str) -> str:
    return url.rpartition("/")[0] + f"/{database}"


def _run(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)  # type: ignore[call-overload]
