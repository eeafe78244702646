"""What fetch() gives back, from real loopback servers and real files."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from werkzeug import Response

from earmark.core import errors, settings
from workers.fetching import fetch
from workers.fetching.fetch import Fetcher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_httpserver import HTTPServer

CLIP = b"fLaC" + bytes(range(252)) * 400


@pytest.fixture
def fetcher(httpserver: HTTPServer) -> Iterator[Fetcher]:
    limits = settings.Fetch(allow_networks=("127.0.0.0/8", "::1/128"), ports=(httpserver.port,))
    with closing(Fetcher(limits)) as fetcher:
        yield fetcher


def failure(fetcher: Fetcher, uri: str) -> errors.ClipError:
    with pytest.raises(errors.ClipError) as caught:
        fetcher.fetch(uri)
    return caught.value


#: Downloads that fail in each way.
EACH = 20


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# downloads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [1, 100, fetch.BLOCK_BYTES, fetch.BLOCK_BYTES + 1, fetch.IN_MEMORY_BYTES + 1]
)
def test_a_download_is_an_open_file_with_its_size_and_hash(
    size: int, fetcher: Fetcher, httpserver: HTTPServer
) -> None:
    body = os.urandom(size)
    httpserver.expect_request("/clip.wav").respond_with_data(body)
    fetched = fetcher.fetch(httpserver.url_for("/clip.wav"))
    with fetched.file as file:
        assert fetched.source.bytes == size
        assert fetched.source.sha256 == hashlib.sha256(body).hexdigest()
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 0
        assert file.read() == body


def test_small_bodies_stay_in_memory_and_large_or_undeclared_ones_go_to_disk(
    fetcher: Fetcher, httpserver: HTTPServer
) -> None:
    httpserver.expect_request("/small").respond_with_data(CLIP)
    httpserver.expect_request("/large").respond_with_data(bytes(fetch.IN_MEMORY_BYTES + 1))
    httpserver.expect_request("/undeclared").respond_with_handler(
        lambda _request: Response(iter([CLIP, CLIP]))
    )
    in_memory = []
    for path in ("/small", "/large", "/undeclared"):
        with fetcher.fetch(httpserver.url_for(path)).file as file:
            in_memory.append("memfd" in str(Path(f"/proc/self/fd/{file.fileno()}").readlink()))
    assert in_memory == [True, False, False]


def test_many_threads_share_a_fetcher(fetcher: Fetcher, httpserver: HTTPServer) -> None:
    bodies = {f"/{n}": os.urandom(50_000) for n in range(64)}
    for path, body in bodies.items():
        httpserver.expect_request(path).respond_with_data(body)

    def digest(path: str) -> str:
        fetched = fetcher.fetch(httpserver.url_for(path))
        with fetched.file as file:
            assert hashlib.sha256(file.read()).hexdigest() == fetched.source.sha256
        return fetched.source.sha256

    with ThreadPoolExecutor(32) as pool:
        digests = list(pool.map(digest, bodies))
    assert digests == [hashlib.sha256(body).hexdigest() for body in bodies.values()]


def test_a_full_disk_is_a_transient_error(
    fetcher: Fetcher, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_new_file", lambda _declared: FileIO("/dev/full", "w"))
    httpserver.expect_request("/").respond_with_data(CLIP)
    error = failure(fetcher, httpserver.url_for("/"))
    assert (error.code, error.transient) == ("no_space", True)


def test_failed_downloads_leave_no_file_open(fetcher: Fetcher, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/404").respond_with_data("", status=404)
    httpserver.expect_request("/empty").respond_with_data(b"")
    httpserver.expect_request("/302").respond_with_data(
        "", status=302, headers={"Location": "/404"}
    )
    failure(fetcher, httpserver.url_for("/404"))
    before = open_files()
    for path in ("/404", "/empty", "/302") * EACH:
        failure(fetcher, httpserver.url_for(path))
    # A way of failing that left its file open would leave as many; the server has some of its own.
    assert open_files() < before + EACH


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("header", "expected_s"),
    [
        ("7", 7.0),
        (" 0 ", 0.0),
        ("999999999", 999_999_999.0),
        ("1e9", None),
        ("-5", None),
        ("9" * 400, None),
        ("soon", None),
        ("", None),
        ("٧", None),
        ("Thu, 99 Foo 99999 25:61:61 GMT", None),
        ("Thu, 01 Jan 2026 00:00:00 +99999999999999999", None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Thu, 01 Jan 1970 00:00:00 -0000", 0.0),
    ],
)
def test_retry_after_is_a_fact_of_the_error(
    status: int, header: str, expected_s: float | None, fetcher: Fetcher, httpserver: HTTPServer
) -> None:
    headers = {"Retry-After": header.encode().decode("latin-1")}
    httpserver.expect_request("/").respond_with_data("", status=status, headers=headers)
    assert failure(fetcher, httpserver.url_for("/")).retry_after_s == expected_s


def test_retry_after_may_be_a_date(fetcher: Fetcher, httpserver: HTTPServer) -> None:
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    httpserver.expect_request("/").respond_with_data("", status=429, headers={"Retry-After": when})
    assert 50 < failure(fetcher, httpserver.url_for("/")).retry_after_s <= 60


def test_without_retry_after_the_fact_is_none(fetcher: Fetcher, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/").respond_with_data("", status=500)
    assert failure(fetcher, httpserver.url_for("/")).retry_after_s is None


# files --------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Lay out a root with clips beside a folder with a secret."""
    (tmp_path / "clips" / "deep").mkdir(parents=True)
    (tmp_path / "clips" / "a b.wav").write_bytes(CLIP)
    (tmp_path / "clips" / "deep" / "c.wav").write_bytes(CLIP[:99])
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    return tmp_path / "clips"


