"""Two ledgers on one Redis, in random schedules.

`python -m tests.faults.sharing --seed 1 --schedules 20` runs them.

Each schedule has two new databases with equal ids, runs with different options, and workers for one
or both. A clip's result is right if it follows from its own run's options and from the scores that
the clip has in a ledger alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
import wave
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import redis
import sqlalchemy as sa

from db.models import Clip
from db.session import connect, reading
from earmark.core.clips import FINAL_STATES
from earmark.core.options import RunOptions
from earmark.core.settings import Broker, Database, Ledger, Settings
from producer.submit import submit
from tests.faults.nursery import running_nursery
from tests.servers import Postgres, Valkey, upgraded

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.nursery import Nursery

FILES = 60
#: As the default, all labels that are likely, and one that is sure: results differ visibly.
OPTIONS = (
    RunOptions(),
    RunOptions(top_k=1),
    RunOptions(top_k=3, min_score=0.1),
    RunOptions(top_k=2),
)
ALL = RunOptions(top_k=50)
SHARED_QUEUE = "shared"
#: Scores of other batches differ in the last digits.
ROUNDING = 1e-3
END_S = 180.0
SHORT_TIMES = {"lease_s": 4.0, "queue_lease_s": 12.0, "lost_after_s": 2.0, "settle_s": 1.0}

#: Of each file, the labels and scores, best first.
Scores = dict[str, list[tuple[str, float]]]


@dataclass
class Member:
    """One of the ledgers that share a Redis, and its workers."""

    folder: Path
    broker_url: str
    database_url: str
    queue: str | None
    nursery: Nursery
    #: More variables of the workers' environment.
    more: dict[str, str] = field(default_factory=dict)
    workers: list[psutil.Process] = field(default_factory=list)
    submitted: int = 0

    def submit(self, files: list[Path], options: RunOptions, name: str | None = None) -> int:
        """Submit files in this process; return the run's id."""
        settings = Settings(
            broker=Broker(url=self.broker_url, queue=self.queue),
            database=Database(url=self.database_url),
            ledger=Ledger(**SHORT_TIMES),
        )
        engine = connect(self.database_url, Database())
        try:
            run = submit(
                list(map(str, files)), engine, settings, options=options, name=name, chunk_size=4
            )
        finally:
            engine.dispose()
        self.submitted += run.added
        return run.run_id

    def start_worker(self) -> None:
        self.folder.mkdir(exist_ok=True)
        queue = {"EARMARK_BROKER__QUEUE": self.queue} if self.queue else {}
        settings = {
            "EARMARK_BROKER__URL": self.broker_url,
            "EARMARK_DATABASE__URL": self.database_url,
            "EARMARK_DATA_DIR": str(self.folder),
            "EARMARK_FETCH__FILE_ROOTS": json.dumps(["/"]),
            "EARMARK_WORKER__CONCURRENCY": "2",
            "EARMARK_WORKER__DECODERS": "1",
            "EARMARK_MODEL__THREADS": "1",
            **{
                f"EARMARK_LEDGER__{name.upper()}": str(value) for name, value in SHORT_TIMES.items()
            },
        }
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith("EARMARK_")
        }
        environment = {**inherited, **settings, **queue, **self.more}
        self.workers.append(self.nursery.start_worker(self.folder, environment))

    def kill_workers(self) -> None:
        for process in self.workers:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.workers.clear()

    def log(self) -> str:
        log = self.folder / "worker.log"
        return log.read_text() if log.exists() else ""

    def states(self) -> dict[str, int]:
        counted = sa.select(Clip.state_now, sa.func.count()).group_by(sa.text("1"))
        return {row[0]: row[1] for row in self.rows(counted)}

    @property
    def final(self) -> bool:
        states = self.states()
        return set(states) <= set(FINAL_STATES) and sum(states.values()) == self.submitted

    def rows(self, statement: Any) -> list[Any]:
        engine = connect(self.database_url, Database())
        try:
            with reading(engine) as connection:
                return list(connection.execute(statement))
        finally:
            engine.dispose()

    def scores(self, run_id: int) -> Scores:
        """Return what a run's files came to."""
        statement = "SELECT uri, label, score FROM top_k WHERE run_id = :run_id ORDER BY uri, rank"
        found: Scores = {}
        for uri, label, score in self.rows(sa.text(statement).bindparams(run_id=run_id)):
            found.setdefault(uri, []).append((label, score))
        return found


