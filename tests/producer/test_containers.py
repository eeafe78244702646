"""Containers as sources: each sound in one is a clip; hostile ones end in a sentence."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import traceback
import zipfile
from typing import TYPE_CHECKING

import polars as pl
import pytest

from earmark.core import settings, unpacking
from earmark.core.errors import UsageError
from producer.sources import read_clips
from producer.tally import Tally
from tests import containers

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_httpserver import HTTPServer

    from earmark.core.clips import Clip

SOUNDS = {f"{place}/{number}.flac": os.urandom(99) for place in "ab" for number in range(3)}


def read(*sources: object) -> tuple[list[Clip], Tally]:
    tally = Tally()
    return list(read_clips([str(source) for source in sources], tally=tally)), tally


def members(clips: list[Clip]) -> list[str | None]:
    return [clip.part.member if clip.part else None for clip in clips]


@pytest.mark.parametrize("name", containers.KINDS)
def test_the_files_beside_a_sound_are_its_columns(name: str, tmp_path: Path) -> None:
    path = containers.write(tmp_path / name, containers.webdataset(SOUNDS))
    clips, _ = read(path)
    assert {clip.uri for clip in clips} == {str(path)}
    assert members(clips) == list(SOUNDS)
    for clip in clips:
        assert clip.part
        assert clip.meta == {"city": "Zürich", "of": clip.part.member, "txt": "a dog barks"}


def test_the_rows_of_a_hugging_face_parquet_are_clips(tmp_path: Path) -> None:
    path = containers.write(tmp_path / "train.parquet", SOUNDS)
    clips, tally = read(path)
    assert members(clips) == list(SOUNDS)
    assert [clip.meta for clip in clips] == [{"label": number} for number in range(6)]
    assert (tally.lines, tally.clips) == (6, 6)


def test_parquet_rows_of_one_name_or_none_are_told_apart(tmp_path: Path) -> None:
    rows = [{"bytes": b"a", "path": "x"}, {"bytes": b"b", "path": "x"}, {"bytes": b"", "path": "y"}]
    rows.append({"bytes": b"c", "path": None})
    pl.DataFrame({"audio": rows}).write_parquet(tmp_path / "x.parquet")
    clips, tally = read(tmp_path / "x.parquet")
    assert members(clips) == ["x", "x (row 1)", "row 3"]
    assert "there are no bytes in it" in str(tally.examples[0])


def test_several_containers_by_a_glob(tmp_path: Path) -> None:
    for number in range(3):
        containers.write(tmp_path / f"shard-{number}.tar", SOUNDS)
    clips, _ = read(tmp_path / "shard-*.tar")
    assert len(clips) == len(set(clips and [(clip.uri, clip.part) for clip in clips])) == 18


def test_a_name_is_never_parsed(tmp_path: Path) -> None:
    name = "50% #1 ?a=b.wav"
    containers.write(tmp_path / "a#b.tar", {name: b"abc"})
    (clip,), _ = read(tmp_path / "a#b.tar")
    assert clip.uri == str(tmp_path / "a#b.tar")
    assert members([clip]) == [name]


def test_only_visible_regular_files_with_the_name_of_sound_are_clips(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"special-{kind!r}.wav")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in (".hidden.wav", "__MACOSX/a.wav", "a/.git/b.wav", "notes.md", "good.wav"):
            containers.add(tar, tarfile.TarInfo(name), b"abc")
    clips, _ = read(tmp_path / "x.tar")
    assert members(clips) == ["good.wav"]


@pytest.mark.parametrize("name", ["x.tar", "stored.zip"])
@pytest.mark.parametrize(
    "path", ["../evil.wav", "/etc/evil.wav", "a/../../evil.wav", "a\\..\\b.wav"]
)
def test_a_name_that_leads_out_of_the_container_is_refused(
    name: str, path: str, tmp_path: Path
) -> None:
    containers.write(tmp_path / name, {"good.wav": b"abc", path: b"abc"})
    clips, tally = read(tmp_path / name)
    assert members(clips) == ["good.wav"]
    assert "leads out of the container" in str(tally.examples[0])


def test_a_name_that_is_no_text_can_be_stored(tmp_path: Path) -> None:
    containers.write(tmp_path / "x.tar", {"a\udcff.wav": b"abc"})
    clips, _ = read(tmp_path / "x.tar")
    assert members(clips) == ["a\\udcff.wav"]


# hostile containers -------------------------------------------------------------------------------


def overlapping_zip() -> bytes:
    """Return a ZIP of which two names share one member, as bombs multiply their content."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.wav", bytes(1000))
        twin = archive.getinfo("a.wav")
        other = zipfile.ZipInfo("b.wav")
        for name in ("header_offset", "compress_size", "file_size", "CRC", "compress_type"):
            setattr(other, name, getattr(twin, name))
        archive.filelist.append(other)
    return out.getvalue()


