"""What embeddings cost and give, part by part: `python -m benchmarks.embeddings PART --count 1e6`.

`form`: bytes a vector and recall of some stored forms. `search`: building and asking the index.
`libraries`: the same with faiss and usearch, where they are installed. `database`: bytes a window,
building the index from the database, and rescoring. `overhead`: CPU a clip of the starter's scores
and of the transaction that ends a chunk, with embeddings and without. Vectors lie in clusters: some
hundred centres, each with a few directions of its own, and some noise.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from db import bulk_insert, ledger, runs
from db.bulk_insert import listed
from db.identity import ledger_id
from db.session import connect, writing
from earmark import rescore, similar, vector_index
from earmark.core import settings as settings_module
from earmark.core.clips import AudioFacts, Chunk, Clip, Embedding, Prediction, Source, Success
from earmark.core.options import RunOptions
from earmark.core.settings import Database, Settings
from tests.db.builders import add_clips
from tests.servers import upgraded
from workers.scoring import heads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import sqlalchemy as sa

DIMENSIONS, CLUSTERS, DIRECTIONS, GROUPS = 768, 500, 24, 50
#: Length of the noise beside that of a cluster's own directions, about 1.
NOISE = 0.5
QUERIES, BEST = 100, 10
AT_ONCE = 20_000


class Clustered:
    """Draws unit vectors."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(7)
        normal = self._random.normal
        space = normal(size=(64, DIMENSIONS)) / 8
        self._centres = (normal(size=(CLUSTERS, 64)) @ space / 8).astype(np.float32)
        self._centres += normal(size=DIMENSIONS) * 1.5 / np.sqrt(DIMENSIONS)
        shape = GROUPS, DIRECTIONS, DIMENSIONS
        self._directions = (normal(size=shape) / np.sqrt(DIMENSIONS) / 4).astype(np.float32)

    def draw(self, count: int) -> np.ndarray:
        clusters = self._random.integers(0, CLUSTERS, count)
        vectors = self._centres[clusters]
        for group in range(GROUPS):
            members = np.flatnonzero(clusters % GROUPS == group)
            inner = self._random.standard_normal((len(members), DIRECTIONS), np.float32)
            vectors[members] += inner @ self._directions[group]
        noise = self._random.standard_normal(vectors.shape, np.float32)
        vectors += noise * (NOISE / np.sqrt(DIMENSIONS))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def blocks(self, count: int) -> Iterator[np.ndarray]:
        for start in range(0, count, AT_ONCE):
            yield self.draw(min(AT_ONCE, count - start))


