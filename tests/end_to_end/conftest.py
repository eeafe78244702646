"""The real command line in subprocesses, with a data folder and settings for each test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import psutil
import psycopg
import pytest

from tests.servers import running_valkey, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.nursery import Child, Nursery

#: Time limit of a child process on a loaded machine; only ends a test that hangs.
TIMEOUT_S = 180
LOG_CHARS = 4000
#: In the log of a worker that takes chunks.
READY = "ready, with the model"


@dataclass
class Earmark:
    """Runs `earmark` verbs, and ends those that it started in the background."""

    settings: dict[str, str]
    folder: Path
    #: Without one, each command starts a Python, which takes a second, and a worker four.
    nursery: Nursery | None = None
    _background: list[subprocess.Popen[str] | Child] = field(default_factory=list)

    def __call__(
        self, *words: str, status: int = 0, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        ended = self.ended(*words, stdin=stdin)
        assert ended.returncode == status, ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        return ended

    def ended(
        self,
        *words: str,
        stdin: str = "",
        stdout: int | None = None,
        longest_file: int | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a verb to its end, with whatever status; its output may go to a descriptor."""
        if self.nursery is None:
            return self._run(words, stdin)
        with TemporaryFile("w+") as asked, TemporaryFile("w+") as told, TemporaryFile("w+") as log:
            asked.write(stdin)
            asked.seek(0)
            child = self.nursery.start_with(
                [asked.fileno(), told.fileno() if stdout is None else stdout, log.fileno()],
                *words,
                folder=self.folder,
                environment=self._environment(),
                longest_file=longest_file,
            )
            try:
                status = child.wait(TIMEOUT_S)
            finally:
                child.kill()
            told.seek(0)
            log.seek(0)
            return subprocess.CompletedProcess(words, status, told.read(), log.read())

    def _run(self, words: tuple[str, ...], stdin: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "earmark", *words],
            env=self._environment(), cwd=self.folder, input=stdin,
            text=True, capture_output=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip

    def start(self, *command: str) -> subprocess.Popen[str] | Child:
        """Start a command in the background, with its output in a file named after it."""
        log_file = self.folder / f"{command[0]}-{len(self._background)}.log"
        if self.nursery and command[0] == "earmark":
            files = [Path(os.devnull), log_file, log_file]
            child = self.nursery.start(
                *command[1:], folder=self.folder, environment=self._environment(), files=files
            )  # fmt: skip
            self._background.append(child)
            return child
        with log_file.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env=self._environment(), cwd=self.folder, stdout=log, stderr=log,
                text=True,
            )  # fmt: skip
        self._background.append(process)
        return process

    def wait_for_workers(self, count: int) -> None:
        """Wait until so many of the workers started here take chunks."""
        wait_until(
            lambda: sum(READY in log.read_text() for log in self.folder.glob("*.log")) >= count
        )

    def left_running(self) -> list[str]:
        """Return the names of Valkey processes that commands have left behind."""
        assert self.nursery
        running = [*psutil.Process().children(recursive=True), *self.nursery.descendants()]
        return [child.name() for child in running if "valkey" in child.name()]

    def end(self) -> None:
        """End the background commands, and print their output if the test has failed."""
        for process in self._background:
            process.terminate()
        try:
            for process in self._background:
                process.wait(TIMEOUT_S)
        finally:
            for process in self._background:
                process.kill()
                process.wait(TIMEOUT_S)
            self._show_logs()

    def _show_logs(self) -> None:
        for log in sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("data/**/*.log")):
            sys.stdout.write(f"--- {log.name}\n{log.read_text(errors='replace')[-LOG_CHARS:]}\n")

    def _environment(self) -> dict[str, str]:
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith("EARMARK_")
        }
        return {**clean, "EARMARK_DATA_DIR": str(self.folder / "data"), **self.settings}


@pytest.fixture
def earmark(tmp_path: Path, nursery: Nursery) -> Iterator[Earmark]:
    """The command line with a fresh data folder."""
    command_line = Earmark({}, tmp_path, nursery)
    yield command_line
    command_line.end()


@pytest.fixture
def valkey_url(tmp_path: Path) -> Iterator[str]:
    with running_valkey(tmp_path) as url:
        yield url


@pytest.fixture
def cluster(
    tmp_path: Path, valkey_url: str, postgres_url: str, nursery: Nursery
) -> Iterator[Earmark]:
    """The command line for every machine of a cluster; its workers may fetch from loopback."""
    settings = {
        "EARMARK_BROKER__URL": valkey_url,
        "EARMARK_DATABASE__URL": postgres_url,
        "EARMARK_FETCH__ALLOW_NETWORKS": "127.0.0.0/8",
    }
    command_line = Earmark(settings, tmp_path, nursery)
    yield command_line
    command_line.end()


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Return a function that serves a folder over HTTP until the test ends."""
    with ExitStack() as stack:
        yield lambda folder, **how: stack.enter_context(serving(folder, **how))


def wait_until(done: Callable[[], bool], seconds: float = TIMEOUT_S) -> None:
    """Wait until a condition is true; the seconds only end a test that hangs."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def scalar(cluster: Earmark, query: str) -> Any:
    """Return the first value of a query to the cluster's PostgreSQL."""
    with psycopg.connect(cluster.settings["EARMARK_DATABASE__URL"]) as connection:
        row = connection.execute(query).fetchone()  # type: ignore[call-overload]
    return row[0]


def get_json(asked: str | urllib.request.Request) -> Any:
    """Return the JSON answer of a Flower on this machine."""
    with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
        return json.load(answer)


def finished_chunks(port: int) -> int:
    """Return the number of chunks that are done for the Flower on this port."""
    tasks = get_json(f"http://127.0.0.1:{port}/api/tasks").values()
    return sum(task["state"] == "SUCCESS" for task in tasks)