def encrypted_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("b.wav", b"abc")
        archive.writestr("a.wav", b"abc")
        archive.getinfo("b.wav").flag_bits |= 1
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "words"), [(overlapping_zip(), "overlaps"), (encrypted_zip(), "encrypted")]
)
def test_a_member_that_overlaps_or_is_encrypted_is_refused(
    content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    clips, tally = read(tmp_path / "x.zip")
    assert members(clips) == ["a.wav"]
    assert words in str(tally.examples[0])


@pytest.mark.parametrize("cut", [700, 1024 + 100, 3 * 1024 + 512])
@pytest.mark.parametrize("junk", [b"", b"\xff" * 4096])
def test_a_tar_that_is_damaged_keeps_the_clips_before(
    cut: int, junk: bytes, tmp_path: Path
) -> None:
    path = containers.write(tmp_path / "x.tar", {f"{n}.wav": bytes(512) for n in range(9)})
    path.write_bytes(path.read_bytes()[:cut] + junk)
    clips, tally = read(path)
    assert len(clips) == (cut + 512) // 1024
    assert "breaks off" in str(tally.examples[-1])


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tar.zst", "x.zip"])
@pytest.mark.parametrize("content", [b"", b"not a container", os.urandom(5000), b"\x1f\x8b" * 99])
def test_what_is_no_container_is_one_refused_line(
    name: str, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    clips, tally = read(tmp_path / name)
    assert clips == []
    assert len(tally.examples) == 1
    assert "breaks off" in str(tally.examples[0])
    assert "\n" not in str(tally.examples[0])


def test_a_directory_of_a_million_entries_that_is_not_there_is_no_memory(tmp_path: Path) -> None:
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, 2**31, 0, 0)
    (tmp_path / "x.zip").write_bytes(end)
    clips, tally = read(tmp_path / "x.zip")
    assert clips == []
    assert "breaks off" in str(tally.examples[0])


def test_the_reader_has_neither_our_environment_nor_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EARMARK_DATABASE__URL", "postgresql://me:CANARY@db/x")
    seen = []
    start = unpacking.subprocess.Popen

    def popen(*arguments: object, **options: object) -> object:
        seen.append((arguments, options))
        return start(*arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(unpacking.subprocess, "Popen", popen)
    read(containers.write(tmp_path / "x.tar", SOUNDS))
    assert seen
    assert "CANARY" not in str(seen)


# elsewhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.tar", "deflated.zip"])
def test_of_a_remote_container_only_the_headers_are_read(
    name: str, tmp_path: Path, httpserver: HTTPServer
) -> None:
    sounds = {f"{number}.flac": os.urandom(60_000) for number in range(10)}
    served = containers.Served(httpserver, containers.write(tmp_path / name, sounds))
    clips = served.clips()
    assert members(clips) == list(sounds)
    assert {clip.uri for clip in clips} == {served.url}
    assert served.sent < 0.05 * served.size


def test_a_server_without_ranges_sends_the_container_once(
    tmp_path: Path, httpserver: HTTPServer
) -> None:
    path = containers.write(tmp_path / "x.tar", SOUNDS | {"long.wav": bytes(40_000_000)})
    served = containers.Served(httpserver, path, ranges=False)
    clips = served.clips()
    assert members(clips) == [*SOUNDS, "long.wav"]
    assert served.sent <= 1.2 * served.size  # what its socket held when we hung up


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.xz"])
def test_a_compressed_tar_elsewhere_is_read_as_a_whole(
    name: str, tmp_path: Path, httpserver: HTTPServer
) -> None:
    served = containers.Served(httpserver, containers.write(tmp_path / name, SOUNDS))
    clips = served.clips()
    assert members(clips) == list(SOUNDS)
    assert served.sent < served.size + 10  # and its first bytes


def test_the_rows_of_a_remote_parquet_are_clips(tmp_path: Path, httpserver: HTTPServer) -> None:
    served = containers.Served(httpserver, containers.write(tmp_path / "train.parquet", SOUNDS))
    clips = served.clips()
    assert members(clips) == list(SOUNDS)


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_remote_container_that_cannot_be_read_is_one_sentence_without_a_signature(
    status: int, httpserver: HTTPServer
) -> None:
    httpserver.expect_request("/x.tar").respond_with_data("", status)
    secret = "CAN" + "ARY"  # the traceback shows this file's lines
    url = httpserver.url_for("/x.tar") + f"?X-Amz-Signature={secret}"
    with pytest.raises(UsageError, match=r"container .* cannot be read") as caught:
        list(read_clips([url], fetch=containers.on(httpserver)))
    assert secret not in "".join(traceback.format_exception(caught.value))


def test_a_private_container_is_read_with_the_token_of_its_host(
    tmp_path: Path, httpserver: HTTPServer
) -> None:
    served = containers.Served(httpserver, containers.write(tmp_path / "x.tar", SOUNDS))
    served.token = "abc"
    with pytest.raises(UsageError, match="HTTP 403"):
        served.clips()
    host = httpserver.url_for("").rstrip("/")
    served.fetch = containers.on(httpserver, tokens=f'{{"{host}": "abc"}}')
    assert members(served.clips()) == list(SOUNDS)


def test_lists_and_containers_are_asked_for_through_the_proxy(
    tmp_path: Path, httpserver: HTTPServer
) -> None:
    served = containers.Served(httpserver, containers.write(tmp_path / "x.tar", SOUNDS))
    # Our server is none, and says so.
    fetch = containers.on(httpserver, proxy=httpserver.url_for("").rstrip("/"))
    for url in (served.url, httpserver.url_for("/list.csv")):
        with pytest.raises(UsageError, match="the proxy"):
            list(read_clips([url], fetch=fetch))
    assert served.requests == []


def test_the_guard_holds_for_lists_and_containers(tmp_path: Path, httpserver: HTTPServer) -> None:
    served = containers.Served(httpserver, containers.write(tmp_path / "x.tar", SOUNDS))
    fetch = settings.Fetch(ports=(httpserver.port,))
    for url in (served.url, httpserver.url_for("/list.csv")):
        with pytest.raises(UsageError, match="EARMARK_FETCH__ALLOW_NETWORKS"):
            list(read_clips([url], fetch=fetch))
    assert served.requests == []
