"""Tables are readable on 80 columns, whatever they hold."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from earmark import tables
from earmark.tables import RESULTS, STATUS

if TYPE_CHECKING:
    from collections.abc import Sequence

MILLIONS = {
    "run_id": 12, "run": "the-whole-archive-of-march-2026", "total": 10_000_000,
    "pending": 4_000_000,
    "queued": 1024, "running": 256, "done": 5_500_000, "failed": 498_720, "cancelled": 0,
    "audio_s": 27_500_000.5, "created_at": "2026-03-01 12:00:00", "clips_per_s": 61.239,
    "audio_s_per_s": 306.2, "eta_s": 65_322.1, "bottleneck": "The model waits. " * 9,
    "fetch_ms": 812.5, "decode_ms": 33.1, "classify_ms": 20.4,
    "paused": None,
}  # fmt: skip


def result(**values: Any) -> dict[str, Any]:
    return {
        "clip_id": 9_999_999, "run_id": 12, "run": "march", "uri": "https://h.org/a/b.wav",
        "start_s": None, "end_s": None, "channel": None, "member": None, "label": "siren",
        "score": 0.91, "meta": {"site": "north"}, "duration_s": 4.25, "codec": "vorbis",
        "finished_at": "2026-03-01 12:00:00", **values,
    }  # fmt: skip


def shown(rows: list[dict[str, Any]], columns: Sequence[str] = (), width: int = 80) -> list[str]:
    out = io.StringIO()
    tables.show(rows, Console(file=out, width=width), columns)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_run_of_ten_million_clips_has_a_line_of_its_own() -> None:
    head, line = shown([MILLIONS], STATUS)
    assert head.split()[:7] == ["run_id", "run", "total", "done", "failed", "eta_s", "clips_per_s"]
    assert line.split()[2:7] == ["10000000", "5500000", "498720", "65322.1", "61.2"]
    assert "…" in line.split()[1]
    assert len(head) <= 80


def test_what_has_no_room_is_left_out_from_the_right() -> None:
    head, line = shown([MILLIONS], STATUS, width=50)
    assert head.split() == ["run_id", "run", "total", "done"]
    assert len(line) <= 50
    assert len(shown([MILLIONS], STATUS, width=200)[0].split()) == len(STATUS) - 1


def test_a_paused_run_says_so() -> None:
    head, line = shown([{**MILLIONS, "paused": "none of the workers can do it. " * 9}], STATUS)
    assert head.split()[5] == "paused"
    assert "none …" in line
    assert len(line) <= 80


def test_an_address_is_shortened_in_the_middle_only_where_there_is_no_room() -> None:
    long = "https://archive.example.org/2026/05/01/site-north/recorder-7/20260501_040000.flac"
    line = shown([result(uri=long)], RESULTS)[1]
    assert len(line) <= 80
    uri = line.split()[1]
    assert uri.startswith("https://")
    assert uri.endswith("_040000.flac")
    assert long in shown([result(uri=long)], RESULTS, width=140)[1]


def test_folders_that_all_files_share_make_way_for_those_that_tell_them_apart() -> None:
    rows = [
        result(uri=f"/mnt/nas/projects/acoustic-monitoring/{site}/2026-05-01/040000.wav")
        for site in ("north", "south")
    ]
    lines = shown(rows, RESULTS)[1:]
    assert [line.split()[1] for line in lines] == [
        "…/north/2026-05-01/040000.wav",
        "…/south/2026-05-01/040000.wav",
    ]


@pytest.mark.parametrize("name", ["label", "error"])
def test_long_text_is_folded(name: str) -> None:
    text = "The server says there is nothing here, and says so at length. " * 2
    lines = shown([result(**{name: text})], RESULTS)
    assert max(map(len, lines)) <= 80
    assert len(lines) > 3
    assert "".join(lines).count("length") == 2


def test_a_row_of_a_query_that_is_too_wide_is_turned_on_its_side() -> None:
    lines = shown([result(uri="https://h.org/" + "x" * 90 + ".wav"), result(clip_id=2)])
    assert lines[0].split() == ["clip_id", "9999999"]
    assert max(map(len, lines)) <= 80
    assert any(line.split() == ["meta", '{"site":', '"north"}'] for line in lines)
    folded = "".join(lines).replace(" ", "")
    assert "x" * 90 + ".wav" in folded
    assert ["clip_id", "2"] in [line.split() for line in lines]


def test_words_from_outside_do_not_steer_the_terminal() -> None:
    (_, line) = shown([{"uri": "\x1b[2Jgone\rX", "n": 1}])
    assert "\x1b" not in line
    assert line.split() == ["[2Jgone", "X", "1"]


@pytest.mark.parametrize("columns", [(), RESULTS])
def test_no_rows_are_no_table(columns: tuple[str, ...]) -> None:
    assert shown([], columns) == []


def test_a_terminal_shows_the_first_thousand_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "TABLE_ROWS", 2)
    lines = shown([{"n": 1}, {"n": 2}, {"n": 3}])
    assert lines[1:] == ["1", "2", "The first 2 rows; --format csv gives all."]


def test_a_bar_is_exact_to_an_eighth_of_a_character() -> None:
    assert [tables.bar(share, 4) for share in (-1.0, 0.0, 0.25, 0.28, 0.99, 2.0)] == [
        "", "", "█", "█▏", "████", "████",
    ]  # fmt: skip
