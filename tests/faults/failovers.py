"""Failovers of PostgreSQL during a run: `python -m tests.faults.failovers --seed 1`.

Each failover is drawn from a seed: the server is killed, or it is read-only for 5 to 60 s, with its
connections ended before and after, or only before. It prints the seconds from the database's return
to the next final clip and, at the end, the clips that were lost, doubled, failed or counted as a
crash. `--pooler` puts a PgBouncer in transaction mode before the server. `--failovers 0` makes no
fault.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from db.models import Clip
from earmark.core.clips import FINAL_STATES
from tests.faults import faults
from tests.faults.nursery import running_nursery
from tests.faults.world import broken_promises, running_world
from tests.servers import PgBouncer, Postgres, upgraded

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.world import World

    Failover = Callable[[], None]

#: The longest from the database's return to the next final clip.
GOES_ON_S = 15.0
#: Work between two failovers.
BETWEEN_S = 3.0
#: The released default, which outlasts a failover as a lease of a few seconds would not.
LEASE_S = "60"
#: From the last failover to the last clip.
END_S = 1800


KINDS = ["killed", "read-only", "read-only, connections kept"]
#: Server connections that a pooler shares among all workers.
POOL_SIZE = 6


def draw(world: World) -> tuple[str, Failover]:
    """Return a failover and its name."""
    down_s = world.random.uniform(1, 20)
    read_only_s = world.random.uniform(5, 60)
    kind = world.random.choice(KINDS)
    if kind == "killed":
        return f"killed, away for {down_s:.0f} s", partial(kill_server, world, down_s)
    pinned = kind.endswith("kept")
    failover = partial(faults.make_postgres_read_only, world, read_only_s, pinned=pinned)
    return f"{kind}, {read_only_s:.0f} s", failover


def kill_server(world: World, down_s: float) -> None:
    assert world.postgres is not None
    world.postgres.stop("immediate")
    time.sleep(down_s)
    world.postgres.start()


def seconds_to_go_on(world: World) -> float:
    """Return how long it takes until another clip is final."""
    began = time.monotonic()
    counts: list[int] = []

    def went_on() -> bool:
        counts.append(final(world))
        return counts[-1] > counts[0]

    world.until(went_on, 300)
    return time.monotonic() - began


def final(world: World) -> int:
    count = sa.select(sa.func.count()).where(Clip.state.in_(FINAL_STATES))
    return int(world.rows(count)[0][0])


def fail_over(world: World, clips: int, workers: int, count: int) -> str:
    """Have so many failovers happen to a run; return what came of it, in one line."""
    world.submit(*world.uris(clips))
    world.start_workers(workers)
    world.until_some_are_done()
    began = time.monotonic()
    slowest = 0.0
    for number in range(1, count + 1):
        time.sleep(BETWEEN_S)
        assert not world.final, "the list was too short for its failovers"
        name, failover = draw(world)
        failover()
        took = seconds_to_go_on(world)
        slowest = max(slowest, took)
        print(f"{number:3}  {name}: going on after {took:.1f} s", flush=True)
    world.until_final(END_S)
    seconds = time.monotonic() - began
    broken = {promise: len(found) for promise, found in broken_promises(world).items()}
    failed = world.states().get("failed", 0)
    crashes = world.rows(sa.select(sa.func.sum(Clip.crashes)))[0][0]
    ends = ", ".join(f"{found} {promise}" for promise, found in broken.items())
    again = world.classified_again
    line = f"{clips} clips, {workers} workers, {count} failovers, {seconds:.0f} s:"
    line += f" {ends}, {failed} failed"
    slow = f"; slowest going on {slowest:.1f} s (at most {GOES_ON_S:.0f} wanted)" if count else ""
    return f"{line}, {crashes} crashes; {again} classified again{slow}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--failovers", type=int, default=20)
    parser.add_argument(
        "--delay-s", type=float, default=0.5, help="how long each clip takes to come"
    )
    parser.add_argument("--pooler", action="store_true")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="earmark-nursery-")))
        nursery = stack.enter_context(running_nursery(shared))
        postgres = Postgres()
        stack.callback(postgres.remove)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="earmark-failovers-"))
        url = upgraded(postgres.new_database())
        if arguments.pooler:
            pooler = PgBouncer(postgres.url, pool_size=POOL_SIZE)
            stack.callback(pooler.remove)
            url = pooler.url_of(url)
        running = running_world(
            Path(folder), url, nursery, postgres, arguments.seed, arguments.delay_s
        )
        world = stack.enter_context(running)
        world.settings["EARMARK_LEDGER__LEASE_S"] = LEASE_S
        line = fail_over(world, arguments.clips, arguments.workers, arguments.failovers)
        print(
            f"seed {arguments.seed}{', PgBouncer' if arguments.pooler else ''}: {line}", flush=True
        )


if __name__ == "__main__":
    main()
