"""Members of containers: workers read just their bytes, or the container once."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import fsspec
import pytest
from werkzeug import Response

from earmark.core import errors, settings
from earmark.core.clips import Part
from producer.sources import read_clips
from tests import containers
from tests.containers import on
from workers.fetching.fetch import Fetcher

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pytest_httpserver import HTTPServer

    from earmark.core.clips import Clip

SOUNDS = {f"{number}.flac": os.urandom(20_000 + number) for number in range(30)}
KINDS = (*containers.KINDS, "train.parquet")


def clips_of(source: object) -> list[Clip]:
    return list(read_clips([str(source)]))


def contents(fetcher: Fetcher, clips: Iterable[Clip]) -> dict[str | None, bytes]:
    """Fetch clips in several threads, as a worker does; return the bytes of each member."""

    def content(clip: Clip) -> bytes:
        fetched = fetcher.fetch(clip.uri, clip.part)
        with fetched.file as file:
            body: bytes = file.read()
        assert fetched.source.sha256 == hashlib.sha256(body).hexdigest()
        return body

    clips = list(clips)
    with ThreadPoolExecutor(4) as threads:
        bodies = list(threads.map(content, clips))
    return {clip.part.member: body for clip, body in zip(clips, bodies, strict=True) if clip.part}


def local(**limits: Any) -> settings.Fetch:
    return settings.Fetch(file_roots="/", **limits)


@pytest.mark.parametrize("name", KINDS)
def test_each_member_of_a_local_container_is_read(name: str, tmp_path: Path) -> None:
    clips = clips_of(containers.write(tmp_path / name, SOUNDS))
    with closing(Fetcher(local())) as fetcher:
        assert contents(fetcher, clips) == SOUNDS


@pytest.mark.parametrize("name", KINDS)
def test_each_member_of_a_remote_container_is_read(
    name: str, tmp_path: Path, httpserver: HTTPServer
) -> None:
    served = containers.Served(httpserver, containers.write(tmp_path / name, SOUNDS))
    clips = served.clips()
    with closing(Fetcher(on(httpserver))) as fetcher:
        assert contents(fetcher, clips) == SOUNDS


@pytest.mark.parametrize("name", ["x.tar", "stored.zip", "deflated.zip"])
def test_four_workers_and_the_producer_fetch_hardly_more_than_the_container(
    name: str, tmp_path: Path, httpserver: HTTPServer
) -> None:
    served = containers.Served(httpserver, containers.write(tmp_path / name, SOUNDS))
    clips = served.clips()
    found = {}
    for worker in range(4):
        with closing(Fetcher(on(httpserver))) as fetcher:
            found |= contents(fetcher, clips[worker::4])
    assert found == SOUNDS
    assert served.sent <= 1.1 * served.size


@pytest.mark.parametrize(
    ("name", "ranges"), [("x.tar", False), ("x.tar.gz", True), ("train.parquet", True)]
)
def test_what_has_to_be_fetched_as_a_whole_is_fetched_once_by_a_worker(
    name: str, ranges: bool, tmp_path: Path, httpserver: HTTPServer
) -> None:
    path = containers.write(tmp_path / name, SOUNDS)
    clips = clips_of(path)
    served = containers.Served(httpserver, path, ranges=ranges)
    with closing(Fetcher(on(httpserver))) as fetcher:
        for clip in clips[:3]:
            fetcher.fetch(served.url, clip.part).file.close()
        before = len(served.requests)
        for clip in clips:
            fetcher.fetch(served.url, clip.part).file.close()
    assert len(served.requests) == before <= 2


def test_members_in_an_object_store_are_read_by_their_bytes(tmp_path: Path) -> None:
    path = containers.write(tmp_path / "x.tar", SOUNDS)
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/x.tar", path.read_bytes())
    try:
        clips = clips_of("memory://bucket/x.tar")
        with closing(Fetcher(settings.Fetch(stores="memory"))) as fetcher:
            assert contents(fetcher, clips) == SOUNDS
    finally:
        store.rm("/bucket", recursive=True)


def test_files_in_a_container_need_a_root_as_others_do(tmp_path: Path) -> None:
    (clip, *_) = clips_of(containers.write(tmp_path / "x.tar", SOUNDS))
    with closing(Fetcher(settings.Fetch())) as fetcher, pytest.raises(errors.FileNotAllowed):
        fetcher.fetch(clip.uri, clip.part)


def test_a_member_larger_than_the_limit_is_too_large(tmp_path: Path) -> None:
    path = containers.write(tmp_path / "x.tar", {"a.wav": bytes(2000), "b.wav": bytes(1000)})
    large, small = clips_of(path)
    with closing(Fetcher(local(max_bytes=1000))) as fetcher:
        assert contents(fetcher, [small]) == {"b.wav": bytes(1000)}
        with pytest.raises(errors.TooLarge):
            fetcher.fetch(large.uri, large.part)


@pytest.mark.parametrize(
    ("name", "code"),
    [("deflated.zip", "too_large"), ("x.tar.gz", "http_error"), ("x.tar.xz", "http_error")],
)
def test_a_bomb_ends_at_the_limit_of_bytes(name: str, code: str, tmp_path: Path) -> None:
    path = containers.write(tmp_path / name, {"a.wav": bytes(50_000_000)})
    assert path.stat().st_size < 100_000
    (clip,) = clips_of(path)
    limits = local(max_bytes=100_000, max_container_bytes=1_000_000)
    with closing(Fetcher(limits)) as fetcher, pytest.raises(errors.DownloadError) as caught:
        fetcher.fetch(clip.uri, clip.part)
    assert caught.value.code == code


def test_a_container_that_changed_meanwhile_is_no_other_clip(tmp_path: Path) -> None:
    path = containers.write(tmp_path / "deflated.zip", {"a.wav": bytes(3000), "b.wav": b"b" * 3000})
    clips = clips_of(path)
    path.write_bytes(b"x" * path.stat().st_size)
    with closing(Fetcher(local())) as fetcher:
        for clip in clips:
            with pytest.raises(errors.DownloadError):
                fetcher.fetch(clip.uri, clip.part)
    path.write_bytes(b"x" * 9)
    with closing(Fetcher(local())) as fetcher, pytest.raises(errors.Incomplete):
        fetcher.fetch(clips[0].uri, clips[0].part)


@pytest.mark.parametrize("packing", ["gzip", "parquet:audio", "zstd", "nonsense"])
def test_a_container_that_cannot_be_unpacked_is_an_error_of_the_clip(
    packing: str, tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(os.urandom(999))
    part = Part(member="a.wav", member_offset=0, member_bytes=9, packing=packing)
    with closing(Fetcher(local())) as fetcher, pytest.raises(errors.DownloadError) as caught:
        fetcher.fetch(str(tmp_path / "x"), part)
    assert not caught.value.transient


@pytest.mark.parametrize(
    ("status", "headers", "code"),
    [
        (206, {"Content-Range": "bytes 0-8/99"}, "http_error"),
        (206, {}, "http_error"),
        (206, {"Content-Range": "bytes 5-13/99", "Content-Encoding": "gzip"}, "http_error"),
        (206, {"Content-Range": "bytes 5-13/99", "Content-Length": "8"}, "incomplete"),
        (416, {}, "http_error"),
        (404, {}, "not_found"),
        (503, {}, "server_error"),
    ],
)
def test_another_range_than_the_one_asked_for_is_refused(
    status: int, headers: dict[str, str], code: str, httpserver: HTTPServer
) -> None:
    def answer(_: object) -> Response:
        response = Response(b"123456789", status)
        response.headers.update(headers)
        return response

    httpserver.expect_request("/x.tar").respond_with_handler(answer)
    part = Part(member="a.wav", member_offset=5, member_bytes=9, packing="")
    with closing(Fetcher(on(httpserver))) as fetcher, pytest.raises(errors.DownloadError) as caught:
        fetcher.fetch(httpserver.url_for("/x.tar"), part)
    assert caught.value.code == code


def test_a_range_is_asked_for_behind_a_redirect_too(tmp_path: Path, httpserver: HTTPServer) -> None:
    path = containers.write(tmp_path / "x.tar", SOUNDS)
    clips = clips_of(path)
    served = containers.Served(httpserver, path)
    httpserver.expect_request("/moved").respond_with_data(
        "", 302, headers={"Location": urlsplit(served.url).path}
    )
    with closing(Fetcher(on(httpserver))) as fetcher:
        fetched = fetcher.fetch(httpserver.url_for("/moved"), clips[0].part)
    with fetched.file as file:
        assert file.read() == SOUNDS["0.flac"]
    assert served.sent == len(SOUNDS["0.flac"])


def test_an_empty_member_is_empty(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        containers.add(tar, tarfile.TarInfo("a.wav"))
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.wav", b"")
    clips = [*clips_of(tmp_path / "x.tar"), *clips_of(tmp_path / "x.zip")]
    with closing(Fetcher(local())) as fetcher:
        for clip in clips:
            with pytest.raises(errors.Empty):
                fetcher.fetch(clip.uri, clip.part)
