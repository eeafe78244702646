"""The processor time of a clip in Earmark, by its parts: a worker with its queue and ledger.

    python -m benchmarks.stages
    python -m benchmarks.stages --database postgresql --clips 2000
    python -m benchmarks.stages --model starter --model ./other      # in one pass

The worker runs in this process, with its functions wrapped; what one spends in another that is
named here is not counted twice. Loaders, decoders and servers are processes of their own; loaders
are counted by thread. Clips are five seconds of Ogg Vorbis each, from a loopback server in another
process; a run of them comes first, so that all is warm.
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

from benchmarks.account import THREAD, cpu_s
from benchmarks.watch import adopt_daemons

if TYPE_CHECKING:
    from collections.abc import Callable

HOOKS = Path(__file__).with_name("hooks")
#: The account of what else runs here: the server of the clips.
ELSE = "children"
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
    from workers.clip import ClipInWork, WindowQueue
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
        "deal to the loaders": [(Loaders, "_deal")],
        "rows of the loaders": [(Loaders, "_hear"), (WindowQueue, "put")],
        "model's queue": [
            (Batcher, "put"),
            (Batcher, "_take"),
            (Batcher, "_score"),
            (Batcher, "_wait"),
        ],
        "features": [(kind, "__call__") for kind in kinds if "__call__" in vars(kind)],
        "forward pass": [(Classifier, "_forward")],
        "softmax, ranking": [(Classifier, "_scores")],
        "scores to clips": [(Loaders, "scored"), (ClipInWork, "scored"), (ClipInWork, "success")],
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
    parser.add_argument("--model", action="append", help="starter, or folders: all in one pass")
    parser.add_argument("--then", help="a model that hears what the first lets through")
    parser.add_argument("--then-label", help="the labels that let a clip through")
    arguments = parser.parse_args()
    adopt_daemons()
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
            "PYTHONPATH": str(HOOKS),
        }
        options = {"model": arguments.model or ["starter"]}
        options |= {"then": arguments.then, "then_label": arguments.then_label}
        _work(folder, clips, arguments.database, options, running)


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


def _work(
    folder: Path, clips: list[str], database: str, options: dict[str, Any], running: ExitStack
) -> None:
    from earmark import local_cluster, valkey, worker
    from earmark.core.settings import Settings
    from earmark.database import open_database
    from tests.servers import running_postgres, upgraded

    if database == "postgresql":
        os.environ["EARMARK_DATABASE__URL"] = upgraded(running.enter_context(running_postgres()))
    os.environ["EARMARK_BROKER__URL"] = running.enter_context(valkey.running(folder / "valkey"))
    settings = local_cluster.find_broker(Settings())
    open_database(settings, create=True)
    task = (clips, settings, options, running)
    threading.Thread(target=_submit, args=task, daemon=True).start()
    wrap()
    worker.work()


def _submit(clips: list[str], settings: Any, options: dict[str, Any], running: ExitStack) -> None:
    import earmark

    listed = settings.data_dir / "list.txt"
    listed.write_text("\n".join(clips))
    for turn in (1, 2):
        spent.clear()
        before, start, mine = cpu_s([os.getpid()]), time.perf_counter(), time.thread_time()
        run = earmark.submit(str(listed), settings=settings, min_score=1e-9 * turn, **options)
        for each in run.together:
            each.wait()
        seconds = time.perf_counter() - start
        after, submitting = cpu_s([os.getpid()]), time.thread_time() - mine
    whole = {name: after[name] - before.get(name, 0.0) for name in after if name != ELSE}
    parts = {**spent, "submit": submitting}
    parts["celery, the rest of the worker"] = whole.pop("main") - sum(parts.values())
    for name in [name for name in whole if name.startswith(THREAD)]:
        took = whole.pop(name)
        whole["loaders"] -= took
        parts[name.removeprefix(THREAD)] = took
    parts |= {f"process: {name}": took for name, took in whole.items()}
    ms = 1000 * sum(parts.values()) / len(clips)
    print(f"{len(clips) / seconds:.1f} clips/s; processor ms a clip: {ms:.2f}")
    for part, took in sorted(parts.items(), key=lambda each: -each[1]):
        print(f"{1000 * took / len(clips):8.2f}  {part}", flush=True)
    # A worker ends without a word to whoever started it, and would leave the servers running.
    running.close()
    os._exit(0)


if __name__ == "__main__":
    main()
