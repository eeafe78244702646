"""The processor time of a clip in Earmark, by its parts: a worker with its queue and ledger.

    python -m benchmarks.stages
    python -m benchmarks.stages --database postgresql --clips 2000

The worker runs in this process, with its functions wrapped; what one spends in another that is
named here is not counted twice. Servers, loaders and decoders are processes of their own, and are
counted whole. Clips are five seconds of Ogg Vorbis each, from a loopback server in another process;
a run of them comes first, so that all is warm.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

#: Processor seconds of each part in this process.
spent: Counter[str] = Counter()
_now = threading.local()


def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Count the time of the calling thread in the function, less that in others that are timed."""

    @wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        outer, _now.inner, start = getattr(_now, "inner", 0.0), 0.0, time.thread_time()
        try:
            return function(*arguments, **named)
        finally:
            took = time.thread_time() - start
            spent[part] += took - _now.inner
            _now.inner = outer + took

    return run


def wrap() -> None:
    from db import ledger
    from producer.feeder import Feeder
    from workers import tasks
    from workers.loading.loaders import Loaders
    from workers.scoring import features
    from workers.scoring.batcher import Batcher
    from workers.scoring.classifier import Classifier

    kinds = [
        kind
        for kind in vars(features).values()
        if isinstance(kind, type) and kind is not features.Features
    ]
    parts = {
        "clips to loaders": [(Loaders, "deal")],
        "rows of loaders": [(Loaders, "_take_rows")],
        "model's queue": [
            (Batcher, "put"),
            (Batcher, "_take"),
            (Batcher, "_score"),
            (Batcher, "_wait"),
        ],
        "features": [(kind, "__call__") for kind in kinds if "__call__" in vars(kind)],
        "forward pass": [(Classifier, "_forward")],
        "softmax": [(Classifier, "_scores")],
        "scores to clips": [(Loaders, "scored")],
        "ledger: claim": [(ledger, "claim")],
        "ledger: finish": [(ledger, "finish")],
        "ledger: feed": [(Feeder, "feed")],
        "a chunk's clips in hand": [(tasks.WorkerState, "work")],
    }
    for part, places in parts.items():
        for place, name in places:
            setattr(place, name, timed(part, getattr(place, name)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--database", default="sqlite", choices=("sqlite", "postgresql"))
    parser.add_argument("--lanes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
        clips = _served(folder, arguments.clips, running)
        os.environ |= {
            "EARMARK_DATA_DIR": str(folder),
            "EARMARK_FETCH__ALLOW_NETWORKS": "127.0.0.0/8",
            "EARMARK_FETCH__PORTS": clips[0].split(":")[2].partition("/")[0],
            "EARMARK_FETCH__HOST_CONCURRENCY": "32",
            "EARMARK_MODEL__DEVICE": "cpu",
            "EARMARK_MODEL__THREADS": str(arguments.lanes),
        }
        _work(folder, clips, arguments.database, running)


def _served(folder: Path, count: int, running: ExitStack) -> list[str]:
    from benchmarks.end_to_end import make_clips

    names = [path.name for path in make_clips(folder / "clips", "equal", count)]
    serve = "from pathlib import Path; import sys; from tests.servers import serving"
    serve += "; s = serving(Path(sys.argv[1]))"
    loop = "\nwith s as base:\n print(base, flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server: Any = subprocess.Popen(
        [sys.executable, "-c", serve + loop, str(folder / "clips")], **pipes
    )
    running.callback(server.communicate)
    base = server.stdout.readline().strip()
    return [f"{base}/{name}" for name in names]


def _work(folder: Path, clips: list[str], database: str, running: ExitStack) -> None:
    from earmark import machine, valkey, worker
    from earmark.core.settings import Settings
    from earmark.database import open_database
    from tests.servers import running_postgres, upgraded

    servers = {child.pid for child in psutil.Process().children()}
    if database == "postgresql":
        os.environ["EARMARK_DATABASE__URL"] = upgraded(running.enter_context(running_postgres()))
    os.environ["EARMARK_BROKER__URL"] = running.enter_context(valkey.running(folder / "valkey"))
    settings = machine.find_broker(Settings())
    open_database(settings, create=True)
    threading.Thread(target=_submit, args=(clips, settings, servers, running), daemon=True).start()
    wrap()
    worker.work()


def _submit(clips: list[str], settings: Any, servers: set[int], running: ExitStack) -> None:
    import earmark

    listed = settings.data_dir / "list.txt"
    listed.write_text("\n".join(clips))
    for turn in (1, 2):
        spent.clear()
        before, start, mine = _processes(servers), time.perf_counter(), time.thread_time()
        earmark.submit(str(listed), settings=settings, min_score=1e-9 * turn).wait()
        seconds = time.perf_counter() - start
        after, submitting = _processes(servers), time.thread_time() - mine
    parts = {**spent, "submit": submitting}
    whole = {name: after[name] - before[name] for name in after}
    parts["celery, the rest of the worker"] = whole.pop("worker") - sum(parts.values())
    parts |= whole
    ms = 1000 * sum(parts.values()) / len(clips)
    print(f"{len(clips) / seconds:.1f} clips/s; processor ms a clip: {ms:.2f}")
    for part, took in sorted(parts.items(), key=lambda each: -each[1]):
        print(f"{1000 * took / len(clips):8.2f}  {part}", flush=True)
    # A worker ends without a word to whoever started it, and would leave the servers running.
    running.close()
    os._exit(0)


def _processes(servers: set[int]) -> Counter[str]:
    """Return the processor seconds of this process and, by kind, of those that it started."""
    found = Counter(worker=time.process_time())
    for child in psutil.Process().children(recursive=True):
        if child.pid not in servers:
            words = " ".join(child.cmdline())
            kind = next(
                (kind for kind in ("loader", "decoding", "valkey", "postgres") if kind in words),
                "other",
            )
            found[f"process: {kind}"] += sum(child.cpu_times()[:2])
    return found


if __name__ == "__main__":
    main()
