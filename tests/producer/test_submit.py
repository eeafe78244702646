"""Submitting: rows once each whatever happens, and counts that add up."""

from __future__ import annotations

import os
import random
import time
from itertools import groupby, product
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from db import bulk_insert, feeding, ledger, runs
from db.identity import ledger_id
from db.models import Clip
from db.session import connect, execute, reading
from earmark.core.clips import Chunk, Part, normal_uri, uri_key
from earmark.core.clips import Clip as ListedClip
from earmark.core.errors import DatabaseError, UsageError
from earmark.core.options import RunOptions
from earmark.core.settings import Database, Ledger
from producer import submit as submit_module
from producer.sources import read_clips
from producer.submit import submit
from tests import containers
from tests.db.builders import add_clips
from tests.producer.races import FORKED, LONGEST_S, submit_one

if TYPE_CHECKING:
    from pathlib import Path

    from earmark.core.settings import Settings

ROWS = 60_000


def count(engine: sa.Engine, run_id: int) -> tuple[int, int]:
    """Return a run's clips, and how many different URIs they have."""
    with reading(engine) as connection:
        found = sa.select(sa.func.count(), sa.func.count(Clip.uri.distinct())).where(
            Clip.run_id == run_id
        )
        return tuple(connection.execute(found).one())  # type: ignore[return-value]