@pytest.fixture
def reader(root: Path) -> Iterator[Fetcher]:
    with closing(Fetcher(settings.Fetch(file_roots=(root,), max_bytes=200_000))) as reader:
        yield reader


def content(reader: Fetcher, uri: str) -> bytes:
    with reader.fetch(uri).file as file:
        return file.read()


def test_a_file_under_a_root_is_read_and_hashed(reader: Fetcher, root: Path) -> None:
    fetched = reader.fetch(f"{root}/a b.wav")
    with fetched.file as file:
        assert file.read() == CLIP
    assert fetched.source.sha256 == hashlib.sha256(CLIP).hexdigest()
    assert fetched.source.bytes == len(CLIP)


def test_paths_and_file_urls_are_read_alike(reader: Fetcher, root: Path) -> None:
    uris = [
        f"file://{root}/a%20b.wav",
        f"FILE://{root}/a b.wav",
        f"FILE://LocalHost{root}/a%20b.wav",
        f"{root}//a b.wav",
        f"{root}/deep/../a b.wav",
    ]
    assert [content(reader, uri) for uri in uris] == [CLIP] * 5


def test_links_may_be_followed_inside_a_root(reader: Fetcher, root: Path) -> None:
    (root / "link.wav").symlink_to("deep/c.wav")
    (root / "folder").symlink_to(root / "deep")
    assert (
        content(reader, f"{root}/link.wav") == content(reader, f"{root}/folder/c.wav") == CLIP[:99]
    )


@pytest.mark.parametrize("text", [b"-----BEGIN OPENSSH PRIVATE KEY-----", b"root:x:0:", b"{}"])
def test_a_link_to_what_is_not_sound_is_not_read_beyond_its_first_bytes(
    text: bytes, root: Path
) -> None:
    secret = root.parent / "outside" / "secret"
    secret.write_bytes(text)
    os.truncate(secret, 3 * 1024**3)
    (root / "song.wav").symlink_to(secret)
    with closing(Fetcher(settings.Fetch(file_roots=(Path("/"),)))) as everything:
        # Reading on would have ended with its hash.
        assert failure(everything, f"{root}/song.wav").code == "not_audio"


def test_the_error_of_a_link_names_the_root_to_add(root: Path) -> None:
    store = root.parent / "blobs"
    store.mkdir()
    (store / "d41d8c").write_bytes(CLIP)
    (root / "siren.mp3").symlink_to("../blobs/d41d8c")
    with closing(Fetcher(settings.Fetch(file_roots=(root,)))) as fetcher:
        assert f"add {store} to EARMARK_FETCH__FILE_ROOTS" in str(
            failure(fetcher, f"{root}/siren.mp3")
        )
    with closing(Fetcher(settings.Fetch(file_roots=(root, store)))) as fetcher:
        assert content(fetcher, f"{root}/siren.mp3") == CLIP


def test_a_root_may_be_a_link_or_a_single_file(root: Path) -> None:
    (root.parent / "alias").symlink_to(root)
    with closing(
        Fetcher(settings.Fetch(file_roots=(root.parent / "alias", root / "a b.wav")))
    ) as reader:
        assert content(reader, f"{root.parent}/alias/deep/c.wav") == CLIP[:99]
        assert content(reader, f"{root}/a b.wav") == CLIP


