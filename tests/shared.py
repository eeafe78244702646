"""What all processes of a test run share: the first of them starts it, the last one ends it."""

from __future__ import annotations

import fcntl
import pickle
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.servers import Postgres, upgraded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEMPLATE = "template_earmark"


@contextmanager
def shared_postgres(folder: Path) -> Iterator[Postgres]:
    """Yield the PostgreSQL server of this folder, with a template database at our schema."""
    with (folder / "postgres.users").open("w") as users:
        with locked(folder / "postgres.lock"):
            fcntl.flock(users, fcntl.LOCK_SH)
            server = _started(folder / "postgres")
        yield server
        with locked(folder / "postgres.lock"):
            if _is_last(users):
                server.remove()
                (folder / "postgres").unlink()


def new_postgres() -> Postgres:
    """Start a server with a template database at our schema."""
    server = Postgres()
    upgraded(server.new_database(TEMPLATE))
    return server


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _started(file: Path) -> Postgres:
    if not file.exists():
        file.write_bytes(pickle.dumps(new_postgres()))
    server: Postgres = pickle.loads(file.read_bytes())
    return server


def _is_last(users: Any) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
