"""Build a run in SQL, then time queries and writes, each figure beside its bound.

python -m benchmarks.queries --clips 10000000
python -m benchmarks.queries --database postgresql --plans
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import sqlalchemy as sa

from db import bulk_insert, ledger, runs, schema
from db.bulk_insert import listed
from db.identity import ledger_id
from db.models import Clip, state_is
from db.session import connect, reading, writing
from earmark.core.clips import AudioFacts, Chunk, Prediction, Source, State, Success, Timings
from earmark.core.clips import Clip as Listed
from earmark.core.options import RunOptions
from earmark.core.settings import Database, Ledger
from tests.servers import running_postgres

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LABELS = 527
ROWS_AT_ONCE = 500_000
#: Clips left for the worker's part of the benchmark.
PENDING = 32_000
CHUNK = 16
REPEATS = 5

#: A query is not repeated after so long.
PATIENCE_S = 10.0
#: As `docs/guides/many_machines.md` advises for a server of 8 GB.
#: fsync is off, as in every server of the tests.
POSTGRESQL = {"shared_buffers": "2GB", "max_wal_size": "8GB", "checkpoint_timeout": "15min"}
#: In the unit of the figure's name: at most, or for a rate at least.
WANTED = {
    "bytes a clip, all tables and indexes": 400,
    "label and least score, the best 50, ms": 50,
    "one clip, ms": 5,
    "progress of the runs, ms": 50,
    "`earmark status`, one look, ms": 50,
    "label counts of a run, ms": 2000,
    "results written, chunks of 16, clips/s": 6000,
}
SIZES = (
    "SELECT relname, pg_relation_size(oid) FROM pg_class"
    " WHERE relkind IN ('r', 'i') AND relname NOT LIKE 'pg\\_%' ORDER BY 2 DESC LIMIT 9"
)

#: For each database: the numbers from :a to :b, a digest, the bytes of a text, and a list.
DIALECTS = {
    "sqlite": (
        "WITH RECURSIVE n(i) AS (SELECT :a UNION ALL SELECT i + 1 FROM n WHERE i < :b)",
        {
            "sha256": "randomblob(32)",
            "key": "CAST(printf('%08x', i * 2654435761 % 4294967296) || 'key' AS blob)",
        },
        "json_array({})",
    ),
    "postgresql": (
        "WITH n(i) AS (SELECT generate_series(CAST(:a AS bigint), CAST(:b AS bigint)))",
        {
            "sha256": "decode(md5(i::text) || md5((-i)::text), 'hex')",
            "key": "convert_to(lpad(to_hex(i * 2654435761 % 4294967296), 8, '0') || 'key', 'utf8')",
        },
        "ARRAY[{}]",
    ),
}
#: With the columns that 0.1.0 has: `benchmarks.upgrade` fills a database of that version.
RUN = """
INSERT INTO runs (name, options, queue, chunk_size, created_at)
VALUES ('big', :options, 'clips', :chunk_size, :now)
"""
#: By the key, as `submit` sorts what it inserts: an index of random keys grows page by page.
CLIPS = """
INSERT INTO clips (
    run_id, uri, uri_key, state, attempts, not_before, worker, label_id, score, label_ids, scores,
    sha256, bytes, duration_s, source_sample_rate, channels, codec, truncated, silent,
    fetch_ms, decode_ms, classify_ms, finished_at
)
{numbers}
SELECT
    1,
    'https://archive-' || (i % 40) || '.example.org/recordings/2026/' || (10000000 + i) || '.wav',
    {key}, 'done', 1, NULL, 'worker@machine-' || (i % 8), 1 + best, score, {labels}, {scores},
    {sha256}, 441044, 5, 44100, 1, 'pcm_s16le', false, false, 80, 2, 9, 1.78e9 + i / 300.0
