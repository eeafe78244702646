"""Many faults in a row, chosen by a seed, over a list that is being worked on: `make chaos SEED=1`.

Every fourth seed, 3 first, has two models in one pass. With every fourth, 1 first, the second model
hears only what the first one lets through. With `--each`, each fault happens once to a small list
instead, and the table of docs/understanding/reliability.md is printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import sqlalchemy as sa

from db.models import Clip, Lease
from earmark.core.clips import FINAL_STATES
from tests.faults import faults
from tests.faults.nursery import running_nursery
from tests.faults.world import broken_promises, check_invariants, running_world
from tests.servers import Postgres, upgraded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.faults.faults import Fault
    from tests.faults.nursery import Nursery
    from tests.faults.world import World

FAULTS = {"sqlite": faults.ON_SQLITE, "postgresql": faults.ON_POSTGRES}
#: Clips that must fail, or that must not though something goes wrong with them once.
ODD = ["busy", "broken", "cut", "gone", "unnamed", "renamed"] * 3 + [
    "endless",
    "poison",
    "venom",
] * 2
#: A clip takes so long to come that a list lasts as long as its faults.
DELAY_S = 1.0
#: From the last fault to the last clip.
END_S = 240
#: Of the clips, classified more than once.
MOST_AGAIN = 0.06


def have_chaos(world: World, clips: int, count: int) -> str:
    """Have so many faults happen to a run of so many clips; return what came of it, in one line."""
    kinds = FAULTS["postgresql" if world.postgres else "sqlite"]
    chosen = [
        *world.random.sample(kinds, min(count, len(kinds))),
        *world.random.choices(kinds, k=count),
    ][:count]
    started = time.monotonic()
    world.submit(*world.uris(clips - len(ODD), *ODD))
    world.start_workers()
    world.until_some_are_done()
    amid = 0
    for fault in chosen:
        time.sleep(world.random.uniform(0, 2))
        amid += not world.final
        print(f"{time.monotonic() - started:5.0f} s  {fault.__name__}", file=sys.stderr, flush=True)
        strike(world, fault)
    world.until_final(END_S)
    broken = broken_promises(world)
    share = world.classified_again / (clips * len(world.runs))
    ends = ", ".join(f"{len(found)} {promise}" for promise, found in broken.items())
    told = (
        f"{clips} clips, {len(world.runs)} models, {count} faults ({amid} before the end),"
        f" {time.monotonic() - started:.0f} s"
    )
    assert not any(broken.values()), broken
    assert share <= MOST_AGAIN, f"{share:.1%} classified again"
    return f"{told}: {ends}; {world.classified_again} classified again ({share:.1%})"


def strike(world: World, fault: Fault) -> None:
    """Have a fault happen to whoever is alive."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        try:
            fault(world)
        except psutil.TimeoutExpired as error:
            raise AssertionError(f"{fault.__name__}: {error}\n{world.log()}") from error
    world.supervise()


def recovery(world: World, fault: Fault, clips: int = 100) -> str:
    """Return cells about a fault: seconds until all clips in hand were final, clips done again."""
    world.submit(*world.uris(clips))
    world.start_workers()
    world.until_some_are_done()
    in_hand = [
        row[0] for row in world.rows(sa.select(Lease.clip_id).where(Lease.token.is_not(None)))
    ]
    left = sa.select(sa.func.count()).where(Clip.id.in_(in_hand), Clip.state.not_in(FINAL_STATES))
    started = time.monotonic()
    strike(world, fault)
    fault_s = time.monotonic() - started
    world.until(lambda: world.rows(left)[0][0] == 0, END_S)
    recovered_s = time.monotonic() - started
    world.until_final(END_S)
    check_invariants(world)
    return f"{fault_s:.1f} | {recovered_s:.1f} | {world.classified_again}"


@contextmanager
def new_world(
    database: str, nursery: Nursery, postgres: Postgres | None, seed: int, delay_s: float
) -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="earmark-chaos-") as folder:
        url = f"sqlite:///{folder}/earmark.db" if postgres is None else postgres.new_database()
        with running_world(Path(folder), upgraded(url), nursery, postgres, seed, delay_s) as world:
            if seed % 4 in (1, 3):
                world.use_two_models(then=seed % 4 == 1)
            yield world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--database", choices=sorted(FAULTS), default="sqlite")
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--faults", type=int, default=25)
    parser.add_argument("--each", action="store_true")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="earmark-nursery-")))
        nursery = stack.enter_context(running_nursery(shared))
        postgres = None
        if arguments.database == "postgresql":
            postgres = Postgres()
            stack.callback(postgres.remove)
        if arguments.each:
            print(
                f"| fault, on {arguments.database} | it lasts, s | in hand final after, s"
                " | of 100 classified again |"
            )
            print("|---|---|---|---|")
            for fault in FAULTS[arguments.database]:
                with new_world(arguments.database, nursery, postgres, arguments.seed, 0.2) as world:
                    print(
                        f"| {fault.__name__.replace('_', ' ')} | {recovery(world, fault)} |",
                        flush=True,
                    )
        else:
            with new_world(arguments.database, nursery, postgres, arguments.seed, DELAY_S) as world:
                line = have_chaos(world, arguments.clips, arguments.faults)
                print(f"seed {arguments.seed}, {arguments.database}: {line}", flush=True)


if __name__ == "__main__":
    main()