def quantised(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = np.abs(vectors).max(axis=1, keepdims=True) / 127
    return scales.astype(np.float32), np.round(vectors / scales).astype(np.int8)


@contextmanager
def told(what: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(f"{what}: {wall:.1f} s, {cpu:.1f} s of CPU; peak memory {memory:.2f} GB", flush=True)


class Nearest:
    """The truth: the nearest vectors of each query, compared as float32 as they are drawn."""

    def __init__(self, queries: np.ndarray) -> None:
        self._queries = queries
        self._cosines = np.full((len(queries), BEST), -2.0, np.float32)
        self._places = np.zeros((len(queries), BEST), int)
        self._count = 0

    def add(self, vectors: np.ndarray) -> None:
        cosines = np.hstack([self._cosines, self._queries @ vectors.T])
        new = np.arange(self._count, self._count + len(vectors))
        places = np.hstack([self._places, np.broadcast_to(new, (len(self._queries), len(new)))])
        best = np.argsort(-cosines, axis=1)[:, :BEST]
        self._cosines = np.take_along_axis(cosines, best, axis=1)
        self._places = np.take_along_axis(places, best, axis=1)
        self._count += len(vectors)

    def tell(self, way: str, ask: Callable[[np.ndarray], np.ndarray]) -> None:
        walls, cpus, found = [], [], 0
        for query, places in zip(self._queries, self._places, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            nearest = ask(query)
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
            found += len({*nearest.tolist()} & {*places.tolist()})
        recall = found / len(self._queries) / BEST
        print(
            f"{way}: recall@{BEST} {recall:.3f}; {np.median(walls) * 1e3:.1f} ms,"
            f" {np.median(cpus) * 1e3:.1f} ms of CPU (medians of {len(walls)})",
            flush=True,
        )


def form(count: int) -> None:
    drawn = Clustered()
    nearest = Nearest(drawn.draw(QUERIES))
    vectors = np.concatenate(list(drawn.blocks(count)))
    nearest.add(vectors)
    levels = quantised(vectors)[1].astype(np.float32)
    bits = np.packbits(vectors > vectors.mean(axis=0), axis=1)
    forms = {
        f"float16, {2 * DIMENSIONS} bytes": vectors.astype(np.float16).astype(np.float32),
        f"int8, {DIMENSIONS} bytes": levels / np.linalg.norm(levels, axis=1, keepdims=True),
        f"int8 with one scale for all, {DIMENSIONS} bytes": np.round(
            vectors * (127 / np.abs(vectors).max())
        ),
        f"a bit, {bits.shape[1]} bytes": np.unpackbits(bits, axis=1) - np.float32(0.5),
    }
    for name, stored in forms.items():
        nearest.tell(name, lambda query, stored=stored: np.argsort(-(stored @ query))[:BEST])


def search(count: int) -> None:
    drawn = Clustered()
    nearest = Nearest(drawn.draw(QUERIES))

    def blocks() -> Iterator[vector_index.Block]:
        first = 0
        for vectors in drawn.blocks(count):
            nearest.add(vectors)
            windows = np.zeros(len(vectors), vector_index.WINDOW)
            windows["clip_id"] = np.arange(first, first + len(vectors))
            first += len(vectors)
            scales, levels = quantised(vectors)
            yield windows, scales[:, 0], levels

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with told("drawing vectors, the truth, writing"):
            vector_index.write(folder, blocks())
        index = vector_index.Index.mapped(folder)
        with told("sketches alone"):
            vector_index.write_sketches(folder, index)
        every = np.ones(count, bool)
        nearest.tell("numpy", lambda query: index.nearest(query, BEST, every)[0])


def libraries(count: int) -> None:
    drawn = Clustered()
    nearest = Nearest(drawn.draw(QUERIES))
    vectors = np.concatenate(list(drawn.blocks(count)))
    nearest.add(vectors)
    if find_spec("faiss"):
        import faiss

        for factory, probes in (("Flat", 0), ("SQ8", 0), ("IVF1024,SQ8", 16), ("HNSW32,SQ8", 0)):
            index: Any = faiss.index_factory(DIMENSIONS, factory, faiss.METRIC_INNER_PRODUCT)
            with told(f"faiss {factory}"):
                index.train(vectors[:100_000])
                index.add(vectors)
            if probes:
                index.nprobe = probes
            nearest.tell(
                f"faiss {factory}", lambda query, i=index: i.search(query[None], BEST)[1][0]
            )
    if find_spec("usearch"):
        from usearch.index import Index

        usearch = Index(ndim=DIMENSIONS, metric="cos", dtype="i8")
        with told("usearch, HNSW of int8"):
            usearch.add(np.arange(count), vectors)
        nearest.tell("usearch", lambda query: usearch.search(query, BEST).keys)


def database(count: int) -> None:
    drawn = Clustered()
    with tempfile.TemporaryDirectory() as name:
        engine = connect(upgraded(f"sqlite:///{name}/e.db"), Database())
        settings = Settings(data_dir=Path(name))
        run_id = _filled(engine, count)
        before = _bytes(engine)
        with told("vectors written"), writing(engine) as connection:
            _write_vectors(connection, drawn, count)
            connection.exec_driver_sql("UPDATE runs SET options = json('{\"embeddings\": true}')")
        print(f"{(_bytes(engine) - before) / count:.0f} bytes a window", flush=True)
        run = runs.get_run(engine, run_id)
        with told("index from the database"):
            index = similar.opened(engine, run, settings)
        random = np.random.default_rng(1)
        weight = random.normal(size=(17, DIMENSIONS)).astype(np.float32)
        labels = tuple(f"label {place}" for place in range(17))
        head = heads.Head(labels, weight, weight[:, 0].copy(), "0")
        heads.save(Path(name, "head"), head, {})
        with told("scores and rows, not written"):
            scorer = rescore.Scorer(index, head, RunOptions(), np.arange(17))
            for _ in scorer.rows():
                pass
        with told("scores alone"):
            for start in range(0, count, rescore.AT_ONCE):
                head.scores(index.vectors(slice(start, start + rescore.AT_ONCE)))
        with told("rescored, rows written"):
            rescore.rescore(engine, run, settings, "again", str(Path(name, "head")))
        engine.dispose()


def _bytes(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        return int(pages) * 4096


def _filled(engine: sa.Engine, count: int) -> int:
    run_id = ledger.open_run(engine, "a", RunOptions(embeddings=True), queue="q", chunk_size=16)
    for start in range(0, count, AT_ONCE):
        clips = [listed(Clip(f"https://a.org/{n}.wav")) for n in range(start, start + AT_ONCE)]
        bulk_insert.add(engine, {run_id: sorted(clips[: count - start])})
    identity = {"name": "m", "revision": "", "sha256": "0", "sample_rate": 16000, "window_s": 5.0}
    model_id, _ = ledger.register_model(engine, ["x"], **identity, function_to_apply="softmax")
    ledger.settle_model(engine, run_id, model_id)
    done = "UPDATE clips SET state = 'done', not_before = NULL, duration_s = 5, finished_at = 1"
    with writing(engine) as connection:
        connection.exec_driver_sql(done)
    return run_id


def _write_vectors(connection: sa.Connection, drawn: Clustered, count: int) -> None:
    first = 1
    for vectors in drawn.blocks(count):
        rows = []
        for place, bytes_ in enumerate(quantised(vectors)[1]):
            rows.append((first + place, 0, bytes_.tobytes()))
        first += len(rows)
        connection.exec_driver_sql("INSERT INTO window_embeddings VALUES (?, ?, ?)", rows)


def overhead(count: int) -> None:
    """Score and record so many clips of five seconds, in turn with embeddings and without."""
    from workers.scoring import classifier

    loaded = classifier.load(settings_module.Model(name="starter", device="cpu", threads=1))
    random = np.random.default_rng(5)
    windows = list(random.normal(size=(16, 80_000)).astype(np.float32) * 0.1)
    vectors = {}
    with tempfile.TemporaryDirectory() as name:
        engine = connect(upgraded(f"sqlite:///{name}/e.db"), Database())
        costs: dict[tuple[str, bool], list[float]] = {}
        for turn in range(max(1, count // 16)):
            embedded = bool(turn % 2)
            began = time.process_time()
            outcomes = loaded.outcomes(windows, "softmax", 5, embedded=embedded)
            costs.setdefault(("scores", embedded), []).append(time.process_time() - began)
            vectors[embedded] = [getattr(each, "vector", b"") for each in outcomes]
            claim, label_ids = _claimed(engine, turn)
            ended = [_ended(clip.id, vectors[embedded], embedded) for clip in claim.clips]
            began = time.process_time()
            ledger.finish(engine, claim, ended, label_ids, settings_module.Ledger())
            costs.setdefault(("record", embedded), []).append(time.process_time() - began)
        engine.dispose()
    for (part, embedded), took in sorted(costs.items()):
        median = np.median(took) / 16 * 1e3
        print(f"{part}, embeddings {embedded}: {median:.3f} ms of CPU a clip", flush=True)


def _claimed(engine: sa.Engine, turn: int) -> tuple[Any, tuple[int, ...]]:
    run_id = ledger.open_run(engine, "a", RunOptions(), queue="q", chunk_size=16)
    add_clips(engine, run_id, [Clip(f"https://a.org/{turn}-{n}.wav") for n in range(16)])
    identity = {"name": "m", "revision": "", "sha256": "0", "sample_rate": 16000, "window_s": 5.0}
    names = [str(place) for place in range(17)]
    _, label_ids = ledger.register_model(engine, names, **identity, function_to_apply="softmax")
    with engine.connect() as connection:
        waiting = "SELECT id FROM clips WHERE state = 'pending'"
        ids = list(connection.exec_driver_sql(waiting).scalars())
    chunk = Chunk(ledger_id(engine), run_id, tuple((clip_id, "") for clip_id in ids))
    return ledger.claim(engine, chunk, worker="w", limits=settings_module.Ledger()), label_ids


def _ended(clip_id: int, vectors: list[bytes], embedded: bool) -> Success:
    best = tuple(Prediction(place, 0.5) for place in range(5))
    facts = AudioFacts(5.0, 44100, 1, "vorbis")
    kept = (Embedding(0.0, 5.0, vectors[clip_id % 16]),) if embedded else ()
    return Success(clip_id, Source(f"{clip_id:064x}", 7), facts, best, embeddings=kept)


PARTS = {
    "overhead": overhead,
    "form": form,
    "search": search,
    "libraries": libraries,
    "database": database,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=float, default=1e5)
    arguments = parser.parse_args()
    print(f"{arguments.part}: {arguments.count:.0f} vectors of {DIMENSIONS}")
    PARTS[arguments.part](int(arguments.count))


if __name__ == "__main__":
    main()
