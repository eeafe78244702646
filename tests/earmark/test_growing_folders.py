"""Folders that grow: a file is taken once, and only when it is complete."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from earmark import growing_folders
from earmark.core.errors import UsageError
from earmark.growing_folders import GrowingFolders

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test moves: its only element is the time."""
    now = [0.0]
    monkeypatch.setattr(growing_folders.time, "monotonic", lambda: now[0])
    return now


def test_a_file_is_taken_once_when_it_has_not_changed_for_a_while(
    tmp_path: Path, clock: list[float]
) -> None:
    growing = GrowingFolders([str(tmp_path)])
    song = tmp_path / "deep" / "song.wav"
    song.parent.mkdir()
    taken = []
    for second in range(30):
        clock[0] = second * 1.0
        if second <= 10:  # a recorder writes
            with song.open("ab") as file:
                file.write(b"fLaC")
        if files := growing.complete():
            taken.append((second, files))
    assert taken == [(15, [str(song)])]


def test_empty_hidden_and_other_files_are_not_taken(tmp_path: Path, clock: list[float]) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / ".rsync.wav.Xa1").write_bytes(b"fLaC")
    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "dangling.wav").symlink_to("nothing")
    (tmp_path / "unnamed").write_bytes(b"fLaC" * 9)
    growing = GrowingFolders([str(tmp_path)])
    taken = []
    for second in range(20):
        clock[0] = float(second)
        taken += growing.complete()
    assert taken == [str(tmp_path / "unnamed")]


def test_only_folders_grow(tmp_path: Path) -> None:
    (tmp_path / "list.txt").touch()
    for source in (tmp_path / "list.txt", tmp_path / "gone", "https://example.org/a.wav"):
        with pytest.raises(UsageError, match="--watch needs folders"):
            GrowingFolders([str(source)])
