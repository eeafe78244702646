"""A SQLite file that may be read and not written, as when another user hands on a finished run."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from starlette.testclient import TestClient

from db import schema
from db.session import connect, reading
from earmark.core.settings import Database, Settings, sqlite_url
from earmark.web import page
from tests.earmark.verbs import Ended, verb
from tests.ordinary_user import as_ordinary_user

if TYPE_CHECKING:
    from pathlib import Path

    from tests.earmark.conftest import Heard

READERS = (
    (("status",), "done"),
    (("results", "1"), "siren"),
    (("failures", "1"), "not_audio"),
    (("query", "SELECT count(*) FROM results"), "4"),
    (("db", "check"), "is ready"),
    (("db", "upgrade"), "is ready"),
)
WRITERS = (
    ("run", "LIST"),
    ("submit", "LIST"),
    ("retry", "1"),
    ("cancel", "1"),
    ("prune", "1", "--yes"),
)


@pytest.fixture
def finished(heard: Heard, tmp_path: Path) -> Path:
    """A finished run's file, mode 444, in a folder where nothing can be made."""
    file = tmp_path / "folder" / "finished?.db"
    file.parent.mkdir()
    with closing(sqlite3.connect(str(heard.engine.url.database))) as database:
        database.execute("VACUUM INTO ?", [str(file)])
    with closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA journal_mode=WAL")
    lock(file)
    return file


def lock(file: Path) -> None:
    for part in file.parent.iterdir():
        part.chmod(0o444)
    file.parent.chmod(0o555)


def unlock(file: Path) -> None:
    file.parent.chmod(0o755)
    file.chmod(0o644)


def ended(file: Path, *words: str) -> Ended:
    return as_ordinary_user(lambda: verb(*words, "--db", str(file)))


@pytest.mark.parametrize(("words", "shown"), READERS)
def test_what_reads_works(finished: Path, words: tuple[str, ...], shown: str) -> None:
    result = ended(finished, *words)
    assert result.status == 0, result
    assert shown in result.text


def test_files_made_of_it_are_whole(finished: Path, tmp_path: Path) -> None:
    for words in (("export", "1", "-o"), ("report", "1", "--clips", "0", "-o")):
        file = tmp_path / words[0]
        assert ended(finished, *words, str(file)).status == 0
        assert "siren" in file.read_text()


def test_the_page_works(finished: Path) -> None:
    def get() -> dict[str, int]:
        engine = connect(sqlite_url(finished), Database())
        with TestClient(
            page.application(engine, Settings()), base_url="http://localhost"
        ) as client:
            return {
                path: client.get(path).status_code
                for path in ("/", "/runs/1", "/runs/1/charts", "/sql?q=SELECT 1")
            }

    assert set(as_ordinary_user(get).values()) == {200}


@pytest.mark.parametrize("words", WRITERS, ids=lambda words: words[0])
def test_what_writes_says_that_it_cannot(
    finished: Path, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EARMARK_BROKER__URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("EARMARK_DATA_DIR", str(tmp_path))
    (tmp_path / "list.txt").write_text("https://example.org/a.wav\n")
    result = ended(
        finished, *[str(tmp_path / "list.txt") if word == "LIST" else word for word in words]
    )
    assert result.status == 3, result
    assert f"{finished} may be read here, but not written" in result.text


def test_one_that_somebody_is_writing_is_read_as_it_is_now(finished: Path) -> None:
    unlock(finished)
    with closing(sqlite3.connect(finished)) as writer:
        writer.execute("PRAGMA wal_autocheckpoint=0")
        for name in ("first", "second"):
            writer.execute("UPDATE runs SET name = ? WHERE id = 1", [name])
            writer.commit()
            lock(finished)
            assert f",{name}," in ended(finished, "status").text
            assert name in ended(finished, "query", "SELECT name FROM runs").text
            unlock(finished)


def test_a_page_that_stays_open_sees_what_is_written_later(finished: Path) -> None:
    def seen() -> list[str]:
        engine = connect(sqlite_url(finished), Database())
        names = []
        for name in ("first", "second"):
            rename_run(finished, name)
            with reading(engine) as connection:
                names += list(connection.exec_driver_sql("SELECT name FROM runs").scalars())
        return names

    assert as_ordinary_user(seen) == ["first", "second"]


def rename_run(file: Path, name: str) -> None:
    unlock(file)
    with closing(sqlite3.connect(file)) as writer:
        writer.execute("UPDATE runs SET name = ? WHERE id = 1", [name])
        writer.commit()
    lock(file)


def test_one_of_an_older_schema_is_one_sentence(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = schema.versions()[-1]
    monkeypatch.setattr(schema, "versions", lambda: [now, "v9_9_9"])
    result = ended(finished, "status")
    assert result.status == 3
    assert "may be read here, but not written" in result.text
    assert f"from {now} to v9_9_9" in result.text
