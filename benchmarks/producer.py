"""The cost of submitting and feeding: `python -m benchmarks.producer --clips 10000000`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from db import schema
from db.session import connect, execute, reading
from earmark.core import broker
from earmark.core.settings import Broker, Database, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

DATABASES = ("sqlite", "postgresql")
ROWS_WRITTEN_AT_ONCE = 500_000
#: Disk that both lists and both runs take for each clip of a list, generously.
BYTES_A_CLIP = 1500
STATUS_TIMES = 5
#: Shown beside what was found.
WANTED = {"submit txt": 60_000, "submit it again": 100_000, "submit parquet": 60_000}


def main() -> None:
    """Print the table of the measurements: txt twice, parquet, `earmark status`, the feeder."""
    options = _options()
    # So that servers and files go as well where it takes too long or is told to stop.
    for ended in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(ended, signal.default_int_handler)
    signal.alarm(options.limit_s)
    print(
        "| database | act | rows/s (wanted) | CPU µs/row | memory MB (300) | first chunk s (5)"
        " | Redis MB (30) |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        txt, parquet = (
            str(_make_list(Path(folder), kind, options.clips)) for kind in ("txt", "parquet")
        )
        for database in [options.database] if options.database else DATABASES:
            with _settings(database, Path(folder)) as settings:
                _show(database, "submit txt", _in_child(_submit, settings, txt))
                _show(database, "submit it again", _in_child(_submit, settings, txt))
                _show(database, "submit parquet", _in_child(_submit, settings, parquet))
                _show_status(database, settings)
                # Last, for it leaves more leases than a queue ever holds.
                _show_feeder(database, _in_child(_feed, settings, options.feed_s))
                print(
                    f"| {database} | disk | {_disk_gb(settings):.2f} GB for both runs | | | | |",
                    flush=True,
                )
    print(f"\nLoad at the end: {os.getloadavg()[0]:.1f}.")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=10_000_000)
    parser.add_argument(
        "--database", choices=DATABASES, help="one of them; default: one after the other"
    )
    parser.add_argument("--feed-s", type=float, default=30.0)
    parser.add_argument("--limit-s", type=int, default=3600, help="stop and clean up after so long")
    parser.add_argument(
        "--folder",
        default=tempfile.gettempdir(),
        help="where lists and SQLite's file go for a while",
    )
    options = parser.parse_args()
    needed = options.clips * BYTES_A_CLIP
    # PostgreSQL's files are always in the temporary folder.
    for folder in (options.folder, tempfile.gettempdir()):
        if shutil.disk_usage(folder).free < needed:
            parser.error(
                f"{folder} has less than the {needed / 1e9:.0f} GB free that this may take"
            )
    return options


def _make_list(folder: Path, kind: str, rows: int) -> Path:
    import polars as pl

    path = folder / f"list.{kind}"
    numbers = pl.select(n=pl.int_range(rows)).lazy()
    host, part = (pl.col("n") * 7919 % 997).cast(str), (pl.col("n") * 104729 % 9973).cast(str)
    url = pl.format(
        "https://media{}.example.org/collection/{}/recording-{}.ogg", host, part, pl.col("n")
    )
    if kind == "parquet":
        url = pl.format("https://other{}.example.org/{}/{}.ogg", host, part, pl.col("n"))
        numbers.select(url=url, city=part).sink_parquet(path, row_group_size=ROWS_WRITTEN_AT_ONCE)
    else:
        numbers.select(url=url).sink_csv(path, include_header=False, quote_style="never")
    return path


@contextmanager
def _settings(database: str, folder: Path) -> Iterator[Settings]:
    from tests.servers import running_postgres, running_valkey

    with ExitStack() as servers:
        redis = servers.enter_context(running_valkey(folder))
        file = folder / "earmark.db"
        url = (
            servers.enter_context(running_postgres())
            if database == "postgresql"
            else f"sqlite:///{file}"
        )
        engine = connect(url, Database())
        schema.upgrade(engine)
        engine.dispose()
        yield Settings(broker=Broker(url=redis, queue="clips"), database=Database(url=url))
    for left in folder.glob("earmark.db*"):
        left.unlink()


def _in_child(act: Any, *arguments: Any) -> dict[str, float]:
    # A process of its own each time, for its memory is part of what is measured.
    with multiprocessing.get_context("spawn").Pool(1) as child:
        return dict(child.apply(act, arguments))


def _submit(settings: Settings, listed: str) -> dict[str, float]:
    from producer.submit import submit

    broker.configure(settings.broker)
    broker.client().delete("earmark:clips")
    first: list[float] = []
    start, cpu = time.perf_counter(), time.process_time()
    threading.Thread(target=_wait_for_chunk, args=(start, first), daemon=True).start()
    submitted = submit(
        listed, connect(settings.database_url, settings.database), settings, name=listed
    )
    seconds = time.perf_counter() - start
    rows = submitted.tally.clips
    return {
        "rows_s": rows / seconds,
        "cpu_us": (time.process_time() - cpu) / rows * 1e6,
        "memory_mb": _most_memory_mb(),
        "first_s": first[0] if first else float("nan"),
        "redis_mb": broker.client().info("memory")["used_memory"] / 2**20,
    }


def _disk_gb(settings: Settings) -> float:
    engine = connect(settings.database_url, settings.database)
    size = "pg_database_size(current_database())"
    if engine.dialect.name == "sqlite":
        size = "page_count * page_size FROM pragma_page_count, pragma_page_size"
    with reading(engine) as connection:
        found = int(execute(connection, f"SELECT {size}").scalar_one())
    engine.dispose()
    return found / 1e9


def _most_memory_mb() -> float:
    # Not ru_maxrss, which a process inherits from the one that starts it.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _wait_for_chunk(start: float, first: list[float]) -> None:
    while not broker.queue_length():
        time.sleep(0.01)
    first.append(time.perf_counter() - start)


def _feed(settings: Settings, feed_s: float) -> dict[str, float]:
    from producer import feeder

    broker.configure(settings.broker)
    engine = connect(settings.database_url, settings.database)
    feeding = feeder.Feeder(engine, settings)
    took, chunks = [], 0
    while sum(took) < feed_s:
        start = time.perf_counter()
        sent = feeding._top_up(feeder.CHUNKS_AT_ONCE)
        took.append(time.perf_counter() - start)
        chunks += sent
        if not sent:
            break
        broker.client().delete("earmark:clips")
    return {
        "clips_s": chunks * 16 / sum(took),
        "median_ms": statistics.median(took) * 1000,
        "p99_ms": statistics.quantiles(took, n=100)[-1] * 1000,
    }


def _show(database: str, act: str, row: dict[str, float]) -> None:
    speed = f"{row['rows_s']:,.0f} ({WANTED[act]:,})"
    numbers = (row["cpu_us"], row["memory_mb"], row["first_s"], row["redis_mb"])
    print(
        f"| {database} | {act} | {speed} |",
        "{:.1f} | {:.0f} | {:.2f} | {:.1f} |".format(*numbers),
        flush=True,
    )


def _show_feeder(database: str, row: dict[str, float]) -> None:
    times = f"{row['median_ms']:.1f} ms a top-up in the middle"
    times += f", {row['p99_ms']:.1f} ms (20) at the 99th percentile"
    print(f"| {database} | feed | {row['clips_s']:,.0f} (20,000) | {times} | | | |", flush=True)


def _show_status(database: str, settings: Settings) -> None:
    # The whole command, of the first of both runs, as someone at a terminal waits for it.
    command = [
        str(Path(sys.executable).with_name("earmark")),
        "status",
        "1",
        "--db",
        settings.database_url,
    ]
    took = []
    for _ in range(STATUS_TIMES):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        took.append(time.perf_counter() - start)
    times = f"{statistics.median(took):.2f} s in the middle of {STATUS_TIMES}"
    times += f", {max(took):.2f} s at most (1)"
    print(f"| {database} | earmark status | | {times} | | | |", flush=True)


if __name__ == "__main__":
    main()
