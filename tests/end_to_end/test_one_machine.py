"""`earmark demo` and `earmark run`: one command, everything on this machine."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sqlite3
import subprocess
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
import soxr

from earmark.demo import EXAMPLES
from tests import containers
from tests.servers import readable_binaries, serving

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Earmark

GOOD = (
    "dog.ogg",
    "siren.wav",
    "piano.flac",
    "music.mp3",
    "speech.wav",
    "rain.ogg",
    "silence.wav",
    "mixed.m4a",
)


HEARD_IN = ("dog.ogg", "siren.wav")


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """A folder tree of 200 files: good ones, a web page, an empty, a truncated and a text file.

    The good ones lie elsewhere, behind a link to their folder or links to themselves.
    """
    folder = tmp_path / "recordings" / "deep"
    nas, blobs = tmp_path / "nas", tmp_path / "blobs"
    for new in (folder.parent, nas, blobs):
        new.mkdir()
    folder.symlink_to("../nas")
    for number in range(196):
        name = GOOD[number % len(GOOD)]
        shutil.copy(EXAMPLES / name, blobs / f"{number}")
        if number % 2:
            shutil.move(blobs / f"{number}", folder / f"{number:03d}-{name}")
        else:
            (folder / f"{number:03d}-{name}").symlink_to(blobs / f"{number}")
    shutil.copy(EXAMPLES / "broken.wav", folder.parent / "page.wav")
    (folder.parent / "empty.wav").touch()
    (folder.parent / "half.flac").write_bytes((EXAMPLES / "piano.flac").read_bytes()[:30])
    (folder.parent / "notes.txt").write_text("not a sound")
    return folder.parent


def test_the_demo_prints_labels_and_errors_and_leaves_no_process(
    earmark: Earmark,
) -> None:
    shown = earmark("demo", "--report", "demo.html")
    best = {
        line.split()[0]: line.split()[1] for line in shown.stdout.splitlines() if "." in line[:14]
    }
    assert best["dog.ogg"] == "dog"
    assert best["siren.wav"] == "siren"
    assert best["piano.flac"] == "piano"
    assert best["broken.wav"] == "not_audio:"
    assert best["missing.wav"] == "not_found:"
    assert " results run-1\n" in shown.stderr
    assert "demo.html shows the clips and plays them." in shown.stderr
    report = (earmark.folder / "demo.html").read_text()
    assert report.count("<article") == 8
    assert "Heard: speech from 0.0 to 10.0 s, siren from 10.0 to 17.0 s" in report
    assert earmark.left_running() == []


def test_a_folder_of_200_files_gives_a_final_row_for_each_sound_file_in_sqlite(
    earmark: Earmark, recordings: Path
) -> None:
    ended = earmark("run", str(recordings), "--db", "sqlite:///x.db", "--name", "mixed")
    assert "Of 200 lines or files: 199 new, 1 not audio." in ended.stderr
    with closing(sqlite3.connect(earmark.folder / "x.db")) as database:
        counts = dict(database.execute("select label, count(*) from results group by 1").fetchall())
        codes = dict(database.execute("select uri, error_code from failures").fetchall())
        states = dict(database.execute("select state, count(*) from clips group by 1").fetchall())
        (reused,) = database.execute("select count(*) from results where reused").fetchone()
    assert states == {"done": 196, "failed": 3}
    assert reused > 180
    assert counts["dog"] == 25
    assert counts["piano"] == 25
    assert {Path(uri).name: code for uri, code in codes.items()} == {
        "page.wav": "not_audio", "empty.wav": "empty", "half.flac": "corrupt",
    }  # fmt: skip


def test_the_members_of_containers_are_heard(earmark: Earmark) -> None:
    sounds = {f"{name[:-4]}/{name}": (EXAMPLES / name).read_bytes() for name in HEARD_IN}
    names = ("shard.tar", "shard.tar.gz", "shard.zip", "train.parquet")
    for name in names:
        containers.write(earmark.folder / name, sounds)
    earmark("run", *names, "--db", "sqlite:///x.db")
    with closing(sqlite3.connect(earmark.folder / "x.db")) as database:
        heard = database.execute("select uri, member, label from results").fetchall()
    assert set(heard) == {
        (str(earmark.folder / name), member, member.partition("/")[0])
        for name in names
        for member in sounds
    }


@pytest.fixture
def channels(tmp_path: Path) -> Path:
    """A dog on the left and a siren on the right; a dog against itself; a dog alone."""
    folder = tmp_path / "channels"
    folder.mkdir()
    sounds = []
    for name in HEARD_IN:
        samples, rate = soundfile.read(EXAMPLES / name, frames=160_000, always_2d=True)
        sounds.append(soxr.resample(samples[:, 0], rate, 16_000)[: 4 * 16_000])
    dog, siren = sounds
    for name, mixed in (("both", (dog, siren)), ("against", (dog, -dog)), ("mono", (dog,))):
        soundfile.write(folder / f"{name}.wav", np.stack(mixed, axis=1), 16_000)
    return folder


def test_each_channel_is_heard_and_shown(earmark: Earmark, channels: Path) -> None:
    options = ("--db", "sqlite:///x.db", "--window-s", "2")
    earmark("run", str(channels), *options, "--name", "each", "--channels", "each")
    earmark("run", str(channels), *options, "--name", "mix")
    earmark("export", "each", *options[:2], "--labels", "audacity", "-o", "labels")
    with closing(sqlite3.connect(earmark.folder / "x.db")) as database:
        reused = database.execute("select count(*) from results where reused").fetchone()
        heard: dict[tuple[str, str, str], set[Any]] = defaultdict(set)
        for view in ("results", "top_k", "windows", "events"):
            rank = "where rank = 1" if view in ("top_k", "windows") else ""
            rows = database.execute(f"select run, uri, channel, label from {view} {rank}")
            for run, uri, channel, label in rows:
                heard[view, run, Path(uri).stem].add((channel, label))
        marks = database.execute("select uri, run from results where cancelling").fetchall()
        silent = database.execute("select count(*) from results where silent").fetchone()
    assert reused == silent == (0,)
    both = {(1, "dog"), (2, "siren")}
    for view in ("windows", "events"):
        assert heard[view, "each", "both"] == both
        assert heard[view, "each", "mono"] == {(1, "dog")}
        assert heard[view, "mix", "against"] == {(1, "dog"), (2, "dog")}
    for view in ("results", "top_k"):
        assert heard[view, "each", "both"] < both
        assert len(heard[view, "each", "both"]) == 1
        assert heard[view, "mix", "against"] == {(1, "dog")}
        assert heard[view, "mix", "mono"] == {(None, "dog")}
    assert sorted(Path(uri).name + run for uri, run in marks) == [
        "against.waveach",
        "against.wavmix",
    ]
    labels = "".join(file.read_text() for file in (earmark.folder / "labels").iterdir())
    assert re.search(r"0.000\t2.000\tsiren 0.\d\d channel 2\n", labels)
    other = earmark.ended("run", str(channels), *options, "--name", "each")
    assert "exists with another channels" in other.stderr
    explained = earmark.ended("explain", str(channels / "both.wav"), "--channels", "3")
    assert "2 channel(s), so no channel 3 (--channels)" in explained.stdout


def test_the_same_folder_is_written_to_postgresql_and_read_with_psql(
    earmark: Earmark, recordings: Path, postgres_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    earmark("run", str(recordings), "--db", postgres_url)
    psql = readable_binaries(tmp_path_factory.mktemp("binaries")) / "psql"
    query = "select label, count(*) from results group by 1 order by 1"
    shown = subprocess.check_output([psql, postgres_url, "-Atc", query], text=True)
    assert "dog|25\n" in shown
    assert sum(int(line.partition("|")[2]) for line in shown.splitlines()) == 196


def test_a_list_keeps_its_columns_and_a_second_submission_adds_only_new_clips(
    earmark: Earmark,
) -> None:
    rows = [
        ("dog.ogg", "Rome"),
        ("siren.wav", "Oslo"),
        ("dog.ogg", "twice"),
        ("", "blank"),
        ("nonsense://a", "Rome"),
    ]
    for name in ("dog.ogg", "siren.wav"):
        shutil.copy(EXAMPLES / name, earmark.folder)
    with (earmark.folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("link", "city"), *rows])
    words = ("run", "list.csv", "--url-col", "link", "--name", "mine", "--top_k", "2")
    first = earmark(*words)
    assert "6 lines or files: 3 new, 1 known already, 1 refused" in first.stderr
    query = "SELECT uri, label, json_extract(meta, '$.city') AS city FROM results ORDER BY uri"
    found = [
        json.loads(line)
        for line in earmark("query", query, "--format", "jsonl").stdout.splitlines()
    ]
    assert [(Path(row["uri"]).name, row["label"], row["city"]) for row in found] == [
        ("dog.ogg", "dog", "Rome"), ("siren.wav", "siren", "Oslo"),
    ]  # fmt: skip
    assert "bad_url" in earmark("failures", "mine").stdout
    second = earmark(*words)
    assert "0 new, 4 known already, 1 refused" in second.stderr
    assert len(earmark("results", "mine", "--format", "csv").stdout.splitlines()) == 3


def test_an_unavailable_model_is_one_sentence(earmark: Earmark) -> None:
    refused = earmark("run", str(EXAMPLES / "dog.ogg"), "--model", "./no-such-model", status=3)
    assert "no-such-model" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert earmark.left_running() == []


def test_results_are_printed_in_every_format(earmark: Earmark) -> None:
    ended = earmark(
        "run",
        str(EXAMPLES / "dog.ogg"),
        str(EXAMPLES / "mixed.m4a"),
        "--window-s",
        "5",
        "--name",
        "two",
    )
    assert re.search(r"The results are in /.*\.db\.\nNext:\n  .*earmark", ended.stderr)
    windows = earmark("results", "two", "--windows", "--format", "jsonl").stdout.splitlines()
    assert [json.loads(line)["label"] for line in windows][1::3] == ["speech", "siren"]
    earmark("results", "two", "--format", "parquet", "-o", "two.parquet")
    import polars

    assert polars.read_parquet(earmark.folder / "two.parquet")["label"].to_list()[0] == "dog"
    assert earmark("results", "two", "--label", "dog").stdout.count("\n") == 2
    assert "dog" in earmark("labels", "starter").stdout.splitlines()
    assert '"done":' not in earmark("status", "--format", "csv").stdout
    assert json.loads(earmark("status", "two", "--format", "jsonl").stdout)["done"] == 2


def test_reuse_urls_downloads_nothing_and_strict_exits_with_1_on_failures(
    earmark: Earmark,
) -> None:
    with serving(EXAMPLES) as base:
        earmark.settings |= {
            "EARMARK_FETCH__ALLOW_NETWORKS": "127.0.0.1/32",
            "EARMARK_FETCH__PORTS": base.rpartition(":")[2],
            "EARMARK_LEDGER__MAX_ATTEMPTS": "1",
        }
        urls = [f"{base}/{name}" for name in ("dog.ogg", "mixed.m4a")]
        earmark("run", *urls, "--window-s", "5")
    earmark("run", *urls, "--window-s", "5", "--reuse-urls", "--strict", "--name", "again")
    again = [
        json.loads(line)
        for line in earmark("results", "again", "--format", "jsonl").stdout.splitlines()
    ]
    assert [(row["label"], row["reused"]) for row in again] == [("dog", 1), ("siren", 1)]
    assert len(earmark("results", "again", "--windows").stdout.splitlines()) == 1 + 1 + 4
    earmark(
        "run", *urls, "--window-s", "4", "--reuse-urls", "--strict", "--name", "other", status=1
    )