def test_without_roots_no_file_is_read(root: Path) -> None:
    with closing(Fetcher(settings.Fetch())) as fetcher:
        assert failure(fetcher, f"{root}/a b.wav").code == "file_not_allowed"


@pytest.mark.parametrize(
    "uri",
    [
        "{outside}/secret",
        "{outside}/nothing",
        "{root}/../outside/secret",
        "{root}/deep/../../outside/secret",
        "file://{root}/../outside/secret",
        "file://{root}/%2e%2e/outside/secret",
        "{root}/out/secret",
        "{root}/out.wav",
        "{root}/deep/up/outside/secret",
        "{root}x/secret",
        "//{outside}/secret",
        "/proc/self/environ",
        "/proc/self/cwd",
        "/",
    ],
)
def test_nothing_outside_the_roots_is_read(uri: str, reader: Fetcher, root: Path) -> None:
    outside = root.parent / "outside"
    (root / "out").symlink_to(outside)
    (root / "out.wav").symlink_to(outside / "secret")
    (root / "deep" / "up").symlink_to("../..")
    (root.parent / "clipsx").symlink_to(outside)
    assert failure(reader, uri.format(root=root, outside=outside)).code == "file_not_allowed"


@pytest.mark.parametrize(
    "uri",
    [
        "{root}/a\0.wav",
        "{root}/a\n.wav",
        "file://{root}/a%00.wav",
        "file://localhost.evil.test{root}/a%20b.wav",
        "file://server/share/a.wav",
        "file://{root}/a%20b.wav?x",
        "file://{root}/a%20b.wav#x",
        "file://[{root}/a.wav",
        "file:{root}/a.wav",
        "file://",
        "deep/c.wav",
        "./deep/c.wav",
        "~/c.wav",
        "\\\\server\\share\\a.wav",
        "C:\\a.wav",
    ],
)
def test_a_relative_path_is_a_bad_url(uri: str, reader: Fetcher, root: Path) -> None:
    assert failure(reader, uri.format(root=root)).code == "bad_url"


def test_only_regular_files_are_read(reader: Fetcher, root: Path) -> None:
    os.mkfifo(root / "pipe")
    with closing(Fetcher(settings.Fetch(file_roots=(Path("/"),)))) as everything:
        special = [f"{root}/pipe", f"{root}/deep", "/dev/zero", "/dev/stdin", "/"]
        assert {failure(everything, path).code for path in special} == {"file_not_found"}
        assert failure(everything, "/proc/self/environ").code == "empty"


@pytest.mark.parametrize("name", ["nothing.wav", "a b.wav/x", "loop", "n" * 300, "deep/" * 2000])
def test_a_missing_file_is_not_found(name: str, reader: Fetcher, root: Path) -> None:
    (root / "loop").symlink_to("loop")
    assert failure(reader, f"{root}/{name}").code == "file_not_found"


def test_the_limit_of_downloads_is_not_one_of_files(reader: Fetcher, root: Path) -> None:
    with (root / "long.wav").open("wb") as file:
        file.truncate(200_001)
    (root / "empty.wav").touch()
    before = open_files()
    assert len(content(reader, f"{root}/long.wav")) == 200_001
    assert failure(reader, f"{root}/empty.wav").code == "empty"
    assert open_files() == before


def test_a_link_created_while_a_file_is_opened_is_not_followed(reader: Fetcher, root: Path) -> None:
    real, link = root / "swapped", root / "swapped.link"
    real.mkdir()
    (real / "secret").write_bytes(CLIP)
    link.symlink_to(root.parent / "outside")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            real.rename(root / "spare")
            link.rename(real)
            real.rename(link)
            (root / "spare").rename(real)

    swapper = threading.Thread(target=swap)
    swapper.start()
    seen = set()
    for _ in range(1000):
        with suppress(errors.FileNotFound, errors.FileNotAllowed):
            seen.add(content(reader, f"{real}/secret"))
    stop.set()
    swapper.join()
    assert seen == {CLIP}


def test_a_link_created_after_the_path_was_checked_is_refused(
    reader: Fetcher, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "out").symlink_to(root.parent / "outside")
    (root / "out.wav").symlink_to(root.parent / "outside" / "secret")
    monkeypatch.setattr(os.path, "realpath", str)
    assert failure(reader, f"{root}/out/secret").code == "file_not_found"
    assert failure(reader, f"{root}/out.wav").code == "file_not_found"
