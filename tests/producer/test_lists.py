"""Reading lists: every format, compression and place; a bad line is counted, the rest is read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from datetime import date
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import fsspec
import polars as pl
import pytest

from earmark.core.container_child import zstd
from earmark.core.errors import UsageError
from earmark.core.options import Listing
from earmark.core.settings import Fetch
from producer import lists
from producer.lists import MAX_LINE_CHARS
from producer.sources import read_clips
from producer.tally import Tally
from tests.servers import serving

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ROWS = [{"url": f"https://h.org/{n}.wav", "city": "Zürich", "n": n} for n in range(3)]
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".zst": lambda content: bytes(zstd().compress(content)),
}


def table(delimiter: str) -> bytes:
    lines = [ROWS[0].keys(), *(map(str, row.values()) for row in ROWS)]
    return "\n".join(delimiter.join(line) for line in lines).encode()


def as_parquet() -> bytes:
    from io import BytesIO

    file = BytesIO()
    pl.DataFrame(ROWS).write_parquet(file)
    return file.getvalue()


CONTENTS = {
    "txt": lambda: "\n".join(str(row["url"]) for row in ROWS).encode(),
    "csv": lambda: table(","),
    "tsv": lambda: table("\t"),
    "jsonl": lambda: "\n".join(json.dumps(row) for row in ROWS).encode(),
    "parquet": as_parquet,
}


def read(
    source: object, fetch: Fetch | None = None, **options: Any
) -> tuple[list[tuple[str, dict[str, Any]]], Tally]:
    tally = Tally()
    clips = [
        (clip.uri, dict(clip.meta))
        for clip in read_clips([str(source)], Listing(**options), tally, fetch)
    ]
    counted = tally.clips + tally.blank + tally.refused + tally.extra + tally.not_audio
    assert counted == tally.lines
    assert tally.clips == len(clips)
    return clips, tally


def meta(format_: str, n: int) -> dict[str, Any]:
    numbers = format_ in ("jsonl", "parquet")
    return {} if format_ == "txt" else {"city": "Zürich", "n": n if numbers else str(n)}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("format_", CONTENTS)
@pytest.mark.parametrize("named", [True, False])
def test_every_format_and_compression_is_recognised_by_name_or_content(
    tmp_path: Path, format_: str, compression: str, named: bool
) -> None:
    path = tmp_path / (f"list.{format_}{compression}" if named else "unnamed")
    path.write_bytes(COMPRESSIONS[compression](CONTENTS[format_]()))
    clips, _ = read(path)
    assert clips == [(row["url"], meta(format_, n)) for n, row in enumerate(ROWS)]


@pytest.mark.parametrize("format_", CONTENTS)
def test_a_remote_list_is_read_through_fsspec(format_: str) -> None:
    place = f"memory://bucket/lists/list.{format_}"
    with fsspec.open(place, "wb", compression="gzip") as file:
        file.write(CONTENTS[format_]())
    assert [uri for uri, _ in read(place)[0]] == [row["url"] for row in ROWS]
    assert len(read(f"memory://bucket/lists/*.{format_}")[0]) == 3


def test_relative_lines_of_a_list_on_a_web_server_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a/b.wav\nhttps://h.org/c.wav\n")
    with serving(tmp_path) as url:
        fetch = Fetch(allow_networks="127.0.0.0/8", ports=(urlsplit(url).port or 0,))
        clips, _ = read(f"{url}/list.txt?token=secret", fetch)
    assert [uri for uri, _ in clips] == [f"{url}/a/b.wav", "https://h.org/c.wav"]


def test_a_url_without_a_list_suffix_is_a_clip_unless_a_format_is_given() -> None:
    assert read("https://h.org/list.wav")[0] == [("https://h.org/list.wav", {})]
    with pytest.raises(
        UsageError, match="memory://nowhere/list cannot be read: there is no such file"
    ):
        read("memory://nowhere/list", input_format="txt")
    with pytest.raises(UsageError, match="No file matches"):
        read("memory://nowhere/*.txt")


@pytest.mark.parametrize(
    ("content", "uris", "refused"),
    [
        pytest.param(
            b"\xef\xbb\xbfurl,n\r\nhttps://h/a,1\r\n",
            ["https://h/a"],
            {},
            id="byte order mark and CRLF",
        ),
        pytest.param("url,n\nhttps://h/ä,1\n".encode("utf-16"), ["https://h/ä"], {}, id="UTF-16"),
        pytest.param(
            b"url\nhttps://h/\xe4\nhttps://h/b\n",
            ["https://h/b"],
            {2: "not UTF-8: say its --encoding"},
            id="encodings",
        ),
        pytest.param(b"url\nhttps://h/\0a\n", ["https://h/\\x00a"], {}, id="NUL"),
        pytest.param(
            b'url,t\nhttps://h/a,"x\ny"\nhttps://h/b,\n',
            ["https://h/a", "https://h/b"],
            {},
            id="newlines",
        ),
        pytest.param(
            b"t,url\n1,https://h/a\n2\n3,https://h/b\n",
            ["https://h/a", "https://h/b"],
            {3: "1 cells"},
            id="cell",
        ),
        pytest.param(b"url\n\n\nhttps://h/a\n", ["https://h/a"], {}, id="empty lines"),
        pytest.param(
            b'url,t\nhttps://h/a,1\nhttps://h/b,"2\nhttps://h/c,3\nhttps://h/d,4\n',
            ["https://h/a", "https://h/c", "https://h/d"],
            {3: "never closed"},
            id="a quote that is never closed",
        ),
        pytest.param(
            b"url,t\nhttps://h/a," + b"x" * (MAX_LINE_CHARS * 2) + b"\nhttps://h/b,\n",
            ["https://h/b"],
            {2: "longer than 1048576 characters"},
            id="a long line",
        ),
        pytest.param(
            b"url\nhttps://h/" + b"x" * 9000 + b"\nhttps://h/b\n",
            ["https://h/b"],
            {2: "9010"},
            id="a long URL",
        ),
        pytest.param(
            b"url\nhttps://h/a b.wav\nhttp://[::1\n",
            ["https://h/a b.wav", "http://[::1"],
            {},
            id="odd URLs",
        ),
    ],
)
def test_each_line_of_a_table_is_read_or_refused_by_its_number(
    tmp_path: Path, content: bytes, uris: list[str], refused: dict[int, str]
) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    clips, tally = read(tmp_path / "list.csv")
    assert [uri for uri, _ in clips] == uris
    assert [example.line for example in tally.examples] == list(refused)
    assert all(
        reason in example.reason
        for example, reason in zip(tally.examples, refused.values(), strict=True)
    )
    if not content.startswith(b"\xff"):
        assert tally.lines == content.count(b"\n")


def test_a_line_without_json_or_url_is_refused(tmp_path: Path) -> None:
    lines = [
        '{"url": "https://h/a", "n": [1, {"b": NaN}]}',
        "{",
        '{"url": 7}',
        '"https://h/b"',
        "",
        "[" * 100_000,
    ]
    (tmp_path / "list.jsonl").write_text("\n".join([*lines, '{"url": "https://h/c"}']))
    clips, tally = read(tmp_path / "list.jsonl")
    assert [uri for uri, _ in clips] == ["https://h/a", "https://h/b", "https://h/c"]
    assert [example.line for example in tally.examples] == [2, 3, 6]
    assert (tally.lines, tally.blank) == (7, 1)


def test_a_parquet_row_without_a_url_is_refused_and_any_type_becomes_meta(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "url": ["https://h/a", None, "https://h/c"],
            "day": [date(2026, 1, day) for day in (1, 2, 3)],
        }
    )
    frame.write_parquet(tmp_path / "list.parquet")
    clips, tally = read(tmp_path / "list.parquet")
    assert clips == [
        ("https://h/a", {"day": date(2026, 1, 1)}),
        ("https://h/c", {"day": date(2026, 1, 3)}),
    ]
    assert [(example.line, example.reason) for example in tally.examples] == [
        (2, "there is no text in 'url'")
    ]


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("format_", ["txt", "csv", "jsonl", "json"])
def test_a_truncated_compressed_list_gives_its_complete_lines(
    tmp_path: Path, format_: str, compression: str
) -> None:
    urls = [f"https://h.org/{os.urandom(40).hex()}" for _ in range(25_000)]
    lines = [json.dumps(url) for url in urls] if format_ == "jsonl" else urls
    content = "\n".join(["url", *lines] if format_ == "csv" else lines).encode()
    if format_ == "json":
        content = json.dumps(urls).encode()
    whole = COMPRESSIONS[compression](content)
    (tmp_path / f"list.{format_}{compression}").write_bytes(whole[: len(whole) * 3 // 4])
    clips, tally = read(tmp_path / f"list.{format_}{compression}")
    assert [uri for uri, _ in clips] == urls[: len(clips)]
    assert len(clips) > len(urls) // 4
    (example,) = tally.examples
    assert "breaks off here" in example.reason
    assert example.line == tally.lines


@pytest.mark.parametrize("damage", [slice(0, 2000), slice(2000, None)])
def test_a_damaged_parquet_is_refused_without_a_traceback(tmp_path: Path, damage: slice) -> None:
    pl.DataFrame({"url": [f"https://h/{n}" for n in range(5000)]}).write_parquet(
        tmp_path / "list.parquet"
    )
    (tmp_path / "list.parquet").write_bytes((tmp_path / "list.parquet").read_bytes()[damage])
    _, tally = read(tmp_path / "list.parquet", input_format="parquet")
    assert "breaks off here" in tally.examples[0].reason


def test_a_list_that_only_begins_like_gzip_is_refused_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "list.csv.gz").write_bytes(b"\x1f\x8b\x08" + bytes(7) + b"no gzip" * 20)
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "list.csv.gz")


def test_a_parquet_damaged_in_the_middle_gives_the_rows_before_the_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "PARQUET_ROWS_AT_ONCE", 500)
    urls = [f"https://h/{os.urandom(30).hex()}" for _ in range(4000)]
    file = tmp_path / "list.parquet"
    pl.DataFrame({"url": urls}).write_parquet(file, row_group_size=1000)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 5 // 8] + bytes(200) + whole[len(whole) * 5 // 8 + 200 :])
    clips, tally = read(file)
    assert [uri for uri, _ in clips] == urls[:2000]
    assert (tally.lines, tally.refused, tally.examples[0].line) == (2001, 1, 2001)


def test_home_and_relative_paths_are_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b c.wav").touch()
    (tmp_path / "list.txt").write_text("~/a.wav\nsub/b c.wav\n/x/d.wav\ngone.wav\n")
    assert [uri for uri, _ in read(tmp_path / "list.txt")[0]] == [
        "/home/me/a.wav",
        f"{tmp_path}/sub/b c.wav",
        "/x/d.wav",
        f"{tmp_path}/gone.wav",
    ]
