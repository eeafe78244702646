"""docs/partitions.sql: the whole of Earmark on a PostgreSQL whose clips are parted by run."""

from __future__ import annotations

from pathlib import Path

import psycopg

from db import feeding, ledger, results, runs
from db.session import connect
from earmark.core.settings import Database, Ledger
from tests.db.builders import chunk_of, labels, submit, success, two_runs

DDL = Path(__file__).parents[2] / "docs" / "partitions.sql"


def test_runs_in_partitions_work_alike_and_one_is_dropped_at_once(postgres_url: str) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(DDL.read_bytes())
        connection.execute("ALTER TABLE clips DETACH PARTITION clips_of_runs_1_to_1000")
        connection.execute(
            "ALTER TABLE clips ATTACH PARTITION clips_of_runs_1_to_1000 FOR VALUES FROM (1) TO (2)"
        )
    engine = connect(postgres_url, Database())
    two_runs(engine)
    assert len(list(results.results(engine, 1))) == 3
    assert len(list(results.failures(engine, 1))) == 1
    run_id, _ = submit(engine, 40)
    assert submit(engine, 40)[0] == run_id + 1
    for picked in feeding.pick(engine, "clips", 20, Ledger()):
        claim = ledger.claim(
            engine,
            chunk_of(engine, [clip.id for clip in picked.clips]),
            worker="w",
            limits=Ledger(),
        )
        ledger.finish(
            engine, claim, [success(clip.id) for clip in claim.clips], labels(engine), Ledger()
        )
    assert runs.progress(engine, run_id).finished
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP TABLE clips_of_runs_1_to_1000")
    assert list(results.results(engine, 1)) == []
    assert len(list(results.results(engine, 2))) == 1
    engine.dispose()
