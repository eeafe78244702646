"""Fill a database of Earmark 0.1.0 in SQL, upgrade it, and check that nothing is lost.

python -m benchmarks.upgrade --clips 1000000
python -m benchmarks.upgrade --clips 10000000 --database postgresql
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from alembic import command

from benchmarks.queries import DIALECTS, bytes_per_clip, database, fill
from db import schema
from db.session import connect, reading, writing
from earmark.core.settings import Database

if TYPE_CHECKING:
    from collections.abc import Sequence

RELEASED = "v0_1_0"
#: One clip in ten is long and has four windows.
WINDOWS = """
INSERT INTO window_predictions (clip_id, start_s, end_s, label_ids, scores)
SELECT id, i, i + 1, label_ids, scores
FROM clips, (SELECT 0 AS i UNION ALL SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3) AS n
WHERE id % 10 = 0 ORDER BY id, i
"""
#: Counts, sums and extremes that an upgrade must leave as they are, of tables and of views.
CHECKS = (
    "SELECT count(*), sum(id), sum(bytes), sum(duration_s), sum(length(uri)) FROM clips",
    "SELECT min(sha256), max(sha256), min(uri_key), max(uri_key) FROM clips",
    "SELECT count(*), sum(clip_id), sum(start_s), sum(end_s) FROM window_predictions",
    "SELECT count(*), sum(clips), sum(audio_s) FROM run_counts",
    "SELECT count(*), min(label), max(label), sum(duration_s) FROM results",
    "SELECT count(*), sum(start_s), sum(end_s), sum(rank) FROM windows WHERE clip_id < 50000",
    "SELECT count(*), sum(rank), min(label), max(label) FROM top_k WHERE clip_id < 50000",
)


def build(engine: sa.Engine, clips: int) -> None:
    """Make a database of 0.1.0 with one finished run."""
    with writing(engine) as connection:
        command.upgrade(schema._config(connection), RELEASED)
    fill(engine, clips)
    with writing(engine) as connection:
        connection.execute(sa.text(WINDOWS))


def checked(engine: sa.Engine) -> list[Sequence[Any]]:
    """Return what the checks read."""
    with reading(engine) as connection:
        return [tuple(connection.execute(sa.text(check)).one()) for check in CHECKS]


def measure(engine: sa.Engine, clips: int) -> bool:
    """Print how long an upgrade takes; return whether everything is as it was before."""
    name = engine.dialect.name
    build(engine, clips)
    before, size = checked(engine), bytes_per_clip(engine, clips)
    began = time.perf_counter()
    schema.upgrade(engine)
    seconds = time.perf_counter() - began
    after = checked(engine)
    print(f"{name}: {clips:,} clips, {before[2][0]:,} windows, {size * clips / 1e9:.2f} GB")
    print(f"upgraded from {RELEASED} to {schema.current(engine)} in {seconds:.1f} s", flush=True)
    for check, old, new in zip(CHECKS, before, after, strict=True):
        if old != new:
            print(f"CHANGED: {check}: {old} is now {new}")
    return before == after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument(
        "--database", choices=DIALECTS, action="append", help="Default: both, one after the other."
    )
    parser.add_argument(
        "--folder", type=Path, help="Where the SQLite file goes; PostgreSQL's goes to TMPDIR."
    )
    options = parser.parse_args()
    # Stopped from outside it takes its gigabytes and its server along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    same = True
    for kind in options.database or DIALECTS:
        with database(kind, options.folder) as url:
            engine = connect(url, Database())
            same = measure(engine, options.clips) and same
            engine.dispose()
    print(f"Load at the end: {os.getloadavg()[0]:.1f}.")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