def test_an_edited_and_reordered_list_adds_only_its_new_clips(
    engine: sa.Engine, settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "list.txt"
    path.write_text("".join(f"https://h.org/{n}\n" for n in range(25_000)))
    first = submit([str(path)], engine, settings, name="mine")
    assert (first.added, first.known) == (25_000, 0)
    path.write_text("".join(f"https://h.org/{n}\n" for n in reversed(range(10, 45_000))))
    second = submit([str(path)], engine, settings, name="mine")
    assert (second.run_id, second.added, second.known) == (first.run_id, 20_000, 24_990)
    assert count(engine, first.run_id) == (45_000, 45_000)


def test_members_of_containers_are_claimed_with_their_places_and_known_again(
    engine: sa.Engine, settings: Settings, tmp_path: Path
) -> None:
    sounds = {f"{number}.wav": os.urandom(99) for number in range(200)}
    paths = [containers.write(tmp_path / name, sounds) for name in ("a.tar", "b.tar.gz", "c.zip")]
    run = submit([str(path) for path in paths], engine, settings, name="mine")
    assert (run.added, run.known) == (600, 0)
    assert submit([str(paths[0])], engine, settings, name="mine").added == 0
    with reading(engine) as connection:
        rows = connection.execute(sa.select(Clip.id, Clip.uri)).all()
        keys = connection.scalars(sa.select(Clip.uri).order_by(Clip.uri_key)).all()
    chunk = Chunk(ledger_id(engine), run.run_id, tuple((row.id, row.uri) for row in rows))
    clips = ledger.claim(engine, chunk, worker="w", limits=Ledger()).clips
    assert {(clip.uri, clip.part) for clip in clips} == {
        (clip.uri, clip.part) for clip in read_clips([str(path) for path in paths])
    }
    # The members of a container stay together, so that one fetched as a whole is fetched once.
    assert len(list(groupby(keys))) == 3


def test_the_report_accounts_for_every_line(
    engine: sa.Engine, settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "list.csv"
    path.write_text("n,url\n1,https://h.org/a\n2\n3,https://h.org/a\n\n")
    submitted = submit(str(path), engine, settings)
    assert submitted.report() == [
        "Of 5 lines or files: 1 new, 1 known already, 1 blank or comment, 1 refused, "
        "1 header or further line of a cell.",
        f"  {path}, line 3: it has 1 cells, and 'url' is number 2",
        "Rows with other columns for a clip that is known, dropped: 1; --duplicates keep makes"
        " each row a clip of its own.",
    ]
    path.write_text("url,n\n,1\n")
    with pytest.raises(UsageError, match="line 2: there is no text"):
        submit(str(path), engine, settings)


def test_any_meta_is_kept_and_found_with_sql(
    engine: sa.Engine, settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "list.jsonl"
    odd = '"nul": "a\\u0000b", "half": "\\ud800", "number": NaN, "deep": {"n": [1, "\\u0000"]}'
    path.write_text(
        f'{{"url": "https://h.org/a", "city": "Zürich", {odd}}}\n'
        '{"url": "https://h.org/b", "n": 2}\n'
    )
    run = submit(str(path), engine, settings)
    field = "json_extract(meta, '$.city')" if engine.dialect.name == "sqlite" else "meta ->> 'city'"
    with reading(engine) as connection:
        found = (
            connection.execute(sa.text(f"SELECT uri FROM clips WHERE {field} = 'Zürich'"))
            .scalars()
            .all()
        )
        meta = (
            connection.execute(
                sa.select(Clip.meta).where(Clip.run_id == run.run_id).order_by(Clip.id)
            )
            .scalars()
            .all()
        )
    assert found == ["https://h.org/a"]
    assert meta[0] == {
        "city": "Zürich",
        "nul": "a\\x00b",
        "half": "\\ud800",
        "number": None,
        "deep": {"n": [1, "\\x00"]},
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_and_repeated_submission_has_each_clip_once(
    engine: sa.Engine, settings: Settings, tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "list.txt"
    path.write_text("".join(f"https://h.org/{n}\n" for n in range(ROWS)))
    moment = random.Random(seed)
    for _ in range(3):
        start = FORKED.Barrier(2)
        child = FORKED.Process(target=submit_one, args=(start, settings, "mine", str(path)))
        child.start()
        start.wait(LONGEST_S)
        time.sleep(moment.uniform(0, 0.8))
        child.kill()
        child.join()
    again = submit(str(path), engine, settings, name="mine")
    assert count(engine, again.run_id) == (ROWS, ROWS)
    assert runs.progress(engine, again.run_id).total == ROWS


def test_rows_added_by_another_submitter_meanwhile_are_skipped(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = ledger.open_run(engine, None, RunOptions(), queue="clips", chunk_size=16)
    rows = [bulk_insert.listed(ListedClip(f"https://h.org/{n}", {"n": n})) for n in range(10)]
    assert bulk_insert.add(engine, {run_id: [*rows[:5], rows[0]]}) == {run_id: 5}
    # Looked at a moment before the other's commit, all of them are new.
    unlike, before = bulk_insert.unlike, [rows]
    monkeypatch.setattr(
        bulk_insert, "unlike", lambda *given: before.pop() if before else unlike(*given)
    )
    assert bulk_insert.add(engine, {run_id: rows}) == {run_id: 5}
    assert count(engine, run_id) == (10, 10)
    assert runs.progress(engine, run_id).total == 10


def test_a_database_lost_during_an_insert_raises_one_sentence(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = connect(postgres_url, Database())
    run_id = ledger.open_run(engine, None, RunOptions(), queue="clips", chunk_size=16)

    def cut_off(*_: object) -> None:
        with reading(engine) as connection:
            others = "pid <> pg_backend_pid() AND datname = current_database()"
            execute(
                connection, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"
            )

    monkeypatch.setattr(bulk_insert, "_shown", cut_off)
    with pytest.raises(DatabaseError, match="cannot be used"):
        add_clips(engine, run_id, [ListedClip("https://h.org/a")])
    engine.dispose()


def test_duplicates_in_batches_of_two_writers_are_one_clip(
    engine: sa.Engine, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit_module, "ROWS_AT_ONCE", 50)
    lines = [f"https://h.org/{n % 400}\n" for n in range(4000)]
    random.Random(2).shuffle(lines)
    path = tmp_path / "list.txt"
    path.write_text("".join(lines))
    submitted = submit([str(path)], engine, settings)
    assert (submitted.added, submitted.known) == (400, 3600)
    assert count(engine, submitted.run_id) == (400, 400)
    assert runs.progress(engine, submitted.run_id).total == 400


def test_no_more_than_one_window_of_the_list_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit_module, "ROWS_AT_ONCE", 10)
    monkeypatch.setattr(submit_module, "ROWS_SORTED", 50)
    clips = (ListedClip(f"https://h.org/{n}") for n in range(200))
    windows = list(submit_module._windows(map(bulk_insert.listed, clips)))
    assert [len(window) for window in windows] == [10, 30, 50, 50, 50, 10]
    assert [row[1] for row in windows[0]] == [f"https://h.org/{n}" for n in range(10)]
    assert all(window == sorted(window) for window in windows[1:])
    monkeypatch.setattr(submit_module, "CHARS_SORTED", 1000)
    wide = (ListedClip(f"https://h.org/{n}", {"note": "x" * 600}) for n in range(20))
    assert max(map(len, submit_module._windows(map(bulk_insert.listed, wide)))) == 2


def test_two_spellings_of_a_url_are_one_clip() -> None:
    same = ["https://h.org/~a%2Fb?x=1", "HTTPS://H.ORG:443/c/../%7ea%2fb?x=1#part"]
    assert len({uri_key(uri) for uri in same}) == 1
    assert uri_key("http://h.org") == uri_key("http://h.org/")
    assert uri_key("https://bücher.example/a b") == uri_key("https://xn--bcher-kva.example/a%20b")
    others = [
        "https://h.org/a",
        "https://h.org/A",
        "https://h.org/a/",
        "https://h.org/a?",
        "https://h.org/a?b",
        "/a",
    ]
    assert len({uri_key(uri) for uri in others if uri != "https://h.org/a?"}) == 5


def test_each_part_of_a_file_is_a_clip_of_its_own() -> None:
    uri = "https://h.org/a.wav"
    parts = [
        None,
        Part(0.0, 1.0),
        Part(0.0, 2.0),
        Part(member="a.wav"),
        Part(0.0, 1.0, "a.wav"),
    ]
    assert len({uri_key(uri, part) for part in parts}) == len(parts)
    assert uri_key("HTTPS://H.org/a.wav", Part(0.0, 1.0)) == uri_key(uri, Part(0.0, 1.0))


def test_the_parts_of_a_file_stand_together_where_rows_are_sorted() -> None:
    parts = product(range(50), "abc")
    clips = [ListedClip(f"https://h/{name}.wav", part=Part(at, at + 1)) for at, name in parts]
    rows = sorted(map(bulk_insert.listed, clips), key=lambda row: row[0])
    assert len({row[0] for row in rows}) == 150
    assert all(len({row[1] for row in rows[at : at + 50]}) == 1 for at in (0, 50, 100))


def test_keys_of_whole_files_are_those_of_earmark_0_1_0() -> None:
    assert uri_key("https://h.org/a.wav").hex() == "631c087c49a8f1e1c052f2"


@given(
    host=st.lists(st.sampled_from([*"aZ09-._:@", "xn--", ".org", ":443"])).map("".join),
    rest=st.lists(
        st.sampled_from([*"aZ0-._~,;:@!$'()*&=/?+#% ä", "%C3%A4", "%FF", "%7e", "%2F", "/../"])
    ).map("".join),
)
def test_the_fast_path_to_a_key_agrees_with_the_normal_form(host: str, rest: str) -> None:
    uri = f"https://{host}/{rest}"
    assert uri_key(uri) == uri_key(normal_uri(uri))


def plan(engine: sa.Engine, statement: str, **values: int) -> str:
    explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
    with reading(engine) as connection:
        return "\n".join(str(row) for row in execute(connection, explain + statement, **values))


def test_the_feeder_walks_its_index_and_sorts_nothing(engine: sa.Engine) -> None:
    run_id = ledger.open_run(engine, None, RunOptions(), queue="clips", chunk_size=16)
    add_clips(engine, run_id, [ListedClip(f"https://h.org/{n}") for n in range(20_000)])
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE clips")
    for statement, values in ((feeding.NEVER_BEGUN, {"after": 5000}), (feeding.DUE_AGAIN, {})):
        found = plan(engine, statement, run_id=run_id, count=256, **values)
        assert "clips_pending" in found
        # Behind the mark at once, not from the first clip on.
        assert ("after" not in values) or "id>" in found or "ROW(not_before, id) >" in found
        assert "sort" not in found.lower()
        assert "b-tree" not in found.lower()


def test_due_retries_are_picked_before_new_clips(engine: sa.Engine) -> None:
    run_id = ledger.open_run(engine, None, RunOptions(), queue="clips", chunk_size=4)
    add_clips(engine, run_id, [ListedClip(f"https://h.org/{n}") for n in range(40)])
    after: dict[int, int] = {}
    (first,) = feeding.pick(engine, "clips", 1, Ledger(queue_lease_s=-1.0), after)
    assert feeding.take_back(engine, "clips") == 4
    (again,) = feeding.pick(engine, "clips", 1, Ledger(), after)
    assert again.clips == first.clips
    seen = [
        clip.id
        for _ in range(9)
        for some in feeding.pick(engine, "clips", 1, Ledger(), after)
        for clip in some.clips
    ]
    assert len(set(seen)) == len(seen) == 36


def test_clips_before_the_feeders_mark_are_picked_at_the_end(engine: sa.Engine) -> None:
    run_id = ledger.open_run(engine, None, RunOptions(), queue="clips", chunk_size=4)
    add_clips(engine, run_id, [ListedClip(f"https://h.org/{n}") for n in range(4)])
    after = {run_id: 10**9}
    assert len(feeding.pick(engine, "clips", 1, Ledger(), after)[0].clips) == 4
