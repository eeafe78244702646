"""What many tests share: both databases, each test with a schema of its own."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from db.session import connect
from earmark.core.settings import Database
from tests import needs
from tests.faults.nursery import Nursery, running_nursery
from tests.servers import PgBouncer, copied_sqlite
from tests.shared import TEMPLATE, shared_postgres

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sqlalchemy as sa
    from playwright.sync_api import Browser

    from tests.servers import Postgres

#: A browser that keeps to the pages it is shown.
CHROMIUM = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

# While the tests are imported, millions of objects come and none goes: looking for garbage among
# them takes 5 of 13 seconds.
gc.disable()

# `nohup` ignores it for all children too, which must end with it; of a handler they know nothing.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# Whatever the terminal is in which the tests are run, they see the same one.
os.environ["TERM"] = "xterm"
for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
    os.environ.pop(name, None)

#: Their tests share what takes long to set up, so they stay in one process.
TOGETHER = (
    "test_deploy",
    "test_watching",
    "test_architectures",
    "test_page",
    "test_pool",
    "test_report",
    "test_review_page",
)
#: A test has a mark if it uses one of these fixtures: they start programs.
MARKED_BY_FIXTURE = {
    "browser": ("browser", "slow"),
    "postgres_server": ("postgresql",),
    "earmark": ("slow",),
    "cluster": ("slow",),
    "nursery": ("slow",),
    "corpus": ("slow",),
    "watched": ("slow",),
}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test by its fixtures."""
    for fixture in MARKED_BY_FIXTURE.keys() & set(item.fixturenames):  # type: ignore[attr-defined]
        for mark in MARKED_BY_FIXTURE[fixture]:
            item.add_marker(mark)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process one test at a time, or a whole module whose tests share a slow set-up."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return module if Path(module).stem in TOGETHER else nodeid

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, so that none of them runs alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Look for garbage from now on, but not among what was imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, which `make test` installs."""
    program = needs.program("chromium")
    needs.module("playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run have."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if hasattr(request.config, "workerinput") else own


@pytest.fixture(scope="session")
def nursery(shared: Path) -> Iterator[Nursery]:
    """The process from which the command line and its workers are forked."""
    with running_nursery(shared) as nursery:
        yield nursery


@pytest.fixture(scope="session")
def postgres_server(shared: Path) -> Iterator[Postgres]:
    """The PostgreSQL server of this test run, with a template database at our schema."""
    with shared_postgres(shared) as server:
        yield server


@pytest.fixture(scope="session")
def postgres(postgres_server: Postgres) -> str:
    return postgres_server.url


@pytest.fixture
def postgres_url(postgres_server: Postgres) -> Iterator[str]:
    """The URL of a database of the test's own."""
    with postgres_server.database(TEMPLATE) as url:
        yield url


@pytest.fixture
def empty_postgres_url(postgres_server: Postgres) -> Iterator[str]:
    """The URL of a database that no Earmark has seen."""
    with postgres_server.database() as url:
        yield url


@pytest.fixture
def pooler(postgres_server: Postgres) -> Iterator[PgBouncer]:
    """A PgBouncer whose clients share two server connections, a transaction each."""
    bouncer = PgBouncer(postgres_server.url, pool_size=2)
    yield bouncer
    bouncer.remove()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an upgraded database; the test runs once on each kind."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return copied_sqlite(tmp_path / "earmark.db")


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = connect(database_url, Database())
    yield engine
    engine.dispose()
