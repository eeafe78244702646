"""Which rows are the same clip: duplicates, signed URLs, keys, changed files, lists of 0.1.0."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from alembic import command

from db import changes, ledger, runs, schema
from db.identity import ledger_id
from db.models import Clip, WindowPrediction
from db.session import connect, reading, writing
from earmark.core import clips as words
from earmark.core.options import Listing, RunOptions
from earmark.core.settings import Database, Ledger
from producer.submit import submit

if TYPE_CHECKING:
    from pathlib import Path

    from earmark.core.settings import Settings
    from producer.submit import Submitted

INSERT_OLD = sa.text(
    "INSERT INTO clips (run_id, uri, uri_key, state) VALUES (1, :uri, :key, 'pending')"
)
SIGNED = "https://h.org/a.mp3?versionId=7&X-Amz-Expires=60&X-Amz-Signature={}"


@pytest.fixture
def add(engine: sa.Engine, settings: Settings, tmp_path: Path) -> Any:
    """Submits a CSV to the run `mine`."""

    def submit_text(text: str, *, listing: Listing | None = None, **options: Any) -> Submitted:
        (tmp_path / "list.csv").write_text(text)
        return submit(
            str(tmp_path / "list.csv"), engine, settings, name="mine", listing=listing, **options
        )

    return submit_text


def stored(engine: sa.Engine, *columns: Any) -> list[Any]:
    with reading(engine) as connection:
        return list(connection.execute(sa.select(*columns).order_by(Clip.id)))


def end(engine: sa.Engine, submitted: Submitted, state: str = "done") -> None:
    """End all clips of a run, a minute ago, as a worker does."""
    values = {"state": state, "not_before": None, "bytes": 4, "duration_s": 1.0}
    with writing(engine) as connection:
        of_run = sa.update(Clip).where(Clip.run_id == submitted.run_id)
        connection.execute(of_run.values(finished_at=ledger.now(), **values))


def test_the_first_rows_columns_stay_and_the_others_are_counted(
    engine: sa.Engine, add: Any
) -> None:
    rows = "url,who\nhttps://h/a,ann\nhttps://h/a,bob\nhttps://h/a,ann\nhttps://h/b,cem\n"
    first = add(rows)
    assert (first.added, first.known, first.differing.other_columns) == (2, 2, 1)
    assert stored(engine, Clip.meta) == [({"who": "ann"},), ({"who": "cem"},)]
    assert any("dropped: 1; --duplicates keep" in line for line in first.report())
    again = add("who,url\ncem,https://h/b\nann,https://h/a\ndan,https://h/a\n")
    assert (again.added, again.differing.other_columns) == (0, 1)


def test_each_row_is_a_clip_where_duplicates_are_kept(engine: sa.Engine, add: Any) -> None:
    rows = ["https://h/a,ann", "https://h/a,bob", "https://h/a,ann"]
    assert add("\n".join(["url,who", *rows]), duplicates="keep").added == 3
    assert stored(engine, Clip.meta) == [({"who": who},) for who in ("ann", "bob", "ann")]
    # In another order, and with one row more.
    extended = add("\n".join(["url,who", "https://h/z,eve", *reversed(rows)]), duplicates="keep")
    assert (extended.added, extended.differing.other_columns) == (1, 0)


def test_each_span_is_a_clip_and_a_worker_gets_it(engine: sa.Engine, add: Any) -> None:
    rows = "url,start_s,end_s\nhttps://h/a,0,4\nhttps://h/a,4,8\nhttps://h/a,,\n"
    submitted = add(rows)
    assert (submitted.added, add(rows).added) == (3, 0)
    clips = stored(engine, Clip.id, Clip.start_s, Clip.end_s)
    assert [tuple(clip)[1:] for clip in clips] == [(0, 4), (4, 8), (None, None)]
    chunk = words.Chunk(ledger_id(engine), submitted.run_id, tuple((clip.id, "") for clip in clips))
    claim = ledger.claim(engine, chunk, worker="w", limits=Ledger())
    assert [clip.part for clip in claim.clips] == [words.Part(0, 4), words.Part(4, 8), None]


def test_a_list_signed_anew_goes_on_with_the_fresh_urls(engine: sa.Engine, add: Any) -> None:
    monday = f"url,site\n{SIGNED.format('a1')},A\n{SIGNED.format('b1').replace('/a', '/b')},B\n"
    first = add(monday)
    with writing(engine) as connection:
        finished = {"state": "done", "not_before": None}
        connection.execute(sa.update(Clip).where(Clip.uri.contains("/a")).values(finished))
    tuesday = add(monday.replace("a1", "a2").replace("b1", "b2"))
    assert (first.added, tuesday.added, tuesday.differing.fresh_urls) == (2, 0, 1)
    assert [uri[-2:] for (uri,) in stored(engine, Clip.uri)] == ["a1", "b2"]
    assert "Clips that have a new URL now: 1; `earmark retry`" in "\n".join(tuesday.report())


def test_a_column_identifies_a_clip_whose_url_changes(engine: sa.Engine, add: Any) -> None:
    by_id = Listing(key_col="id")
    assert add("id,url\n7,https://h/t/x1/a\n8,https://h/t/x1/a\n", listing=by_id).added == 2
    again = add("id,url\n8,https://h/t/x2/a\n9,https://h/t/x2/a\n", listing=by_id)
    assert (again.added, again.differing.fresh_urls) == (1, 1)
    assert [uri for (uri,) in stored(engine, Clip.uri)] == [
        "https://h/t/x1/a",
        "https://h/t/x2/a",
        "https://h/t/x2/a",
    ]


def test_a_local_file_that_changed_is_told_and_redone_if_asked(
    engine: sa.Engine, add: Any, tmp_path: Path
) -> None:
    for name in ("same.wav", "longer.wav", "newer.wav"):
        (tmp_path / name).write_bytes(b"1234")
    rows = "url\nsame.wav\nlonger.wav\nnewer.wav\n"
    end(engine, add(rows))
    assert add(rows).report()[1:] == []
    (tmp_path / "longer.wav").write_bytes(b"12345")
    with writing(engine) as connection:
        newer = sa.update(Clip).where(Clip.uri.endswith("newer.wav"))
        connection.execute(newer.values(finished_at=0.0))
        of_newer = sa.select(Clip.id).where(Clip.uri.endswith("newer.wav")).scalar_subquery()
        values = {"start_s": 0, "end_s": 1, "label_ids": [], "scores": []}
        connection.execute(sa.insert(WindowPrediction).values(clip_id=of_newer, **values))
        # Older than the clip's end by less than the clock of a test can tell.
        same = sa.update(Clip).where(~Clip.uri.endswith("newer.wav"))
        connection.execute(same.values(finished_at=Clip.finished_at + 3600))
    told = add(rows)
    assert told.differing.changed_files == 2
    assert any("--again redoes them" in line for line in told.report())
    assert [state for (state,) in stored(engine, Clip.state)] == ["done"] * 3
    assert add(rows, again=True).differing.changed_files == 2
    assert [state for (state,) in stored(engine, Clip.state)] == ["done", "pending", "pending"]
    with reading(engine) as connection:
        assert connection.scalar(sa.select(sa.func.count(WindowPrediction.clip_id))) == 0


def test_retry_can_redo_what_is_done(engine: sa.Engine, add: Any) -> None:
    submitted = add("url\nhttps://h/a\nhttps://h/b\n")
    end(engine, submitted)
    assert changes.redo_done(engine, submitted.run_id) == 2
    progress = runs.progress(engine, submitted.run_id)
    assert (progress.final, progress.total, progress.audio_s) == (0, 2, 0)


@pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)]
)
def test_a_list_submitted_under_0_1_0_adds_nothing(
    settings: Settings, tmp_path: Path, request: pytest.FixtureRequest, database: str
) -> None:
    url = f"sqlite:///{tmp_path}/old.db"
    if database == "postgresql":
        url = str(request.getfixturevalue("empty_postgres_url"))
    engine = connect(url, Database())
    with writing(engine) as connection:
        command.upgrade(schema._config(connection), "v0_1_0")
        connection.exec_driver_sql(
            "INSERT INTO runs (id, name, options, queue, chunk_size, created_at)"
            f" VALUES (1, 'old', '{json.dumps(RunOptions().as_json())}', 'clips', 16, 1)"
        )
    uris = [
        "https://h.org/a.wav", "HTTPS://H.org/b.wav#part", SIGNED.format("c1"), SIGNED.format("d1"),
        "https://h.org/x?sig=1", f"{tmp_path}/a.wav",
    ]  # fmt: skip
    (tmp_path / "a.wav").touch()
    with writing(engine) as connection:
        for uri in uris:
            connection.execute(INSERT_OLD, {"uri": uri, "key": words.whole_uri_key(uri)})
    schema.upgrade(engine)
    (tmp_path / "list.txt").write_text("\n".join([*uris[:-1], "a.wav", SIGNED.format("e1")]))
    again = submit(str(tmp_path / "list.txt"), engine, settings, name="old")
    assert (again.run_id, again.added, again.known) == (1, 0, 7)
    engine.dispose()