FROM (
    SELECT i, CAST(526 * u * u * u AS int) AS best, 0.2 + 0.8 * v AS score
    FROM (
        SELECT i, (i * 2654435761 % 4294967296) / 4294967296.0 AS u,
               (i * 40503 % 65536) / 65536.0 AS v
        FROM n
    ) AS n
) AS drawn
ORDER BY 3
"""
QUERIES = {
    "label and least score, the best 50": "SELECT * FROM results WHERE run = 'big'"
    " AND label = 'label 300' AND score >= 0.6 ORDER BY score DESC LIMIT 50",
    "one clip": "SELECT * FROM results WHERE clip_id = 4321",
    "one clip's top 5": "SELECT * FROM top_k WHERE clip_id = 4321",
    "one clip's events": "SELECT * FROM events WHERE run_id = 1 AND clip_id = 4321",
    "progress of the runs": "SELECT * FROM run_progress",
    "label counts of a run": "SELECT * FROM label_counts WHERE run = 'big'"
    " ORDER BY clips DESC LIMIT 20",
    "first page of results": "SELECT * FROM results WHERE run_id = 1 ORDER BY clip_id LIMIT 50",
    "failures": "SELECT * FROM failures WHERE run_id = 1 ORDER BY clip_id LIMIT 50",
    "a label anywhere in the top 5": "SELECT count(*) FROM top_k WHERE run_id = 1"
    " AND label = 'label 300' AND score >= 0.3",
    "hosts": "SELECT * FROM host_stats WHERE run_id = 1",
}


def build(engine: sa.Engine, clips: int) -> tuple[int, ...]:
    """Fill a new database; return the ids of the labels."""
    schema.upgrade(engine)
    label_ids = fill(engine, clips)
    if engine.dialect.name == "postgresql":
        # What autovacuum does within minutes; SQLite gets nothing, as with a user.
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")
    # Planners read their statistics when a connection opens.
    engine.dispose()
    return label_ids


def fill(engine: sa.Engine, clips: int) -> tuple[int, ...]:
    """Write a finished run of so many clips into an empty database; return its labels' ids."""
    run = {"options": json.dumps(RunOptions().as_json()), "chunk_size": CHUNK, "now": time.time()}
    with writing(engine) as connection:
        connection.execute(sa.text(RUN), run)
    identity = {"name": "m", "revision": "", "sha256": "0", "sample_rate": 16000}
    names = [f"label {number}" for number in range(LABELS)]
    _, label_ids = ledger.register_model(
        engine, names, **identity, function_to_apply="sigmoid", window_s=10.0
    )
    numbers, digests, array = DIALECTS[engine.dialect.name]
    labels = array.format(", ".join(f"(best + {rank * 101}) % 527 + 1" for rank in range(5)))
    scores = array.format(", ".join(f"round(score / {rank}, 7)" for rank in range(1, 6)))
    fill = CLIPS.format(numbers=numbers, labels=labels, scores=scores, **digests)
    indexes = list(sa.inspect(Clip).local_table.indexes)
    on_clips = " ON clips" if engine.dialect.name == "postgresql" else ""
    with writing(engine) as connection:
        connection.exec_driver_sql(f"DROP TRIGGER clips_added{on_clips}")
        for index in indexes:
            index.drop(connection)
    for start in range(1, clips + 1, ROWS_AT_ONCE):
        span = {"a": start, "b": min(start + ROWS_AT_ONCE - 1, clips)}
        with writing(engine) as connection:
            connection.execute(sa.text(fill), span)
    triggers = schema.trigger_statements(engine.dialect.name)
    with writing(engine) as connection:
        for index in indexes:
            index.create(connection)
        connection.exec_driver_sql(
            next(each for each in triggers if "TRIGGER clips_added" in each).replace("%", "%%")
        )
        connection.exec_driver_sql(
            f"INSERT INTO run_counts VALUES (1, 'done', 0, {clips}, {clips * 5.0}, 1.79e9)"
        )
        if engine.dialect.name == "sqlite":
            # What the planner is told went with the indexes.
            connection.execute(sa.text("DELETE FROM sqlite_stat1"))
            connection.execute(sa.text(triggers[-1]))
    return label_ids


def query_ms(engine: sa.Engine, statement: str) -> float:
    def ask() -> None:
        with reading(engine) as connection:
            connection.execute(sa.text(statement)).all()

    took = [_seconds(ask)]
    while len(took) < REPEATS and sum(took) < PATIENCE_S:
        took.append(_seconds(ask))
    return median(took) * 1000


def plan(engine: sa.Engine, statement: str) -> str:
    explain = (
        "EXPLAIN QUERY PLAN"
        if engine.dialect.name == "sqlite"
        else "EXPLAIN (ANALYZE, COSTS OFF, SUMMARY OFF)"
    )
    with reading(engine) as connection:
        return "\n".join(
            str(row[-1]) for row in connection.execute(sa.text(f"{explain} {statement}"))
        )


def rates(engine: sa.Engine, label_ids: tuple[int, ...]) -> tuple[float, float]:
    """Return clips/s of `finish`, and of `claim` and `finish`, in chunks of 16 on one thread."""
    # Sorted as `submit` does, so that a chunk's keys are neighbours in their index.
    new = sorted(
        listed(Listed(f"https://archive-0.example.org/new/{n:08}.wav")) for n in range(PENDING)
    )
    bulk_insert.add(engine, {1: new})
    ids = list(range_of_pending(engine))
    identity = ledger_id(engine)
    claiming = finishing = 0.0
    for start in range(0, len(ids), CHUNK):
        began = time.perf_counter()
        chunk = Chunk(identity, 1, tuple((clip_id, "") for clip_id in ids[start : start + CHUNK]))
        claim = ledger.claim(engine, chunk, worker="worker@machine-1", limits=Ledger())
        claiming += time.perf_counter() - began
        outcomes = [_success(clip.id) for clip in claim.clips]
        began = time.perf_counter()
        ledger.finish(engine, claim, outcomes, label_ids, Ledger())
        finishing += time.perf_counter() - began
    return len(ids) / finishing, len(ids) / (claiming + finishing)


