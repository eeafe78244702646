"""Clips/s with more workers when downloads are slow, and the cost of being watched.

Run it with `python -m benchmarks.scaling`.

A server on this machine answers each request after 0.3 s with a clip of its own. A worker has few
clips in flight, so that what it waits for is the server and not these processors: then twice the
workers should do twice the clips.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from benchmarks.watch import cpu_s
from db import pace, runs
from db.session import connect
from earmark import children, local_cluster
from earmark.core import broker
from earmark.core.settings import Broker, Database, Settings
from earmark.demo import EXAMPLES
from producer.submit import submit
from tests.servers import free_port, running_postgres, running_valkey, upgraded

if TYPE_CHECKING:
    from collections.abc import Iterator

DELAY_S = 0.3
CLIP_S = 2.0
RATE = 16_000
LOOK_S = 0.1


def main() -> None:
    options = _options()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = stack.enter_context(_slow_server())
        settings = Settings(
            broker=Broker(url=stack.enter_context(running_valkey(folder)), queue="clips"),
            database=Database(url=upgraded(stack.enter_context(running_postgres()))),
        )
        broker.configure(settings.broker)
        bench = _Bench(folder, base, settings, options)
        bench.cost_of_watching() if options.watched else bench.scaling()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each turn, about")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--in-flight", type=int, default=4, help="clips a worker has at once")
    parser.add_argument(
        "--watched", action="store_true", help="one worker, with and without metrics and Flower"
    )
    return parser.parse_args()


class _Bench:
    def __init__(
        self, folder: Path, base: str, settings: Settings, options: argparse.Namespace
    ) -> None:
        self.folder, self.base, self.settings, self.options = folder, base, settings, options
        self.engine = connect(settings.database_url, settings.database)
        self.turns = 0

    def scaling(self) -> None:
        print("| workers | clips/s | of one worker | worker CPU ms/clip | load |")
        print("|---|---|---|---|---|")
        measured: dict[int, list[tuple[float, float]]] = {}
        for _ in range(self.options.turns):
            for count in map(int, self.options.workers.split(",")):
                with self._workers(count) as workers:
                    measured.setdefault(count, []).append(self._turn(workers, count))
        one = median(rate for rate, _ in next(iter(measured.values())))
        for count, turns in measured.items():
            rate, cpu = (median(values) for values in zip(*turns, strict=True))
            load = os.getloadavg()[0]
            print(f"| {count} | {rate:.1f} | {rate / one:.2f} | {cpu:.1f} | {load:.1f} |")

    def cost_of_watching(self) -> None:
        """Measure one worker, watched in every other turn: scraped each second, and by Flower."""
        print("| watched | clips/s | worker CPU ms/clip | load |\n|---|---|---|---|")
        port = free_port()
        environment = children.environment(self.settings)
        with self._workers(1, metrics_port=port) as workers:
            self._turn(workers, 1)
            for turn in range(2 * self.options.turns):
                with ExitStack() as stack:
                    if turn % 2:
                        command = [*children.EARMARK, "flower", "--port", str(free_port())]
                        log = self.folder / "flower.log"
                        stack.enter_context(children.running(command, log, environment))
                        stack.enter_context(_scraped(f"http://127.0.0.1:{port}/metrics"))
                        time.sleep(3)
                    rate, cpu = self._turn(workers, 1)
                watched, load = "yes" if turn % 2 else "no", os.getloadavg()[0]
                print(f"| {watched} | {rate:.1f} | {cpu:.2f} | {load:.1f} |")

    @contextmanager
    def _workers(self, count: int, **changes: Any) -> Iterator[list[int]]:
        settings = self.settings.changed(
            fetch={
                "allow_networks": "127.0.0.0/8",
                "ports": self.base.rpartition(":")[2],
                "host_concurrency": 64,
            },
            worker={"clips_in_flight": self.options.in_flight, "decoders": 1, **changes},
            model={"threads": 1},
        )
        environment = children.environment(settings)
        logs = self.folder / "logs"
        with local_cluster.running_workers([environment] * count, logs) as started:
            for number in range(1, count + 1):
                while "ready, with" not in (logs / f"worker-{number}.log").read_text():
                    time.sleep(LOOK_S)
            yield [child.process.pid for child in started]

    def _turn(self, workers: list[int], count: int) -> tuple[float, float]:
        """Return clips a second and the workers' processor milliseconds a clip."""
        clips = int(self.options.seconds * count * self.options.in_flight / DELAY_S)
        self.turns += 1
        listed = self.folder / "list.txt"
        listed.write_text(
            "".join(f"{self.base}/{self.turns}-{number}.wav\n" for number in range(clips))
        )
        began = sum(map(cpu_s, workers))
        run_id = submit([str(listed)], self.engine, self.settings, chunk_size=8).run_id
        while not runs.progress(self.engine, run_id).finished:
            time.sleep(LOOK_S)
        spent = sum(map(cpu_s, workers)) - began
        found = pace.measure(self.engine, run_id)
        assert found.done == clips, found
        assert found.clips_per_s is not None
        return found.clips_per_s, spent / clips * 1000


@contextmanager
def _scraped(url: str) -> Iterator[None]:
    stop = threading.Event()

    def scrape() -> None:
        while not stop.wait(1.0):
            urllib.request.urlopen(url, timeout=10).read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _slow_server() -> Iterator[str]:
    sound, _ = soundfile.read(EXAMPLES / "siren.wav", dtype="float32", always_2d=True)
    clip = np.resize(sound[:, 0], int(CLIP_S * RATE))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or the body waits 40 ms for the head's acknowledgement

        def do_GET(self) -> None:
            time.sleep(DELAY_S)
            # No clip has the bytes of another, or its result would be taken over.
            noise = np.random.default_rng(list(self.path.encode())).normal(0, 1e-3, len(clip))
            body = io.BytesIO()
            soundfile.write(body, clip + noise, RATE, format="WAV")
            self.send_response(200)
            self.send_header("Content-Length", str(len(body.getvalue())))
            self.end_headers()
            self.wfile.write(body.getvalue())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


if __name__ == "__main__":
    main()
