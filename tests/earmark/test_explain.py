"""`earmark explain`: one clip's journey, told step by step, without a secret."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest

from db import ledger, schema
from db.session import connect
from earmark import explain
from earmark.cli.inspect import _say
from earmark.core import clips as words
from earmark.core.options import RunOptions
from earmark.core.settings import Database, Settings
from earmark.demo import EXAMPLES
from tests.db.builders import add_clips
from tests.earmark.verbs import verb
from tests.end_to_end.conftest import Earmark

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_httpserver import HTTPServer

    from tests.faults.nursery import Nursery

pytestmark = pytest.mark.slow


def steps_of(uri: str, *, port: int | None = None, roots: tuple[Path, ...] = ()) -> str:
    """Explain one clip where a port of this machine may be dialled, if one is given."""
    allowed = {"allow_networks": ("127.0.0.1/32",), "ports": (port,)} if port else {}
    settings = Settings().changed(fetch={**allowed, "file_roots": roots})
    lines: list[str] = []
    explain.explain(
        uri, settings, RunOptions(window_s=5.0), lambda step, text: lines.append(f"{step}: {text}")
    )
    return "\n".join(lines)


def test_a_clip_behind_a_redirect_is_told_without_its_signatures(httpserver: HTTPServer) -> None:
    url = httpserver.url_for("/b.ogg")
    httpserver.expect_request("/a.ogg").respond_with_data(
        "", 302, headers={"Location": f"{url}?key=SECRET#SECRET"}
    )
    httpserver.expect_request("/b.ogg").respond_with_data(
        (EXAMPLES / "dog.ogg").read_bytes(), content_type="x/y"
    )
    steps = steps_of(httpserver.url_for("/a.ogg?signature=SECRET"), port=httpserver.port)
    assert "SECRET" not in steps
    assert (
        steps.index("answer: HTTP 302")
        < steps.index(f": Location: {url}\n")
        < steps.index("answer: HTTP 200")
    )
    assert "address: 127.0.0.1, may be dialled" in steps
    assert ": Content-Type: x/y" in steps
    assert f"fetched: {(EXAMPLES / 'dog.ogg').stat().st_size} bytes" in steps
    assert "first bytes: ogg" in steps
    assert "audio: ogg/vorbis, " in steps
    assert "scores: dog 0.9" in steps


def test_a_refused_address_is_seen_and_not_dialled(httpserver: HTTPServer) -> None:
    steps = steps_of(f"http://127.0.0.1/{httpserver.port}")
    assert "address: 127.0.0.1, refused" in steps
    assert "failed: at download, blocked_address" in steps
    assert httpserver.log == []


def test_a_missing_clip_says_what_the_server_said(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/busy").respond_with_data("", 503, headers={"Retry-After": "7"})
    steps = steps_of(httpserver.url_for("/busy"), port=httpserver.port)
    assert "answer: HTTP 503\n: Content-Type" in steps
    assert ": Retry-After: 7" in steps
    assert "server_error: The server failed (HTTP 503). (it would be tried again)" in steps


def test_a_file_is_told_window_by_window_and_that_a_cluster_would_not_read_it() -> None:
    steps = steps_of(str(EXAMPLES / "mixed.m4a"))
    assert "a worker of a cluster would not" in steps
    assert "window: 0.00 to 5.00 s: speech" in steps
    assert "file_not_allowed" in steps_of(
        str(EXAMPLES / "mixed.m4a"), roots=(EXAMPLES.parent / "cli",)
    )


def test_a_clip_of_the_ledger_is_explained_by_its_id(tmp_path: Path, nursery: Nursery) -> None:
    engine = connect(f"sqlite:///{tmp_path}/e.db", Database())
    schema.upgrade(engine)
    run_id = ledger.open_run(engine, None, RunOptions(top_k=1), queue="clips", chunk_size=16)
    add_clips(engine, run_id, [words.Clip(str(EXAMPLES / "siren.wav"))])
    engine.dispose()
    earmark = Earmark({}, tmp_path, nursery)
    shown = earmark("explain", "1", "--db", f"{tmp_path}/e.db").stdout
    assert "ledger       pending; tries: 0" in shown
    assert shown.splitlines()[-2].startswith("scores       siren 0.9")
    assert "," not in shown.splitlines()[-2]
    assert (
        "There is no clip 7" in earmark("explain", "7", "--db", f"{tmp_path}/e.db", status=2).stderr
    )


def test_a_clip_that_fails_is_exit_code_1() -> None:
    ended = verb("explain", str(EXAMPLES / "broken.wav"))
    assert ended.status == 1
    assert "not_audio" in ended.text


def test_a_closed_pipe_does_not_end_the_thread_of_a_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with suppress(BrokenPipeError), os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        explain.Steps(Settings(), _say).seen("fetched", 4, "ab", "RIFF")


def test_a_waveform_is_a_line_of_blocks() -> None:
    assert explain.sparkline(np.zeros(8000, np.float32)) == "▁" * explain.SPARKS
    ramp = explain.sparkline(np.linspace(0, 1, 8000, dtype=np.float32))
    assert (ramp[0], ramp[-1], list(ramp)) == ("▁", "█", sorted(ramp))


def test_a_server_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    _say("", "Server: \x1b[31mred")
    assert capsys.readouterr().out.strip() == "Server: ?[31mred"