def write_files(folder: Path, count: int = FILES) -> list[Path]:
    """Write short clips of noise, each of its own loudness and colour."""
    folder.mkdir(exist_ok=True)
    noise = random.Random(0)
    for number in range(count):
        with wave.open(str(folder / f"{number:03}.wav"), "wb") as clip:
            clip.setparams((1, 2, 16000, 0, "NONE", ""))
            step = 1 + number % 7
            clip.writeframes(b"".join(noise.randbytes(2) * step for _ in range(4800 // step)))
    return sorted(folder.glob("*.wav"))


def wrong_results(
    found: Scores, alone: Scores, files: list[Path], options: RunOptions
) -> list[str]:
    """Return the files whose result is not what the options make of the scores."""
    wrong = []
    for file in map(str, files):
        wanted = [
            (label, score)
            for label, score in alone[file][: options.top_k]
            if score >= options.min_score
        ]
        ours = found.get(file, [])
        close = all(
            abs(one[1] - other[1]) < ROUNDING for one, other in zip(ours, wanted, strict=False)
        )
        borderline = any(abs(score - options.min_score) < ROUNDING for _, score in alone[file])
        if not close or (len(ours) != len(wanted) and not borderline):
            wrong.append(f"{file}: {ours}, not {wanted}")
    return wrong


def until(done: Callable[[], bool], seconds: float, tell: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds} s: {tell()}"
        time.sleep(0.2)


class Schedules:
    """Runs schedules one by one on one Valkey; compares with the scores of a ledger alone."""

    def __init__(
        self, folder: Path, valkey: Valkey, nursery: Nursery, postgres: Postgres | None
    ) -> None:
        self._folder = folder
        self._valkey = valkey
        self._nursery = nursery
        self._postgres = postgres
        self._files = write_files(folder / "files")
        self._count = 0
        self._alone = self._scores_alone()
        self.wrong: list[str] = []
        self.failed = self.clips = 0

    def run(self, seed: int) -> str:
        """Run one schedule to its end; return what happened, in one line."""
        chance = random.Random(seed)
        queue = chance.choice([None, SHARED_QUEUE])
        members = [self._member(queue), self._member(queue)]
        runs = []
        began = time.monotonic()
        acts = [*["submit"] * 4, *["work"] * 2, "kill", "wipe"]
        chance.shuffle(acts)
        try:
            for act in acts:
                member = chance.choice(members)
                if act == "submit":
                    options, files = (
                        chance.choice(OPTIONS),
                        chance.sample(self._files, chance.randint(10, FILES)),
                    )
                    runs.append((member, member.submit(files, options), files, options))
                elif act == "work":
                    member.start_worker()
                elif act == "kill":
                    member.kill_workers()
                elif chance.random() < 1 / 3:
                    redis.Redis.from_url(self._valkey.url).flushall()
                time.sleep(chance.uniform(0, 1))
            for member in members:
                if not member.workers:
                    member.start_worker()
            until(
                lambda: all(member.final for member in members),
                END_S,
                lambda: str([m.states() for m in members]),
            )
            self._check(runs, members)
        finally:
            for member in members:
                member.kill_workers()
        return f"queue {queue or 'of each'}, {', '.join(acts)}: {time.monotonic() - began:.0f} s"

    def _check(
        self, runs: list[tuple[Member, int, list[Path], RunOptions]], members: list[Member]
    ) -> None:
        for member, run_id, files, options in runs:
            self.wrong += wrong_results(member.scores(run_id), self._alone, files, options)
            self.clips += len(files)
        self.failed += sum(member.states().get("failed", 0) for member in members)

    def _scores_alone(self) -> Scores:
        alone = self._member(None)
        run_id = alone.submit(self._files, ALL)
        alone.start_worker()
        until(lambda: alone.final, END_S, alone.log)
        alone.kill_workers()
        return alone.scores(run_id)

    def _member(self, queue: str | None) -> Member:
        self._count += 1
        folder = self._folder / f"member-{self._count}"
        folder.mkdir()
        url = self._postgres.new_database() if self._postgres else f"sqlite:///{folder}/earmark.db"
        return Member(folder, self._valkey.url, upgraded(url), queue, self._nursery)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--schedules", type=int, default=20)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="earmark-sharing-")))
        nursery = stack.enter_context(running_nursery(folder))
        postgres = Postgres() if arguments.database == "postgresql" else None
        if postgres:
            stack.callback(postgres.remove)
        valkey = Valkey(folder)
        stack.callback(valkey.stop)
        schedules = Schedules(folder, valkey, nursery, postgres)
        for seed in range(arguments.seed, arguments.seed + arguments.schedules):
            print(f"seed {seed}, {schedules.run(seed)}", flush=True)
        print(
            f"{arguments.schedules} schedules, {arguments.database}, {schedules.clips} clips:"
            f" {len(schedules.wrong)} wrong results, {schedules.failed} failed for good"
        )
        assert not schedules.wrong, schedules.wrong[:5]
        assert not schedules.failed


if __name__ == "__main__":
    main()
