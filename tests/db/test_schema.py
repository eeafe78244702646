"""Migrations: up and down, equal to the models, without loss; sentences about a wrong schema."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from benchmarks import upgrade
from db import results, runs, schema
from db.models import Base
from db.rows import select
from db.session import connect, reading, writing
from earmark.core.errors import DatabaseError, ServiceError
from earmark.core.settings import Database

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Rows as the first version's own program wrote them; never to be changed once that is released.
FIRST_DATA = (
    "INSERT INTO models"
    " (id, name, revision, sha256, sample_rate, function_to_apply, window_s, created_at)"
    " VALUES (1, 'm', '', '0', 16000, 'softmax', 10, 1)",
    "INSERT INTO labels (id, model_id, position, name) VALUES (1, 1, 0, 'siren')",
    "INSERT INTO runs (id, name, model_id, options, queue, chunk_size, created_at)"
    " VALUES (1, 'old', 1, '{{}}', 'clips', 16, 1)",
    "INSERT INTO clips (id, run_id, uri, uri_key, state, label_id, score, sha256, bytes,"
    " duration_s, finished_at, label_ids, scores)"
    " VALUES (1, 1, 'u', '0123456789a', 'done', 1, 0.5, 'ab', 7, 2, 3, {ids}, {scores})",
    "INSERT INTO window_predictions (clip_id, start_s, end_s, label_ids, scores)"
    " VALUES (1, 0, 1, {ids}, {scores}), (1, 1, 2, {ids}, {scores})",
)
DONE = "SELECT done FROM run_progress"
WINDOWS = "SELECT start_s, end_s, label, score FROM windows WHERE run_id = 1 ORDER BY start_s"

LISTS = {
    "sqlite": {"ids": "'[1]'", "scores": "'[0.5]'"},
    "postgresql": {"ids": "'{1}'", "scores": "'{0.5}'"},
}


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    """A database that no Earmark has seen."""
    url = f"sqlite:///{tmp_path}/e.db"
    if request.param == "postgresql":
        url = str(request.getfixturevalue("empty_postgres_url"))
    engine = connect(url, Database())
    yield engine
    engine.dispose()


def migrate(engine: sa.Engine, to: str, *, back: bool = False) -> None:
    with writing(engine) as connection:
        (command.downgrade if back else command.upgrade)(schema._config(connection), to)


@pytest.mark.filterwarnings("ignore:.*expression-based index")
def test_the_migrations_create_the_tables_of_the_models(engine: sa.Engine) -> None:
    with reading(engine) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_the_migrations_can_be_undone_and_redone(empty: sa.Engine) -> None:
    schema.upgrade(empty)
    migrate(empty, "base", back=True)
    assert schema.current(empty) is None
    with reading(empty) as connection:
        found = sa.inspect(connection)
        assert {*found.get_table_names(), *found.get_view_names()} <= {
            "alembic_version",
            "sqlite_stat1",
        }
    schema.upgrade(empty)
    schema.check(empty)


def test_data_of_the_first_version_survives_every_upgrade(empty: sa.Engine) -> None:
    first, *later = schema.versions()
    migrate(empty, first)
    with writing(empty) as connection:
        for statement in FIRST_DATA:
            connection.execute(sa.text(statement.format(**LISTS[empty.dialect.name])))
    for version in [first, *later]:
        migrate(empty, version)
        rows = list(results.results(empty, 1))
        assert [(row["run"], row["label"], row["score"]) for row in rows] == [("old", "siren", 0.5)]
        assert list(select(empty, DONE)) == [{"done": 1}]
        windows = [tuple(row.values()) for row in select(empty, WINDOWS)]
        assert windows == [(0.0, 1.0, "siren", 0.5), (1.0, 2.0, "siren", 0.5)]


def test_a_run_of_the_first_version_reads_the_same_after_the_upgrade(empty: sa.Engine) -> None:
    assert upgrade.measure(empty, 2000)


def test_the_released_views_are_frozen_and_the_new_ones_replace_them(empty: sa.Engine) -> None:
    migrate(empty, "v0_1_0")
    assert "channel" not in columns(empty, "results")
    migrate(empty, "v0_2_0")
    for view in ("results", "top_k", "windows", "failures"):
        assert {"start_s", "end_s", "member"} <= columns(empty, view)
        assert ("channel" in columns(empty, view)) == (view != "failures")
    migrate(empty, "v0_1_0", back=True)
    assert "channel" not in columns(empty, "results")


def columns(engine: sa.Engine, view: str) -> set[str]:
    with reading(engine) as connection:
        return {column["name"] for column in sa.inspect(connection).get_columns(view)}


def test_each_channel_of_a_clip_has_its_own_windows(engine: sa.Engine) -> None:
    with writing(engine) as connection:
        for statement in FIRST_DATA:
            connection.execute(sa.text(statement.format(**LISTS[engine.dialect.name])))
        connection.execute(
            sa.text(
                "INSERT INTO window_predictions"
                " (clip_id, channel, start_s, end_s, label_ids, scores)"
                " SELECT clip_id, 2, start_s, end_s, label_ids, scores FROM window_predictions"
            )
        )
    per_channel = "SELECT channel, windows FROM events WHERE run_id = 1"
    events = {row["channel"]: row["windows"] for row in select(engine, per_channel)}
    assert events == {None: 2, 2: 2}


def test_versions_are_in_the_order_of_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "versions").mkdir()
    for name in ("v0_10_0", "v0_2_0", "v0_1_0"):
        (tmp_path / "versions" / f"{name}.py").touch()
    monkeypatch.setattr(schema, "MIGRATIONS", tmp_path)
    assert schema.versions() == ["v0_1_0", "v0_2_0", "v0_10_0"]


def test_a_newer_schema_is_refused_and_not_changed(engine: sa.Engine) -> None:
    with writing(engine) as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'v9_0_0'"))
    for act in (schema.upgrade, schema.check):
        with pytest.raises(ServiceError, match="newer than this Earmark"):
            act(engine)


def test_an_older_schema_asks_for_an_upgrade(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = schema.versions()
    monkeypatch.setattr(schema, "versions", lambda: [*ours, "v99_0_0"])
    with pytest.raises(
        ServiceError, match=f"is at {ours[-1]}, this is v99_0_0: run `earmark db upgrade`"
    ):
        schema.check(engine)


@pytest.mark.slow
def test_a_worker_that_finds_another_schema_says_so_and_exits(
    engine: sa.Engine, database_url: str, tmp_path: Path
) -> None:
    with writing(engine) as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'v9_0_0'"))
    said = {
        "DATABASE__URL": database_url,
        "BROKER__URL": "redis://127.0.0.1:1/0",
        "DATA_DIR": str(tmp_path),
    }
    environment = os.environ | {f"EARMARK_{name}": value for name, value in said.items()}
    worker = [sys.executable, "-m", "earmark", "worker"]
    ended = subprocess.run(worker, env=environment, text=True, capture_output=True, timeout=60)
    assert ended.returncode == 3
    assert ended.stderr.endswith("newer than this Earmark: upgrade Earmark.\n")


def test_an_empty_database_asks_for_an_upgrade(empty: sa.Engine) -> None:
    with pytest.raises(ServiceError, match="earmark db upgrade"):
        schema.check(empty)


def test_a_file_that_is_no_database_gets_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "notes.db"
    file.write_text("not a database, but long enough to look like one " * 40)
    engine = connect(f"sqlite:///{file}", Database())
    with pytest.raises(ServiceError, match="not a database"):
        schema.current(engine)


def test_datasette_shows_the_views_and_hides_every_table() -> None:
    told = json.loads((Path(__file__).parents[2] / "docs" / "datasette.json").read_text())
    tables = told["databases"]["earmark"]["tables"]
    hidden = {name for name, about in tables.items() if about.get("hidden")}
    assert hidden == {"alembic_version", *Base.metadata.tables}
    assert {*tables} - hidden < {*schema.view_names()}


def test_a_missing_table_is_one_sentence_that_says_what_to_do(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path}/other.db", Database())
    with pytest.raises(
        DatabaseError, match=r"lacks a table \(no such table: runs\): run `earmark db upgrade`"
    ):
        runs.get_run(engine, 1)
