"""The cost of fetching with our fetcher, requests and urllib3: `python -m benchmarks.fetch`."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

import requests
import urllib3

from earmark.core import settings
from workers.fetching.fetch import Fetcher

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

CLIP = bytes(range(256)) * 200
ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: audio/ogg\r\nContent-Length: %d\r\n\r\n" % len(CLIP) + CLIP
)
DIGEST = hashlib.sha256(CLIP).hexdigest()


def main() -> None:
    options = _options()
    parent, child = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(child,), daemon=True)
    server.start()
    port = parent.recv()
    url = f"http://127.0.0.1:{port}/clip.ogg?signature=0123456789abcdef"
    limits = settings.Fetch(
        allow_networks=("127.0.0.0/8",), ports=(port,), host_concurrency=options.threads
    )
    with closing(Fetcher(limits)) as fetcher:
        contenders = {
            "urllib3": _with_urllib3(options.threads),
            "requests": _with_requests(options.threads),
            "earmark": lambda url: _with_earmark(fetcher, url),
        }
        costs = _measure(contenders, url, options)
    server.terminate()
    _show(costs, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=400, help="clips a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _measure(
    contenders: dict[str, Callable[[str], str]], url: str, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Return CPU seconds a clip by contender and round, without the first round (warm-up)."""
    costs: dict[str, list[float]] = {name: [] for name in contenders}
    with ThreadPoolExecutor(options.threads) as pool:
        for _ in range(options.rounds + 1):
            for name, fetch in contenders.items():
                start = time.process_time()
                digests = set(pool.map(fetch, [url] * options.clips))
                costs[name].append((time.process_time() - start) / options.clips)
                assert digests == {DIGEST}, name
    return {name: rounds[1:] for name, rounds in costs.items()}


def _with_earmark(fetcher: Fetcher, url: str) -> str:
    fetched = fetcher.fetch(url)
    fetched.file.close()
    return fetched.source.sha256


def _with_requests(threads: int) -> Callable[[str], str]:
    session = requests.Session()
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=threads))
    return lambda url: hashlib.sha256(session.get(url, timeout=60).content).hexdigest()


def _with_urllib3(threads: int) -> Callable[[str], str]:
    pool = urllib3.PoolManager(maxsize=threads)
    return lambda url: hashlib.sha256(pool.request("GET", url, timeout=60).data).hexdigest()


def _show(costs: dict[str, list[float]], options: argparse.Namespace) -> None:
    rows = {name: {"cpu_ms": statistics.median(rounds) * 1000} for name, rounds in costs.items()}
    for name, row in rows.items():
        row["clips_per_s_per_core"] = 1000 / row["cpu_ms"]
        row["times_requests"] = statistics.median(
            mine / theirs for mine, theirs in zip(costs[name], costs["requests"], strict=True)
        )
    if options.json:
        print(json.dumps(rows))
        return
    kilobytes = len(CLIP) / 1000
    print(
        f"{kilobytes:.0f} kB clips with SHA-256, {options.threads} threads,"
        f" median of {options.rounds} rounds"
    )
    for name, row in rows.items():
        print(
            f"{name:9} {row['cpu_ms']:6.2f} ms CPU a clip"
            f"  {row['clips_per_s_per_core']:6.0f} clips/s per core"
            f"  {row['times_requests']:5.2f} x requests"
        )


def _serve(ready: Connection) -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    ready.send(listener.getsockname()[1])
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection:
        while connection.recv(65536).endswith(b"\r\n\r\n"):
            connection.sendall(ANSWER)


if __name__ == "__main__":
    main()
