"""Wrong usage is one sentence with its cure and exit 2; a wrong service or setting, exit 3."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

import pytest
import typer

from db.models import Base
from earmark.cli.app import app as command_line
from tests.servers import free_port

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import Earmark


@pytest.fixture
def lists(earmark: Earmark) -> Path:
    (earmark.folder / "empty.txt").write_text("\n# nothing here\n")
    (earmark.folder / "list.xyz").write_bytes(bytes(range(256)) * 8)
    with (earmark.folder / "list.csv").open("w") as file:
        csv.writer(file).writerows([("link", "city"), ("https://example.org/a.wav", "Rome")])
    return earmark.folder


@pytest.mark.parametrize(
    ("words", "status", "cure"),
    [
        (["run", "nowhere.txt"], 2, "no file or folder"),
        (["run", "no*thing.wav"], 2, "No file matches"),
        (["run", "list.xyz"], 2, "--input-format"),
        (["run", "empty.txt"], 2, "no clip"),
        (["run", "list.csv"], 2, "it has link, city"),
        (["results", "7", "--db", "sqlite:///new.db"], 3, "earmark run"),
        (["query", "SELECT 1", "--db", "mysql://h/d"], 3, "sqlite or postgresql"),
        (["query", "SELECT 1", "--db", "nonsense://"], 3, "not nonsense"),
        (["submit", "list.csv"], 3, "EARMARK_BROKER__URL"),
        (["flower", "--address", "0.0.0.0"], 3, "EARMARK_BROKER__URL"),
        (["retry", "1", "--error", "nope"], 2, "no error code nope"),
        (["run"], 2, "Missing argument"),
        (["up", "--files", "nowhere"], 2, "nowhere"),
        (["explain", "7", "--db", "sqlite:///new.db"], 3, "earmark run"),
        (["run", "list.csv", "--top-k", "0"], 2, "top-k"),
        (
            ["run", "list.csv", "--url-col", "link", "--db", "list.csv/in/a/file.db"],
            3,
            "EARMARK_DATA_DIR",
        ),
    ],
)
def test_wrong_usage_is_one_sentence(
    earmark: Earmark, lists: Path, words: list[str], status: int, cure: str
) -> None:
    refused = earmark(*words, status=status)
    assert cure in refused.stderr
    assert refused.stdout == ""


def test_reading_a_missing_database_creates_no_file(earmark: Earmark) -> None:
    earmark("status", "--db", "sqlite:///new/folder/labels.db", status=3)
    assert not (earmark.folder / "new").exists()


def test_an_unreachable_broker_or_database_is_one_sentence(earmark: Earmark, lists: Path) -> None:
    earmark.settings["EARMARK_BROKER__URL"] = f"redis://127.0.0.1:{free_port()}/0"
    submit = ("submit", "list.csv", "--url-col", "link", "--db")
    assert "The broker does not answer" in earmark(*submit, "sqlite:///x.db", status=3).stderr
    nobody = f"postgresql://postgres@127.0.0.1:{free_port()}/earmark"
    assert "Is it running" in earmark(*submit, nobody, status=3).stderr


def test_flower_needs_a_password_on_other_addresses(earmark: Earmark, valkey_url: str) -> None:
    earmark.settings["EARMARK_BROKER__URL"] = valkey_url
    assert "--basic-auth" in earmark("flower", "--address", "0.0.0.0", status=2).stderr


def test_a_shared_database_is_not_upgraded_without_db_upgrade(
    earmark: Earmark, postgres: str, valkey_url: str
) -> None:
    earmark.settings["EARMARK_BROKER__URL"] = valkey_url
    (earmark.folder / "list.txt").write_text("https://example.org/a.wav\n")
    assert "earmark db upgrade" in earmark("submit", "list.txt", "--db", postgres, status=3).stderr


def test_db_upgrade_creates_the_schema_in_a_new_database(earmark: Earmark) -> None:
    assert (
        "no Earmark tables" in earmark("db", "check", "--db", "sqlite:///new.db", status=3).stderr
    )
    assert "is ready" in earmark("db", "upgrade", "--db", "sqlite:///new.db").stderr
    assert "is ready" in earmark("db", "check", "--db", "sqlite:///new.db").stderr
    tables = earmark(
        "query", "SELECT name FROM sqlite_master", "--db", "sqlite:///new.db"
    ).stdout.split()
    assert set(Base.metadata.tables) <= set(tables)


def test_an_error_names_the_wrong_setting(earmark: Earmark) -> None:
    earmark.settings["EARMARK_FETCH__TIMEOUT_S"] = "soon"
    assert "EARMARK_FETCH__TIMEOUT_S" in earmark("status", status=3).stderr


def test_every_verb_has_help_with_an_example() -> None:
    verbs: dict[str, Any] = typer.main.get_command(command_line).commands
    assert len(verbs) > 15
    for name, verb in verbs.items():
        assert verb.help, name
        assert "Example: " in (verb.epilog or "") or verb.commands, name
