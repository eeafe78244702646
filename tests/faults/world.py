"""A small cluster that faults happen to, and the one check of what must hold afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from db.models import Clip
from db.session import connect, reading
from earmark.clips import FINAL_STATES
from earmark.settings import Database

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LEASE_S = 4.0
#: The lease, the feeder's next look, a process's start and its model's loading, on a busy machine.
RECOVERY_S = LEASE_S + 60


@dataclass
class World:
    """Workers under a supervisor that starts them again, as systemd or compose would."""

    folder: Path
    settings: dict[str, str]
    extra_path: str = ""
    _workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def submit(self, *uris: str) -> None:
        list_file = self.folder / "list.txt"
        list_file.write_text("\n".join(uris))
        self._run("submit", str(list_file))

    def start_worker(self) -> subprocess.Popen[bytes]:
        with (self.folder / "worker.log").open("ab") as log:
            command = [sys.executable, "-m", "console.cli", "worker"]
            process = subprocess.Popen(command, env=self._environment(), cwd=self.folder, stdout=log, stderr=log)
        self._workers.append(process)
        return process

    def until(self, done: Callable[[dict[str, int]], bool], seconds: float) -> dict[str, int]:
        """Supervise until the states of the clips are as wanted; return them."""
        deadline = time.monotonic() + seconds
        while not done(states := self.states()):
            assert time.monotonic() < deadline, f"after {seconds} s: {states}"
            self._supervise()
            time.sleep(0.2)
        return states

    def until_final(self, seconds: float = RECOVERY_S) -> dict[str, int]:
        return self.until(lambda states: set(states) <= set(FINAL_STATES), seconds)

    def states(self) -> dict[str, int]:
        return dict(self.rows(sa.select(Clip.state, sa.func.count()).group_by(Clip.state)))

    def rows(self, statement: Any) -> list[Any]:
        engine = connect(self.settings["EARMARK_DATABASE__URL"], Database())
        try:
            with reading(engine) as connection:
                return [tuple(row) for row in connection.execute(statement)]
        finally:
            engine.dispose()

    def end(self) -> None:
        for process in self._workers:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def _supervise(self) -> None:
        for process in [process for process in self._workers if process.poll() is not None]:
            self._workers.remove(process)
            self.start_worker()

    def _run(self, *words: str) -> None:
        command = [sys.executable, "-m", "console.cli", *words]
        ended = subprocess.run(command, env=self._environment(), cwd=self.folder, capture_output=True, timeout=120)
        assert ended.returncode == 0, ended.stderr.decode()

    def _environment(self) -> dict[str, str]:
        paths = [self.extra_path, *filter(None, [os.environ.get("PYTHONPATH")])]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("EARMARK_")}
        return {**inherited, **self.settings, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def check_invariants(world: World, submitted: int, *, poison: int = 0, max_attempts: int = 3) -> None:
    """Assert that every clip has one final state, its results match it, and none failed for a neighbour."""
    states = world.states()
    assert sum(states.values()) == submitted
    assert set(states) <= set(FINAL_STATES)
    heard = {row[0] for row in world.rows(sa.select(Clip.id).where(Clip.label_id.is_not(None)))}
    done = {row[0] for row in world.rows(sa.select(Clip.id).where(Clip.state == "done"))}
    assert heard == done
    assert max(row[0] for row in world.rows(sa.select(Clip.attempts))) <= max_attempts
    failed = world.rows(sa.select(Clip.uri, Clip.error_code).where(Clip.state == "failed"))
    assert len(failed) == poison
    assert all("poison" in uri and code == "worker_lost" for uri, code in failed)
