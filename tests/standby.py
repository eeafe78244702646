"""A PostgreSQL that follows another by streaming replication: a read-only hot standby."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from tests.servers import Postgres, free_port

CAUGHT_UP_S = 120.0


class Standby(Postgres):
    """Follows a primary from the moment it is made; its databases have the same names."""

    def __init__(self, primary: Postgres) -> None:
        self._primary_url = primary.url
        self._folder = Path(tempfile.mkdtemp(prefix="earmark-standby-"))
        self._folder.chmod(0o777)
        self._who = primary._who
        self._binaries = primary._binaries
        data, port = self._folder / "data", free_port()
        copy = [
            str(self._binaries / "pg_basebackup"),
            "--dbname",
            primary.url,
            "--pgdata",
            str(data),
        ]
        copy += ["--write-recovery-conf", "--checkpoint=fast", "--no-sync"]
        subprocess.run(copy, check=True, capture_output=True, cwd=self._folder, **self._who)
        self._begin(data, port, {})

    def following(self, url: str) -> str:
        """Return the standby's URL of a database of the primary, once it has caught up."""
        with psycopg.connect(self._primary_url, autocommit=True) as primary:
            (written,) = primary.execute("SELECT pg_current_wal_lsn()").fetchone() or ("",)
        deadline = time.monotonic() + CAUGHT_UP_S
        with psycopg.connect(self.url, autocommit=True) as standby:
            while standby.execute("SELECT pg_last_wal_replay_lsn() < %s", [written]).fetchone() != (
                False,
            ):
                assert time.monotonic() < deadline, "the standby does not follow"
                time.sleep(0.05)
        return f"{self.url.rpartition('/')[0]}{urlsplit(url).path}"
