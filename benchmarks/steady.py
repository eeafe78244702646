"""A long run's speed and memory from start to end, and the effect of one slow host on its end.

    python -m benchmarks.steady
    python -m benchmarks.steady --clips 2000 --slow 20

One worker, its Valkey and SQLite classify clips of a loopback server in another process, no two
alike: five seconds of 16-bit, 16 kHz WAV each. With `--slow`, so many of them, spread over the
list, come from a host that takes a second.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import sqlalchemy as sa

import earmark
from benchmarks.watch import Memory, held_mb
from db.models import Clip
from db.session import reading
from earmark import local_cluster
from earmark.core.settings import Settings
from earmark.demo import EXAMPLES

if TYPE_CHECKING:
    from collections.abc import Sequence

SECONDS, RATE = 5.0, 16_000
HOST, SLOW_HOST, SLOW_S = "127.0.0.1", "127.0.0.2", 1.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--slow", type=int, default=0, help="clips that are on a slow host")
    arguments = parser.parse_args()
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
        port = running.enter_context(_Served())
        os.environ |= {
            "EARMARK_DATA_DIR": str(folder),
            "EARMARK_FETCH__ALLOW_NETWORKS": "127.0.0.0/8",
            "EARMARK_FETCH__PORTS": str(port),
            "EARMARK_FETCH__HOST_CONCURRENCY": "32",
        }
        here = running.enter_context(local_cluster.running(Settings(), queue="steady", workers=1))
        [worker] = here.workers
        _run(
            folder,
            [f"http://{HOST}:{port}/warm-{number}.wav" for number in range(200)],
            here.settings,
        )
        print(f"idle after 200 clips, with its decoders: {held_mb(worker.process.pid):.0f} MB")
        hosts = _hosts(arguments.clips, arguments.slow)
        urls = [f"http://{host}:{port}/{number}.wav" for number, host in enumerate(hosts)]
        with Memory(worker.process.pid) as memory:
            finished = _run(folder, urls, here.settings)
        _report(finished, memory.held_mb, here.settings)


def _hosts(clips: int, slow: int) -> list[str]:
    every = clips // slow if slow else clips + 1
    return [SLOW_HOST if number % every == every // 2 else HOST for number in range(clips)]


def _run(folder: Path, urls: list[str], here: Settings) -> np.ndarray:
    """Return when each clip became final, in seconds since the first chunk's end, in order."""
    listed = folder / "list.txt"
    listed.write_text("\n".join(urls))
    run = earmark.submit(str(listed), settings=here)
    run.wait()
    with reading(run.engine) as connection:
        found = connection.scalars(sa.select(Clip.finished_at).where(Clip.run_id == run.id)).all()
    moments = np.sort(np.array(found, float))
    return moments - moments[0]


def _report(finished: np.ndarray, held_mb: Sequence[float], here: Settings) -> None:
    tenth = len(finished) // 10
    first, last = tenth / finished[tenth], tenth / (finished[-1] - finished[-tenth - 1])
    chunk_s = here.worker.concurrency * 16 / (len(finished) / finished[-1])
    tail_s = finished[-1] - finished[-len(finished) // 100]
    part = max(1, len(held_mb) // 10)
    grown = statistics.median(held_mb[-part:]) / statistics.median(held_mb[part : 2 * part]) - 1
    print(f"{len(finished)} clips at {len(finished) / finished[-1]:.1f} clips/s")
    print(f"clips/s of the first tenth {first:.1f}, of the last {last:.1f}: {last / first:.2f}")
    print(
        f"memory, worker and decoders: {max(held_mb):.0f} MB at most;"
        f" last tenth over second tenth {grown:+.1%}"
    )
    print(
        f"a chunk's time, by Little's law {chunk_s:.2f} s;"
        f" the last hundredth of the clips {tail_s:.2f} s"
    )
    print(f"load {os.getloadavg()[0]:.1f}, ours included")


class _Served:
    """A process that serves clips on both addresses; gives its port."""

    def __enter__(self) -> int:
        command = [sys.executable, "-c", "from benchmarks import steady; steady.serve()"]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())

    def __exit__(self, *_: object) -> None:
        self._server.communicate()


def serve() -> None:
    """Serve bundled sound until stdin ends, with the path written into the first samples."""
    sound, _ = soundfile.read(EXAMPLES / "siren.wav", dtype="int16", always_2d=True)
    body = io.BytesIO()
    soundfile.write(body, np.resize(sound[:, 0], int(SECONDS * RATE)), RATE, format="WAV")
    port = 0
    for host in (HOST, SLOW_HOST):
        server = ThreadingHTTPServer((host, port), partial(_Clips, bytearray(body.getvalue())))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
    print(port, flush=True)
    sys.stdin.read()


class _Clips(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def __init__(self, body: bytearray, *arguments: Any) -> None:
        self._body = body
        super().__init__(*arguments)

    def do_GET(self) -> None:
        if self.headers["Host"].startswith(SLOW_HOST):
            time.sleep(SLOW_S)
        body, name = bytearray(self._body), self.path.encode().ljust(32)
        body[64 : 64 + len(name)] = name
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    main()
