"""The public views and the questions of docs/guides/sql.md, on both databases."""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from db import changes, charts, feeding, ledger, runs, schema
from db.models import Base, Clip
from db.query import query
from db.session import connect, reading
from earmark.core import clips as words
from earmark.core.errors import UsageError
from earmark.core.settings import Database, Ledger
from tests.db.builders import add_clips, chunk_of, labels, submit, success, two_runs

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "sql.md").read_text()
QUESTIONS = re.findall(r"^-- \d+\. (.+)\n([^;]+);", PAGE, re.M)


def ask(engine: sa.Engine, statement: str) -> list[dict[str, Any]]:
    return list(query(engine, statement, timeout_s=30))


def columns(engine: sa.Engine) -> Iterator[list[str]]:
    with reading(engine) as connection:
        for view in schema.view_names():
            yield list(connection.execute(sa.text(f"SELECT * FROM {view}")).keys())


def counted(engine: sa.Engine) -> dict[tuple[int, str], int]:
    with reading(engine) as connection:
        return Counter(
            tuple(row) for row in connection.execute(sa.select(Clip.run_id, Clip.state_now))
        )


def kept(engine: sa.Engine) -> dict[tuple[int, str], int]:
    ids = [row["run_id"] for row in ask(engine, "SELECT run_id FROM run_progress")]
    states = {run_id: runs.progress(engine, run_id).states for run_id in ids}
    return {
        (run_id, state): clips for run_id in ids for state, clips in states[run_id].items() if clips
    }


@pytest.mark.parametrize(
    ("question", "statement"), QUESTIONS, ids=[question for question, _ in QUESTIONS]
)
def test_every_question_of_the_page_has_an_answer(
    engine: sa.Engine, question: str, statement: str
) -> None:
    two_runs(engine)
    assert ask(engine, statement)


def test_the_page_names_every_column(engine: sa.Engine) -> None:
    assert len(QUESTIONS) == 21
    assert set(re.findall(r"\*\*`(\w+)`\*\*:", PAGE)) == set(schema.view_names())
    for view in columns(engine):
        assert [column for column in view if not re.search(rf"\b{column}\b", PAGE)] == []


def test_consecutive_windows_of_a_label_are_one_event_with_its_peak(engine: sa.Engine) -> None:
    two_runs(engine)
    statement = (
        "SELECT label, start_s, end_s, score, windows FROM events"
        " WHERE run = 'march' AND uri LIKE '%/0.wav'"
    )
    events = [tuple(row.values()) for row in ask(engine, f"{statement} ORDER BY start_s")]
    expected = [
        ("siren", 0.0, 8.0, 0.9, 2),
        ("dog", 8.0, 12.0, 0.6, 1),
        ("siren", 12.0, 16.0, 0.8, 1),
    ]
    assert [(*event[:3], round(event[3], 3), event[4]) for event in events] == expected


def test_a_clip_of_one_window_is_among_the_windows(engine: sa.Engine) -> None:
    two_runs(engine)
    rows = ask(engine, "SELECT start_s, end_s, rank, label FROM windows WHERE run = 'april'")
    assert rows == [{"start_s": 0.0, "end_s": 4.0, "rank": 1, "label": "dog"}]


def test_hosts_models_and_labels_are_counted(engine: sa.Engine) -> None:
    two_runs(engine)
    hosts = ask(
        engine,
        "SELECT host, clips, done, failed, failure_rate FROM host_stats"
        " WHERE run = 'march' ORDER BY host",
    )
    assert [list(row.values()) for row in hosts] == [
        ["h0.org", 2, 2, 0, 0.0],
        ["h1.org", 2, 1, 1, 0.5],
    ]
    assert charts.failing_hosts(engine, 1) == [("h1.org", 1)]
    models = ask(engine, "SELECT run, model, labels FROM models_used ORDER BY run")
    assert [tuple(row.values()) for row in models] == [("april", "n", 3), ("march", "m", 3)]
    labels = ask(engine, "SELECT label, clips FROM label_counts WHERE run = 'march' ORDER BY label")
    assert [tuple(row.values()) for row in labels] == [("rain", 2), ("siren", 1)]


def test_run_counts_agree_with_the_clips_after_each_change(engine: sa.Engine) -> None:
    two_runs(engine)
    assert kept(engine) == counted(engine)
    run_id = runs.find_run(engine, "march").id
    assert runs.progress(engine, run_id).audio_s == 24.0
    changes.retry_failed(engine, run_id)
    assert kept(engine) == counted(engine)
    changes.cancel(engine, run_id)
    assert kept(engine) == counted(engine)
    with engine.connect() as connection:
        connection.execute(sa.text("UPDATE clips SET state = 'pending'"))
        connection.rollback()
    assert kept(engine) == counted(engine)


def test_run_counts_agree_with_the_clips_after_concurrent_writes(
    engine: sa.Engine, database_url: str
) -> None:
    run_id, _ = submit(engine, 0)
    label_ids = labels(engine)

    def work(part: int) -> None:
        own = connect(database_url, Database())
        add_clips(own, run_id, [words.Clip(f"https://h/{part % 2}/{n}.wav") for n in range(48)])
        for picked in [
            *feeding.pick(own, "clips", 2, Ledger()),
            *feeding.pick(own, "clips", 2, Ledger()),
        ]:
            claim = ledger.claim(
                own,
                chunk_of(own, [clip.id for clip in picked.clips]),
                worker=str(part),
                limits=Ledger(),
            )
            kept_back = claim.clips[::3]
            outcomes = [success(clip.id) for clip in claim.clips if clip not in kept_back]
            ledger.finish(own, claim, outcomes, label_ids, Ledger())
            ledger.release(own, claim.token, {clip.id: 0.0 for clip in kept_back})
        own.dispose()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert kept(engine) == counted(engine)
    progress = runs.progress(engine, run_id)
    assert progress.total == 96
    assert progress.states["done"] > 0
    assert progress.audio_s == 5.0 * progress.states["done"]


def test_prune_deletes_the_whole_run_and_nothing_else(engine: sa.Engine) -> None:
    two_runs(engine)
    march, april = runs.find_run(engine, "march").id, runs.find_run(engine, "april").id
    with pytest.raises(UsageError, match="cancel"):
        changes.prune(engine, april)
    before = ask(engine, "SELECT * FROM top_k WHERE run = 'april'")
    assert changes.prune(engine, march) == 4
    assert ask(engine, "SELECT * FROM top_k") == before
    assert [row["run"] for row in ask(engine, "SELECT run FROM run_progress")] == ["april"]
    assert ask(engine, "SELECT * FROM windows WHERE run_id = 1") == []
    clips = ask(engine, "SELECT id FROM clips WHERE run_id = 2")
    for table in Base.metadata.sorted_tables:
        if "run_id" in table.c:
            assert ask(engine, f"SELECT * FROM {table.name} WHERE run_id <> 2") == []
        elif "clip_id" in table.c:
            kept = {row["clip_id"] for row in ask(engine, f"SELECT clip_id FROM {table.name}")}
            assert kept <= {row["id"] for row in clips}
