"""A variable that names no setting is told, with the one that was probably meant."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from earmark.core.settings import Settings
from tests.earmark.verbs import verb

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with its data folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EARMARK_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("EARMARK_DATABSE__URL", "EARMARK_DATABASE__URL"),
        ("EARMARK_DATABASE_URL", "EARMARK_DATABASE__URL"),
        ("EARMARK_DATADIR", "EARMARK_DATA_DIR"),
    ],
)
def test_a_misspelt_variable_is_told(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "x")
    sentence = f"{name} is no setting. Did you mean {meant}?"
    assert Settings.misspelt() == [sentence]


def test_a_name_like_no_setting_is_told_if_it_has_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EARMARK_FOO__BAR", "x")
    assert Settings.misspelt() == ["EARMARK_FOO__BAR is no setting."]


def test_every_setting_and_what_kubernetes_sets_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA_DIR", "BROKER__URL", "UI_TOKEN", "SERVICE_HOST", "PORT_6379_TCP_ADDR"):
        monkeypatch.setenv(f"EARMARK_{name}", "x")
    monkeypatch.setenv("earmark_worker__concurrency", "2")
    assert Settings.misspelt() == []


@pytest.mark.parametrize("words", [["status"], ["db", "check"], ["run", "nowhere"], ["prune", "x"]])
def test_every_verb_names_it(words: list[str], folder: Path) -> None:
    (folder / ".env").write_text("EARMARK_FETCHES__ROBOTS=true\n")
    assert "EARMARK_FETCHES__ROBOTS is no setting." in verb(*words).text
