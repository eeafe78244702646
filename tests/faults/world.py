"""A small cluster that faults happen to, and the one check of what must hold afterwards."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import sqlalchemy as sa

from db import runs
from db.models import Clip, Run
from db.session import connect, reading
from earmark.core.clips import FINAL_STATES, STATES
from earmark.core.errors import DatabaseError
from earmark.core.settings import Database
from tests.faults.flaky_server import HOSTS, KINDS, flaky_server
from tests.faults.nursery import HOOKS
from tests.servers import Postgres, Valkey
from tests.workers.scoring import graphs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.flaky_server import FlakyServer
    from tests.faults.nursery import Child, Nursery

LEASE_S = 4.0
#: Clips that the second model heard though the first one heard no dog, or the other way round.
LET_THROUGH_WRONGLY = """
SELECT first.uri, first.label, second.label FROM runs r
JOIN results first ON first.run_id = r.follows
JOIN results second ON second.run_id = r.id AND second.uri = first.uri
WHERE (first.label = 'dog') = second.unheard
"""
#: What the second model of a pass is called.
OTHER_MODEL = "other"
MAX_ATTEMPTS = 5
#: This only ends a test that hangs.
SUBMITTED_S = 180


@dataclass
class World:
    """Workers with all their services, and a supervisor that restarts them as systemd would."""

    folder: Path
    settings: dict[str, str]
    nursery: Nursery
    files: FlakyServer
    valkey: Valkey
    postgres: Postgres | None
    random: random.Random
    #: Whether the run keeps embeddings.
    embeddings: bool = False
    #: The names of the runs: several are done in one pass, each with a model of its own.
    runs: tuple[str, ...] = ("run",)
    #: Whether the second model hears only the clips in which the first one hears a dog.
    then: bool = False
    workers: list[psutil.Process] = field(default_factory=list)
    producers: list[Child] = field(default_factory=list)
    submitted: set[str] = field(default_factory=set)

    @property
    def database_url(self) -> str:
        return self.settings["EARMARK_DATABASE__URL"]

    def uris(self, count: int, *odd: str) -> list[str]:
        """Return so many URIs that end well, and one of each odd kind, in any order."""
        port = self.files.server_port
        kinds = enumerate([*["sound"] * count, *odd])
        uris = [
            f"http://{HOSTS.get(kind, '127.0.0.1').format(place)}:{port}/{kind}/{place}"
            for place, kind in kinds
        ]
        self.random.shuffle(uris)
        return uris

    def submit(self, *uris: str, wait: bool = True, name: str = "list") -> Child:
        """Submit a list with the real command."""
        self.submitted.update(uris)
        path = self.folder / f"{name}.txt"
        path.write_text("\n".join(uris) + "\n")
        words = ["submit", str(path), "--name", "run", "--chunk-size", "4"]
        if self.embeddings:
            words.append("--embeddings")
        if len(self.runs) > 1:
            words += ["--then" if self.then else "--model", str(self.folder / OTHER_MODEL)]
            words += ["--then-label", "dog"] if self.then else ["--model", "starter"]
        files = [Path(os.devnull), self.folder / f"{name}.out", self.folder / f"{name}.err"]
        process = self.nursery.start(
            *words, folder=self.folder, environment=self.environment(), files=files
        )
        self.producers.append(process)
        if wait:
            log = process.communicate(SUBMITTED_S)[1].decode()
            assert process.returncode == 0, log
        return process

    def use_two_models(self, *, then: bool) -> None:
        """Have lists submitted for two models, which are done in one pass."""
        self.runs, self.then = ("run/starter", f"run/{OTHER_MODEL}"), then
        graphs.save(self.folder / OTHER_MODEL)

    def start_workers(self, count: int = 2, **environment: str) -> None:
        for _ in range(count):
            self.workers.append(
                self.nursery.start_worker(self.folder, {**self.environment(), **environment})
            )

    def worker(self) -> psutil.Process:
        """Return one of the workers that live."""
        self.supervise()
        return self.random.choice(self.workers)

    def supervise(self) -> None:
        """Start another worker for each that has ended."""
        ended = [process for process in self.workers if not process.is_running()]
        self.workers = [process for process in self.workers if process not in ended]
        self.start_workers(len(ended))

    def until(self, done: Callable[[], bool], seconds: float) -> None:
        """Supervise until something is so."""
        deadline = time.monotonic() + seconds
        while True:
            with suppress(DatabaseError):  # it may be what is out of order
                if done():
                    return
            assert time.monotonic() < deadline, (
                f"not within {seconds} s: {self.states()}\n{self.log()}"
            )
            self.supervise()
            time.sleep(0.2)

    def until_some_are_done(self, count: int = 8) -> None:
        self.until(lambda: self.states().get("done", 0) >= count, 60)

    def until_final(self, seconds: float = LEASE_S + 60) -> None:
        self.until(lambda: self.final, seconds)

    @property
    def final(self) -> bool:
        """Whether every submitted clip has come to its end."""
        states = self.states()
        clips = len(self.submitted) * len(self.runs)
        return set(states) <= set(FINAL_STATES) and sum(states.values()) == clips

    def states(self) -> dict[str, int]:
        return Counter(state for (state,) in self.rows(sa.select(Clip.state_now)))

    def rows(self, statement: Any) -> list[Any]:
        with self.database() as engine, reading(engine) as connection:
            return [tuple(row) for row in connection.execute(statement)]

    @contextmanager
    def database(self) -> Iterator[sa.Engine]:
        engine = connect(self.database_url, Database())
        try:
            yield engine
        finally:
            engine.dispose()

    @property
    def classified_again(self) -> int:
        """How often a clip was classified that a worker had classified before."""
        classified = (self.folder / "classified.log").read_text().split()
        return len(classified) - len(set(classified))

    def log(self) -> str:
        """Return the end of the workers' log."""
        log = self.folder / "worker.log"
        return log.read_text()[-3000:] if log.exists() else ""

    def end(self) -> None:
        for producer in self.producers:
            producer.kill()
        for process in self.workers:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                os.killpg(process.pid, signal.SIGKILL)

    def environment(self) -> dict[str, str]:
        paths = [str(HOOKS), *filter(None, [os.environ.get("PYTHONPATH")])]
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith("EARMARK_")
        }
        return {
            **inherited,
            **self.settings,
            "PYTHONPATH": os.pathsep.join(paths),
            "FAULT_CLIPS": "1",
        }


