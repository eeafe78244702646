"""The password of a database URL is in no output and no log."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg

from earmark import doctor
from tests.earmark.verbs import verb
from tests.end_to_end.conftest import Earmark, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

SECRET = "CANARY0123456789"
#: SQLAlchemy hides none of these by itself.
OPTIONS = f"?user=postgres&password={SECRET}&sslpassword={SECRET}"
READY = (("db", "upgrade"), ("db", "check"), ("status",))
REFUSED = (
    ("doctor",),
    ("db", "upgrade"),
    ("db", "check"),
    ("status",),
    ("retry", "1"),
    ("query", "SELECT 1"),
)


def refuse_connections(server: str, database: str) -> None:
    """Make PostgreSQL end all connections to a database and refuse new ones."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")  # type: ignore[call-overload]
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [database]
        )


def test_a_password_in_the_url_options_is_in_no_output_and_no_log(
    cluster: Earmark,
    postgres: str,
    postgres_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    database = postgres_url.rpartition("/")[2]
    cluster.settings["EARMARK_DATABASE__URL"] = postgres_url.replace("postgres@", "") + OPTIONS
    cluster.settings["HF_ENDPOINT"] = "http://localhost"
    monkeypatch.setattr(
        doctor, "_model", lambda _: ""
    )  # it takes long to load, and knows no database
    for name, value in cluster.settings.items():
        monkeypatch.setenv(name, value)
    cluster.start("earmark", "worker")
    log = tmp_path / "earmark-0.log"
    wait_until(lambda: log.exists() and "ready, with the model" in log.read_text(), 120)
    seen = [verb(*words) for words in READY]
    assert [ended.status for ended in seen] == [0] * len(READY)
    refuse_connections(postgres, database)
    seen += [verb(*words) for words in REFUSED]
    assert [ended.status for ended in seen[len(READY) :]] == [3] * len(REFUSED)
    wait_until(lambda: "not currently accepting connections" in log.read_text(), 120)
    cluster.end()
    told = "".join(ended.text for ended in seen) + log.read_text()
    assert told.count(database) > len(REFUSED)
    assert SECRET not in told
