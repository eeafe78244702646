"""Reading sources: each line is a clip or is counted; an unreadable source raises one sentence."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest

from earmark.core.errors import UsageError
from earmark.core.options import Listing
from producer.sources import read_clips
from producer.tally import Tally

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sounds" / "deep").mkdir(parents=True)
    for name in ("sounds/b.wav", "sounds/deep/a.FLAC", "sounds/.hidden.wav", "sounds/notes.md"):
        (tmp_path / name).touch()
    return tmp_path


def uris(*sources: object, tally: Tally | None = None, **options: Any) -> list[str]:
    names = [str(source) for source in sources]
    return [clip.uri for clip in read_clips(names, Listing(**options), tally)]


def test_a_text_list_gives_urls_and_paths_and_counts_its_skipped_lines(folder: Path) -> None:
    list_file = folder / "list.txt"
    list_file.write_bytes(
        b"\xef\xbb\xbfhttps://h/a.wav\r\n\r\n# comment\r\nsounds/b.wav\r\n/abs/c.wav\r\n"
        b"gone.wav\r\n"
    )
    tally = Tally()
    assert uris(list_file, tally=tally) == [
        "https://h/a.wav",
        str(folder / "sounds/b.wav"),
        "/abs/c.wav",
        str(folder / "gone.wav"),
    ]
    assert tally.blank == 2
    assert (tally.missing, tally.tried) == (1, str(folder / "gone.wav"))


def test_a_nul_is_kept_as_text(folder: Path) -> None:
    (folder / "list.txt").write_bytes(b"https://h/\x00.wav\n")
    assert uris(folder / "list.txt") == ["https://h/\\x00.wav"]


def test_all_other_columns_of_a_table_become_meta(folder: Path) -> None:
    (folder / "list.csv").write_text(
        'city,url,note\nRome,https://h/a,"two\nlines"\nOslo,https://h/b\nBern,,none\n'
    )
    tally = Tally()
    clips = list(read_clips([str(folder / "list.csv")], tally=tally))
    assert [(clip.uri, dict(clip.meta)) for clip in clips] == [
        ("https://h/a", {"city": "Rome", "note": "two\nlines"}),
        ("https://h/b", {"city": "Oslo", "note": ""}),
    ]
    assert [str(refused) for refused in tally.examples] == [
        f"{folder}/list.csv, line 5: there is no text in 'url'"
    ]


def test_a_tsv_and_another_column_name(folder: Path) -> None:
    (folder / "list.tsv").write_text("id\tlink\n1\thttps://h/a\n")
    (clip,) = read_clips([str(folder / "list.tsv")], Listing(url_col="link"))
    assert (clip.uri, dict(clip.meta)) == ("https://h/a", {"id": "1"})


def test_a_folder_is_walked_in_order_without_hidden_files(folder: Path) -> None:
    names = [uri.removeprefix(f"{folder}/sounds/") for uri in uris(folder / "sounds")]
    assert names == ["b.wav", "deep/a.FLAC"]


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """Lay out a project with links to the store of a hub, and to folders of a NAS."""
    for name in ("project/a.wav", "project/z/b.wav", "nas/site/c.wav", "nas/site/d/e.wav", "blob"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    project = tmp_path / "project"
    (project / "blob.wav").symlink_to("../blob")
    (project / "again").symlink_to("z")
    (project / "loop").symlink_to(".")
    (project / "z" / "up").symlink_to("../..")
    (project / "z" / "disk").symlink_to("/")
    (project / "site").symlink_to(tmp_path / "nas" / "site")
    (project / "twice").symlink_to(tmp_path / "nas" / "site")
    (tmp_path / "nas" / "site" / "back").symlink_to(project)
    return project


def test_each_real_folder_behind_links_is_walked_once(linked: Path) -> None:
    names = [uri.removeprefix(f"{linked}/") for uri in uris(linked)]
    assert names == ["a.wav", "blob.wav", "z/b.wav", "site/c.wav", "site/d/e.wav"]


def test_a_linked_folder_is_walked_under_its_own_name(linked: Path) -> None:
    (linked.parent / "alias").symlink_to(linked)
    assert uris(linked.parent / "alias")[0] == f"{linked.parent}/alias/a.wav"


def test_a_glob_an_audio_file_and_a_url_are_sources(folder: Path) -> None:
    found = uris(folder / "**/*.FLAC", folder / "sounds/b.wav", "https://h/x.wav")
    assert found == [
        str(folder / "sounds/deep/a.FLAC"),
        str(folder / "sounds/b.wav"),
        "https://h/x.wav",
    ]


def test_a_url_with_undecodable_bytes_can_be_stored() -> None:
    assert [clip.uri for clip in read_clips(["https://h.org/\udcff.wav"])] == [
        "https://h.org/\\udcff.wav"
    ]


@pytest.mark.parametrize(
    "content", [b"https://h/a\n\nhttps://h/b\n", b"n,url\n1,https://h/a\n2,https://h/b\n"]
)
def test_standard_input_is_a_list_of_any_format(
    monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))  # type: ignore[arg-type]
    assert uris("-") == ["https://h/a", "https://h/b"]


def test_an_undecodable_file_name_becomes_a_file_url(tmp_path: Path) -> None:
    (tmp_path / "a\udcff.wav").touch()
    assert uris(tmp_path) == [f"file://{tmp_path}/a%FF.wav"]


@pytest.mark.parametrize(
    ("name", "text", "options", "sentence"),
    [
        ("gone.txt", None, {}, "no file or folder"),
        ("list.xyz", "a", {}, "input-format"),
        ("list.csv", "a,b\n1,2\n", {}, "it has a, b"),
        ("list.csv", "", {}, "none at all"),
    ],
)
def test_an_unreadable_source_raises_one_sentence(
    tmp_path: Path, name: str, text: str | None, options: dict[str, object], sentence: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=sentence):
        uris(tmp_path / name, **options)


def test_a_list_is_read_lazily(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("https://h/a\n" * 10)
    clips = read_clips([str(tmp_path / "list.txt"), str(tmp_path / "gone")])
    assert next(clips).uri == "https://h/a"
