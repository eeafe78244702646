"""A hot standby of PostgreSQL: verbs that read work, verbs that write say they cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from starlette.testclient import TestClient

from db import ledger, pace, results, runs
from db.session import connect
from earmark.core import clips as words
from earmark.core.errors import NotAudio
from earmark.core.options import RunOptions
from earmark.core.settings import Database, Ledger, Settings
from earmark.web import page
from tests.db.builders import add_clips, chunk_of
from tests.earmark.verbs import verb
from tests.standby import Standby

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers import Postgres

CLIPS = 20
CLAIMED = 5


@pytest.fixture(scope="module")
def standby(postgres_server: Postgres) -> Iterator[Standby]:
    server = Standby(postgres_server)
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture
def standby_url(standby: Standby, postgres_url: str) -> str:
    """A run of 20 clips: 1 failed, 4 at a worker."""
    engine = connect(postgres_url, Database())
    run_id = ledger.open_run(engine, "march", RunOptions(), queue="clips", chunk_size=16)
    listed = [words.Clip(f"https://example.org/{number}.wav", {}) for number in range(CLIPS)]
    add_clips(engine, run_id, listed)
    ids = [row["clip_id"] for row in results.clips(engine, run_id)]
    claim = ledger.claim(engine, chunk_of(engine, ids[:CLAIMED]), worker="w", limits=Ledger())
    ledger.finish(engine, claim, [words.Failure(ids[0], NotAudio(kind="a web page"))], (), Ledger())
    engine.dispose()
    return standby.following(postgres_url)


def test_all_that_reads_works_there(standby_url: str, tmp_path: Path) -> None:
    file = str(tmp_path / "file")
    for words_, shown in (
        (("status",), "march,20,19,0,0,0,1,0"),
        (("status", "march"), "20 clips, 19 pending, 1 failed"),
        (("results", "march"), "clip_id"),
        (("failures", "march"), "not_audio"),
        (("export", "march", "-o", file), ""),
        (("report", "march", "-o", file), "1 clip to see"),
        (("query", "SELECT count(*) FROM failures"), "1"),
        (("db", "check"), "is ready"),
        (("db", "upgrade"), "is ready"),
    ):
        ended = verb(*words_, "--db", standby_url)
        assert ended.status == 0, ended
        assert shown in ended.text


def test_the_page_works_there(standby_url: str) -> None:
    engine = connect(standby_url, Database())
    with TestClient(page.application(engine, Settings()), base_url="http://localhost") as client:
        for path in (
            "/",
            "/runs/march",
            "/runs/march/now",
            "/runs/march/charts",
            "/clips/1",
            "/sql?q=SELECT 1",
        ):
            assert client.get(path).status_code == 200, path
    engine.dispose()


def test_what_workers_hold_counts_as_pending_there(standby_url: str) -> None:
    engine = connect(standby_url, Database())
    run = runs.find_run(engine, "march")
    states = runs.progress(engine, run.id).states
    assert (states["pending"], states["running"], states["failed"]) == (CLIPS - 1, 0, 1)
    held = [row["clip_id"] for row in results.clips(engine, run.id)][1]
    assert results.clip(engine, held).state_now == "pending"
    # A bottleneck is told only if no other run is at work.
    assert pace._others_at_work(engine, run.id)
    engine.dispose()


def test_what_needs_the_leases_says_that_a_standby_has_none(standby_url: str) -> None:
    ended = verb("query", "SELECT * FROM run_progress", "--db", standby_url)
    assert ended.status == 2
    assert "`earmark status`" in ended.text


@pytest.mark.parametrize("how", ["standby", "read-only"])
def test_all_that_writes_says_that_it_cannot(
    how: str, standby_url: str, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EARMARK_BROKER__URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("EARMARK_DATA_DIR", str(tmp_path))
    url, sentence = standby_url, "is a standby, which can only be read: give the URL of its primary"
    if how == "read-only":
        url, sentence = (
            f"{postgres_url}?options=-cdefault_transaction_read_only%3Don",
            "can only be read now",
        )
    (tmp_path / "list.txt").write_text("https://example.org/a.wav\n")
    for words_ in (
        ("run", str(tmp_path / "list.txt")),
        ("submit", str(tmp_path / "list.txt")),
        ("retry", "march"),
        ("cancel", "march"),
        ("prune", "march", "--yes"),
    ):
        ended = verb(*words_, "--db", url)
        assert ended.status == 3, ended
        assert sentence in ended.text
    assert [child.name for child in tmp_path.iterdir()] == ["list.txt"]