def range_of_pending(engine: sa.Engine) -> list[int]:
    with reading(engine) as connection:
        return list(
            connection.scalars(sa.select(Clip.id).where(state_is(State.pending)).order_by(Clip.id))
        )


def _success(clip_id: int) -> Success:
    predictions = tuple(
        Prediction((clip_id * 7 + rank * 101) % LABELS, 0.9 / rank) for rank in range(1, 6)
    )
    facts = AudioFacts(5.0, 44100, 1, "pcm_s16le")
    return Success(
        clip_id,
        Source(sha256(b"%d" % clip_id).hexdigest(), 441044),
        facts,
        predictions,
        (),
        Timings(80, 2, 9),
    )


def bytes_per_clip(engine: sa.Engine, clips: int) -> float:
    size = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
    if engine.dialect.name == "postgresql":
        size = "SELECT pg_database_size(current_database())"
    with reading(engine) as connection:
        return float(connection.scalar(sa.text(size)) or 0) / clips


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


@contextmanager
def database(kind: str, folder: Path | None) -> Iterator[str]:
    if kind == "postgresql":
        with running_postgres(POSTGRESQL) as url:
            yield url
    else:
        with TemporaryDirectory(dir=folder) as own:
            yield f"sqlite:///{own}/queries.db"


def export(engine: sa.Engine, clips: int, folder: Path) -> str:
    """Write the run to a Parquet file as `earmark export` does; return what it took."""
    file = folder / "big.parquet"
    command = [
        sys.executable,
        "-m",
        "earmark",
        "export",
        "big",
        "-o",
        file,
        "--db",
        str(engine.url.database),
    ]
    began = time.perf_counter()
    _, status, used = os.wait4(subprocess.Popen(command).pid, 0)
    assert status == 0
    rate, memory_mb, file_mb = (
        clips / (time.perf_counter() - began),
        used.ru_maxrss / 1024,
        file.stat().st_size / 1e6,
    )
    figures = f"{rate:,.0f}; {memory_mb:.0f}; {file_mb:.0f}"
    return f"export to Parquet, rows/s; memory, MB; file, MB | {figures}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=10_000_000)
    parser.add_argument(
        "--database", choices=DIALECTS, action="append", help="Default: both, one after the other."
    )
    parser.add_argument("--plans", action="store_true", help="Print each query's plan.")
    parser.add_argument(
        "--folder", type=Path, help="Where the SQLite file goes; PostgreSQL's goes to TMPDIR."
    )
    asked = parser.parse_args()
    # Stopped from outside it takes its gigabytes and its server along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for kind in asked.database or DIALECTS:
        with database(kind, asked.folder) as url, TemporaryDirectory(dir=asked.folder) as folder:
            _report(connect(url, Database()), asked.clips, Path(folder), plans=asked.plans)


def _report(engine: sa.Engine, clips: int, folder: Path, *, plans: bool) -> None:
    """Print the table of the measurements page, row by row as it is measured."""
    began = time.perf_counter()
    label_ids = build(engine, clips)
    print(f"\n| {clips:,} clips x 5 predictions | {engine.dialect.name} | wanted |\n|---|---|---|")
    if engine.dialect.name == "postgresql":
        settings = ", ".join(f"{name} {value}" for name, value in POSTGRESQL.items())
        print(f"| settings | {settings}, fsync off | |")
    _show("built in, s", time.perf_counter() - began)
    _show("bytes a clip, all tables and indexes", bytes_per_clip(engine, clips))
    if engine.dialect.name == "postgresql":
        with reading(engine) as connection:
            sizes = connection.exec_driver_sql(SIZES.replace("%", "%%")).all()
        print(f"| of which | {', '.join(f'{name} {size / clips:.0f}' for name, size in sizes)} | |")
    for name, statement in QUERIES.items():
        _show(f"{name}, ms", query_ms(engine, statement))
        if plans:
            print(plan(engine, statement))
    looking = median(_seconds(lambda: runs.progress(engine, 1)) for _ in range(REPEATS))
    _show("`earmark status`, one look, ms", looking * 1000)
    if engine.dialect.name == "sqlite":
        # The same code writes PostgreSQL's rows, and ten million take minutes.
        print(f"| {export(engine, clips, folder)} | 500 MB of memory at most |", flush=True)
    finish, both = rates(engine, label_ids)
    _show(f"results written, chunks of {CHUNK}, clips/s", finish)
    _show("claimed and written, clips/s", both)
    print(f"\nLoad at the end: {os.getloadavg()[0]:.1f}.")
    engine.dispose()


def _show(name: str, figure: float) -> None:
    wanted = WANTED.get(name)
    bound = "" if wanted is None else f"{'>=' if name.endswith('/s') else '<='} {wanted:,}"
    print(f"| {name} | {figure:,.{1 if figure < 100 else 0}f} | {bound} |", flush=True)


if __name__ == "__main__":
    main()
