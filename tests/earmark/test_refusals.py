"""A machine or database that does not allow a run is one sentence, before any write."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from db import ledger
from db.session import connect
from earmark import folders
from earmark.core.errors import ServiceError, UsageError
from earmark.core.options import RunOptions
from earmark.core.settings import Database
from earmark.demo import EXAMPLES
from tests.db.builders import two_runs
from tests.earmark.verbs import verb
from tests.end_to_end.conftest import Earmark
from tests.ordinary_user import as_ordinary_user
from tests.servers import upgraded

if TYPE_CHECKING:
    from pathlib import Path

    import sqlalchemy as sa

CLIP = str(EXAMPLES / "dog.ogg")


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    monkeypatch.setenv("EARMARK_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    """A folder in which nothing can be made."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    return folder


def run(*words: str) -> str:
    """Return the sentence with which `earmark run` refuses a clip, as an ordinary user."""
    ended = as_ordinary_user(lambda: verb("run", CLIP, *words))
    assert ended.status == 3, ended
    return ended.text


@pytest.mark.parametrize("name", ["", "new", "new/deep"])
def test_a_data_folder_that_cannot_be_written_names_its_setting(
    name: str, locked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EARMARK_DATA_DIR", str(locked / name))
    refused = run("--db", str(tmp_path / "labels.db"))
    assert f"The data folder {locked / name}" in refused
    assert "Set EARMARK_DATA_DIR" in refused
    assert not (tmp_path / "labels.db").exists()


def test_a_user_without_a_home_is_told_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EARMARK_DATA_DIR")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert "no home folder: set EARMARK_DATA_DIR" in run()


def test_no_folder_for_temporary_files_names_its_variable(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "nowhere")])
    assert "set TMPDIR" in run()
    assert not list(data_folder.iterdir())


@pytest.mark.parametrize("name", ["labels.db", "new/labels.db"])
def test_a_database_file_that_cannot_be_made_is_told_how_to_name_another(
    name: str, locked: Path
) -> None:
    refused = run("--db", str(locked / name))
    assert "--db" in refused
    assert "EARMARK_DATA_DIR" in refused
    assert "Is it running" not in refused


def test_a_file_that_is_no_database_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("These are notes, and no database.\n" * 100)
    assert "file is not a database" in run("--db", str(tmp_path / "notes.txt"))


def test_the_home_of_nobody_is_no_file() -> None:
    assert verb("status", "--db", "~no.such.user/labels.db").status == 2


@pytest.mark.parametrize("name", ["q?x.db", "p%41x.db", "a b#ü:&=.db"])
def test_the_file_that_is_named_is_the_one_that_is_written(name: str, tmp_path: Path) -> None:
    file = tmp_path / "files" / name
    assert verb("db", "upgrade", "--db", str(file)).status == 0
    assert f"{file} is ready" in verb("db", "check", "--db", str(file)).text
    assert [child.name for child in file.parent.iterdir()] == [name]


def test_a_role_that_may_not_create_tables_is_told_its_grant(
    postgres: str, empty_postgres_url: str
) -> None:
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE ROLE earmark_reader LOGIN")
    url = empty_postgres_url.replace("//postgres@", "//earmark_reader@")
    try:
        refused = verb("db", "upgrade", "--db", url)
        assert refused.status == 3
        assert "`GRANT CREATE ON SCHEMA public TO earmark_reader`" in refused.text
        refused = verb("db", "upgrade", "--db", f"{url}?options=-csearch_path%3Dnowhere")
        assert refused.status == 3
        assert "`CREATE SCHEMA AUTHORIZATION earmark_reader`" in refused.text
        with psycopg.connect(empty_postgres_url, autocommit=True) as connection:
            connection.execute("CREATE SCHEMA AUTHORIZATION earmark_reader")
        assert verb("db", "upgrade", "--db", url).status == 0
    finally:
        with psycopg.connect(empty_postgres_url, autocommit=True) as connection:
            connection.execute("DROP OWNED BY earmark_reader CASCADE; DROP ROLE earmark_reader")


