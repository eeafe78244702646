"""The ways to label a list of clips, Earmark among them: processes that read lists from stdin.

`python -m benchmarks.contenders WAY --model M` says `ready` once the model has scored a clip, then
answers each line, a JSON list of paths or URLs of 16-bit audio, with the list of their best labels.
Each way keeps the five best labels in a store: a SQLite table, Celery's result backend, a Ray data
set, Earmark's database.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.watch import adopt_daemons
from earmark.core.settings import Settings, cores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from celery import Celery

    Label = Callable[[list[str]], list[str]]

RATE = 16_000
TOP_K = 5
#: Downloads ahead of each of the optimum's processes, as many as a worker of Earmark has on two
#: cores.
AHEAD = 16
#: The starter is cheapest with 8 (5.9 ms a clip; 6.4 with 4, 9.1 alone); larger models do not care.
BATCH = 8


@contextmanager
def script(model: str, threads: int) -> Iterator[Label]:
    """`requests.get`, save, `pipeline(file)`, one by one."""
    pipe, store = pipeline(model, threads), Store()

    def label(uris: list[str]) -> list[str]:
        return [store.keep(uri, pipe(saved(uri), top_k=TOP_K)) for uri in uris]

    yield label


@contextmanager
def batches(model: str, threads: int, size: int) -> Iterator[Label]:
    """`pipeline` over a generator of files."""
    pipe, store = pipeline(model, threads), Store()

    def label(uris: list[str]) -> list[str]:
        each = pipe((saved(uri) for uri in uris), batch_size=size, top_k=TOP_K)
        return [store.keep(uri, predictions) for uri, predictions in zip(uris, each, strict=True)]

    yield label


@contextmanager
def celery(model: str, threads: int) -> Iterator[Label]:
    """One task a clip, prefork, a pipeline in each child, JSON results in Redis."""
    from tests.servers import running_valkey

    with tempfile.TemporaryDirectory() as folder, running_valkey(Path(folder)) as url:
        os.environ |= {
            "CONTENDER_URL": url,
            "CONTENDER_MODEL": model,
            "CONTENDER_THREADS": str(threads),
        }
        app = typical_app()
        options = f"--pool prefork --concurrency {max(1, cores() // threads)} --loglevel ERROR"
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.contenders:typical", "worker"]
        worker = subprocess.Popen([*command, *options.split()], stdout=subprocess.DEVNULL)
        try:
            yield lambda uris: [
                result.get(timeout=600)
                for result in [app.send_task("classify", [uri]) for uri in uris]
            ]
        finally:
            worker.terminate()
            worker.wait()


@cache
def typical_app() -> Celery:
    """Return the Celery app people write; its children load the model when they start."""
    from celery import Celery, signals

    app = Celery("typical", broker=os.environ["CONTENDER_URL"], backend=os.environ["CONTENDER_URL"])

    @signals.worker_process_init.connect(weak=False)
    def load(**_: Any) -> None:
        app.pipe = pipeline(os.environ["CONTENDER_MODEL"], int(os.environ["CONTENDER_THREADS"]))

    @app.task(name="classify")
    def classify(uri: str) -> str:
        return str(app.pipe(saved(uri), top_k=TOP_K)[0]["label"])

    app.conf.worker_proc_alive_timeout = 120
    return app


typical = typical_app() if "CONTENDER_URL" in os.environ else None


@contextmanager
def ray(model: str, threads: int) -> Iterator[Label]:
    """Ray Data's `map_batches`, an actor a core; actors start anew for each list."""
    import ray as library

    class Classify:
        def __init__(self) -> None:
            self._pipe = pipeline(model, threads)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            each = self._pipe([saved(uri) for uri in batch["item"]], batch_size=8, top_k=TOP_K)
            return {
                "uri": batch["item"],
                "label": [predictions[0]["label"] for predictions in each],
            }

    def label(uris: list[str]) -> list[str]:
        found = library.data.from_items(uris, override_num_blocks=len(uris) // 8 or 1).map_batches(
            Classify,
            batch_size=8,
            compute=library.data.ActorPoolStrategy(size=max(1, cores() // threads)),
        )
        labels = {row["uri"]: row["label"] for row in found.take_all()}
        return [labels[uri] for uri in uris]

    library.init(
        num_cpus=cores(), include_dashboard=False, logging_level="ERROR", log_to_driver=False
    )
    library.data.DataContext.get_current().enable_progress_bars = False
    yield label
    library.shutdown()


@contextmanager
def optimum(model: str, _: int) -> Iterator[Label]:
    """A process per core, by hand: downloads ahead, decoding, our model code, and no queue."""
    context, store = multiprocessing.get_context("spawn"), Store()
    with context.Pool(cores(), load_alone, [model]) as pool:

        def label(uris: list[str]) -> list[str]:
            shares = [share for place in range(cores()) if (share := uris[place :: cores()])]
            found = dict(itertools.chain.from_iterable(pool.map(label_alone, shares, chunksize=1)))
            return [store.keep(uri, found[uri]) for uri in uris]

        yield label


alone: dict[str, Any] = {}


def load_alone(model: str) -> None:
    import requests
    import torch

    from earmark.core import settings
    from workers.scoring import classifier

    torch.set_num_threads(1)
    alone["model"] = classifier.load(settings.Model(name=model, device="cpu", threads=1))
    alone["session"] = requests.Session()
    alone["ahead"] = ThreadPoolExecutor(AHEAD)


def label_alone(uris: list[str]) -> list[tuple[str, list[dict[str, Any]]]]:
    return list(_labelled(zip(uris, _fetched_ahead(uris), strict=True)))


def _fetched_ahead(uris: list[str]) -> Iterable[bytes]:
    def fetch(url: str) -> bytes:
        return bytes(alone["session"].get(url).content)

    if not uris[0].startswith("http"):
        return (Path(path).read_bytes() for path in uris)
    return alone["ahead"].map(fetch, uris)  # type: ignore[no-any-return]


def _labelled(fetched: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    import soundfile
    import soxr

    model, waiting = alone["model"], []
    for uri, body in fetched:
        samples, rate = soundfile.read(io.BytesIO(body), dtype="float32")
        waiting.append((uri, soxr.resample(samples, rate, RATE, quality="HQ")))
        if len(waiting) == BATCH:
            yield from _scored(model, waiting)
            waiting = []
    if waiting:
        yield from _scored(model, waiting)


def _scored(model: Any, waiting: list[Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    while waiting:
        batch = model.choose([len(samples) for _, samples in waiting])
        windows = [waiting[place][1] for place in batch]
        outcomes = model.outcomes(windows, model.card.function_to_apply)
        for place, scores in zip(batch, outcomes, strict=True):
            best = scores.argsort()[::-1][:TOP_K]
            yield (
                waiting[place][0],
                [{"label": model.card.labels[each], "score": float(scores[each])} for each in best],
            )
        waiting = [one for place, one in enumerate(waiting) if place not in batch]


@contextmanager
def earmark(model: str, _threads: int, database: str) -> Iterator[Label]:
    """One Earmark worker with a lane per core, as in `earmark run`, until each clip is final."""
    import earmark
    from earmark import local_cluster
    from tests.servers import running_postgres, upgraded

    turns = itertools.count(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        os.environ |= {
            "EARMARK_DATA_DIR": folder,
            "EARMARK_MODEL__NAME": model,
            "EARMARK_MODEL__DEVICE": "cpu",
        }
        os.environ |= {
            "EARMARK_FETCH__ALLOW_NETWORKS": "127.0.0.0/8",
            "EARMARK_FETCH__FILE_ROOTS": "/",
        }
        os.environ |= {"EARMARK_FETCH__HOST_CONCURRENCY": str(2 * AHEAD)}
        if database == "postgresql":
            os.environ["EARMARK_DATABASE__URL"] = upgraded(
                servers.enter_context(running_postgres())
            )
        cluster = local_cluster.running(Settings(), queue="contender", workers=1)
        here = servers.enter_context(cluster)

        def label(uris: list[str]) -> list[str]:
            listed = Path(folder, "list.txt")
            listed.write_text("\n".join(uris))
            # Other options than last time, or the ledger would have the answers.
            options = {"model": model, "top_k": TOP_K, "min_score": 1e-9 * next(turns)}
            run = earmark.submit(str(listed), settings=here.settings, **options)
            while not run.progress().finished:
                time.sleep(0.05)
            found = {row["uri"]: row["label"] for row in run.results()}
            return [found[uri] for uri in uris]

        yield label


class Store:
    """Five labels a clip in a SQLite table, in transactions of sixteen."""

    def __init__(self) -> None:
        self._database = sqlite3.connect(Path(tempfile.mkdtemp(), "results.db"))
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("CREATE TABLE results (uri TEXT, predictions JSON)")
        self._kept = 0

    def keep(self, uri: str, predictions: list[dict[str, Any]]) -> str:
        self._database.execute("INSERT INTO results VALUES (?, ?)", [uri, json.dumps(predictions)])
        self._kept += 1
        if self._kept % 16 == 0:
            self._database.commit()
        return str(predictions[0]["label"])


def pipeline(model: str, threads: int) -> Any:
    """Return the Hugging Face pipeline as its manual has it."""
    import torch
    import transformers

    from workers.scoring import hub

    torch.set_num_threads(threads)
    folder = str(hub.STARTER) if model == "starter" else model
    return transformers.pipeline("audio-classification", model=folder, device="cpu")


def saved(uri: str) -> str:
    """Return a path, of what is downloaded first if it is a URL."""
    if not uri.startswith("http"):
        return uri
    import requests

    path = Path(tempfile.gettempdir(), f"contender-{os.getpid()}-{uri.rpartition('/')[2]}")
    path.write_bytes(requests.get(uri, timeout=60).content)
    return str(path)


#: Each with how many threads a model may use there, of which the benchmark takes what is quicker.
WAYS: dict[str, Callable[[str, int], Any]] = {
    "script": script,
    "pipeline x8": lambda model, threads: batches(model, threads, 8),
    "pipeline x16": lambda model, threads: batches(model, threads, 16),
    "celery": celery,
    "ray": ray,
    "optimum": optimum,
    "earmark sqlite": lambda model, threads: earmark(model, threads, "sqlite"),
    "earmark postgresql": lambda model, threads: earmark(model, threads, "postgresql"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warm-up", required=True, help="a clip")
    arguments = parser.parse_args()
    adopt_daemons()
    with WAYS[arguments.way](arguments.model, arguments.threads) as label:
        label([arguments.warm_up])
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(label(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