@contextmanager
def running_world(
    folder: Path,
    database_url: str,
    nursery: Nursery,
    postgres: Postgres | None,
    seed: int = 0,
    delay_s: float = 0.1,
) -> Iterator[World]:
    """Run a Valkey and a file server; submitting and starting workers is up to the caller."""
    with ExitStack() as stack:
        valkey = Valkey(folder)
        stack.callback(valkey.stop, signal.SIGKILL)
        files = stack.enter_context(flaky_server(delay_s))
        settings = {
            "EARMARK_BROKER__URL": valkey.url,
            "EARMARK_BROKER__CONNECT_TIMEOUT_S": "2",
            "EARMARK_DATABASE__URL": database_url,
            "EARMARK_DATABASE__BUSY_TIMEOUT_S": "2",
            "EARMARK_FETCH__ALLOW_NETWORKS": "127.0.0.1/32",
            "EARMARK_FETCH__PORTS": files.url.rpartition(":")[2],
            "EARMARK_FETCH__TIMEOUT_S": "2",
            "EARMARK_LEDGER__LEASE_S": str(LEASE_S),
            "EARMARK_LEDGER__LOST_AFTER_S": "2",
            "EARMARK_LEDGER__MAX_ATTEMPTS": str(MAX_ATTEMPTS),
            "EARMARK_LEDGER__RETRY_BASE_S": "1",
            "EARMARK_LEDGER__SETTLE_S": "2",
            "EARMARK_WORKER__CLIPS_IN_FLIGHT": "8",
            "EARMARK_WORKER__CONCURRENCY": "2",
            "EARMARK_WORKER__DECODERS": "1",
            "EARMARK_MODEL__THREADS": "1",
        }
        world = World(
            folder, settings, nursery, files, valkey, postgres, random.Random(seed), seed % 2 == 1
        )
        stack.callback(world.end)
        yield world


def check_invariants(world: World) -> None:
    """Assert that no promise was broken."""
    broken = {promise: clips for promise, clips in broken_promises(world).items() if clips}
    assert not broken, broken


def broken_promises(world: World) -> dict[str, list[str]]:
    """Return the broken promises: one final state a clip, the right one, and counts that agree."""
    named = sa.select(Clip.id, Run.name, Clip.uri, Clip.state, Clip.error_code, Clip.attempts)
    clips = world.rows(named.join(Run, Run.id == Clip.run_id))
    final = [(run, uri) for _, run, uri, state, *_ in clips if state in FINAL_STATES]
    submitted = set(product(world.runs, world.submitted))
    best = [row[0] for row in world.rows(sa.text("SELECT clip_id FROM top_k WHERE rank = 1"))]
    done = {clip_id for clip_id, _, _, state, *_ in clips if state == "done"}
    unheard = {row[0] for row in world.rows(sa.select(Clip.id).where(Clip.unheard))}
    heard = done - unheard
    vectors = {row[0] for row in world.rows(sa.text("SELECT clip_id FROM embeddings"))}
    return {
        "lost": sorted(map(str, submitted - set(final))),
        "doubled": [str(each) for each, count in Counter([*final, *best]).items() if count > 1],
        "failed for a neighbour": [
            str(row)
            for _, run, *row in clips
            if not ends_as_it_should(*row, follows=world.then and run != world.runs[0])
        ],
        "without its result": sorted(map(str, heard ^ set(best))),
        "without its vector": sorted(map(str, (heard ^ vectors) if world.embeddings else vectors)),
        "let through wrongly": [str(row) for row in world.rows(sa.text(LET_THROUGH_WRONGLY))],
        "counted wrong": _wrong_counts(world),
    }


def ends_as_it_should(
    uri: str, state: str, code: str | None, attempts: int, *, follows: bool
) -> bool:
    """Return whether a clip ended as its kind must, after as many tries as it must take.

    A clip that kills workers may be in quarantine before it killed one, if its loader died twice.
    One of a run that follows ends with the first run's clip, and may have had fewer tries.
    """
    kind = uri.split("/")[3]
    expected = KINDS[kind]
    right = (state, code) == (("failed", expected) if expected else ("done", None))
    exactly = expected in ("timeout", "dns") and not follows
    tries = attempts == MAX_ATTEMPTS if exactly else attempts <= MAX_ATTEMPTS
    return right and tries


def _wrong_counts(world: World) -> list[str]:
    shown: Counter[str] = Counter()
    with world.database() as engine:
        for name in world.runs:
            shown += Counter(runs.progress(engine, runs.find_run(engine, name).id).states)
    states = world.states()
    return [
        f"{state}: {shown[state]}, not {states.get(state, 0)}"
        for state in STATES
        if shown[state] != states.get(state, 0)
    ]