def test_a_locale_of_ascii_letters_names_its_variables(tmp_path: Path) -> None:
    earmark = Earmark({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}, tmp_path)
    assert "set PYTHONUTF8=1" in earmark("status", status=3).stderr
    earmark.settings = {"LC_ALL": "C"}
    assert "earmark run" in earmark("status", "--db", "ümläut.db", status=3).stderr


def usage_of(usage: Any, folder: Path) -> Any:
    if not folder.exists():
        raise FileNotFoundError(folder)
    return usage


def test_a_full_disk_is_told_once_until_it_is_full_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    usage = shutil.disk_usage(tmp_path)
    disks = folders.DiskWatch([tmp_path, tmp_path, tmp_path / "removed"], told.append)
    for free in (2 * folders.FULL_BYTES, 0, 0, 2 * folders.FULL_BYTES, 0):
        monkeypatch.setattr(shutil, "disk_usage", partial(usage_of, usage._replace(free=free)))
        disks.look()
    assert told == [f"The disk of {tmp_path} is full; the run waits until there is room."] * 2


def test_a_disk_that_is_full_from_the_start_is_told_before_anything_is_written(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", partial(usage_of, usage))
    assert f"The disk of the data folder {data_folder} is full" in run(
        "--db", str(tmp_path / "labels.db")
    )
    assert not (tmp_path / "labels.db").exists()


def test_a_data_folder_is_made_where_it_can_be(data_folder: Path) -> None:
    folders.check_data(data_folder)
    assert data_folder.is_dir()
    with pytest.raises(ServiceError, match="cannot be made"):
        folders.check_data(data_folder / CLIP / "below a file")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--labels", "siren,dog"), "starter has its own labels; --labels is for zero-shot models"),
        (("--model", "./nowhere"), "There is no folder ./nowhere on this machine"),
        (("--model", "no such/model"), "names no model"),
    ],
)
def test_a_model_that_cannot_begin_is_told_before_anything_is_queued(
    tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    assert sentence in run(*words, "--db", str(tmp_path / "labels.db"))
    assert not (tmp_path / "labels.db").exists()


def test_a_file_that_is_not_there_is_not_plotted(tmp_path: Path) -> None:
    refused = verb("plot", str(tmp_path / "nosuch.wav"), "-o", str(tmp_path / "x.png"))
    assert (refused.status, refused.text) == (2, f"There is no file {tmp_path}/nosuch.wav.")


def test_a_zero_shot_model_without_labels_is_told(tmp_path: Path) -> None:
    (tmp_path / "clap").mkdir()
    (tmp_path / "clap" / "config.json").write_text('{"model_type": "clap"}')
    assert "say what to listen for with --labels" in run("--model", str(tmp_path / "clap"))


def test_submit_asks_for_no_model_that_only_the_workers_have(tmp_path: Path) -> None:
    submitted = verb("submit", CLIP, "--model", "/models/of/the/workers")
    assert "No broker is known" in submitted.text
    assert "has its own labels" in verb("submit", CLIP, "--labels", "siren").text


def test_a_port_in_use_is_told_before_anything_is_started(data_folder: Path) -> None:
    verb("db", "upgrade")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words in (("up", "--flower-port", port), ("ui", "--port", port)):
            assert f"Port {port} of 127.0.0.1 cannot be used" in verb(*words).text
    assert not list(data_folder.glob("*/worker-1.log"))


def test_retry_tells_who_works_the_clips_off(tmp_path: Path) -> None:
    db = upgraded(f"sqlite:///{tmp_path}/labels.db")
    engine = connect(db, Database())
    two_runs(engine)
    engine.dispose()
    told = verb("retry", "march", "--db", db).text
    assert "Back to work: 1 clip." in told
    assert "`earmark run YOUR_LIST --name march`, with the same list, works them off" in told
    assert "works them off" not in verb("retry", "march", "--db", db).text


def test_a_run_with_other_options_names_them(engine: sa.Engine) -> None:
    ledger.open_run(engine, "march", RunOptions(), queue="clips", chunk_size=16)
    other = RunOptions(top_k=2, combine="max")
    with pytest.raises(UsageError, match="exists with another top_k, combine; use another --name"):
        ledger.open_run(engine, "march", other, queue="clips", chunk_size=16)
