"""Ctrl-C ends a command cleanly, with one sentence on how to continue."""

from __future__ import annotations

import re
import shutil
import signal
import sqlite3
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from earmark.core.settings import cores
from earmark.demo import EXAMPLES
from tests.end_to_end.conftest import TIMEOUT_S, wait_until
from tests.servers import free_port

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from pytest_httpserver import HTTPServer

    from tests.end_to_end.conftest import Earmark

CLIPS = 80
#: Small, so that some clips are done long before the last one.
CHUNK = ("--chunk-size", "8")


def slow_list(earmark: Earmark, serve: Callable[..., str]) -> str:
    base = serve(EXAMPLES, delay_s=0.4)
    earmark.settings["EARMARK_FETCH__ALLOW_NETWORKS"] = "127.0.0.1/32"
    earmark.settings["EARMARK_FETCH__PORTS"] = base.rpartition(":")[2]
    (earmark.folder / "list.txt").write_text(
        "".join(f"{base}/dog.ogg?{number}\n" for number in range(CLIPS))
    )
    return "list.txt"


def interrupt_midway(
    earmark: Earmark, process: subprocess.Popen[str], how: signal.Signals = signal.SIGINT
) -> str:
    """Press Ctrl-C, or send another signal, when some clips are done; return the output."""
    wait_until(lambda: 0 < states(earmark).get("done", 0) < CLIPS)
    process.send_signal(how)
    assert process.wait(TIMEOUT_S) == 130
    return " ".join((earmark.folder / "earmark-0.log").read_text().split())


def states(earmark: Earmark) -> dict[str, Any]:
    with (
        suppress(sqlite3.Error),
        closing(sqlite3.connect(earmark.folder / "data" / "earmark.db")) as database,
    ):
        counts = database.execute(
            "SELECT pending, queued, running, done, failed FROM run_progress"
        ).fetchone()
        named = zip(("pending", "queued", "running", "done", "failed"), counts or (), strict=False)
        return {state: count for state, count in named if count}
    return {}


def test_a_folder_that_grows_is_watched_until_it_is_stopped(
    earmark: Earmark, httpserver: HTTPServer
) -> None:
    httpserver.expect_request("/hook").respond_with_data("")
    earmark.settings["EARMARK_FETCH__ALLOW_NETWORKS"] = "127.0.0.0/8,::1"
    earmark.settings["EARMARK_FETCH__PORTS"] = str(httpserver.port)
    earmark.settings["EARMARK_NOTIFY"] = httpserver.url_for("/hook")
    folder = earmark.folder / "recordings"
    folder.mkdir()
    process = earmark.start("earmark", "run", "recordings", "--watch")
    for done, name in enumerate(("dog.ogg", "siren.wav"), 1):
        shutil.copy(EXAMPLES / name, folder)
        wait_until(lambda done=done: states(earmark) == {"done": done})  # type: ignore[misc]
        wait_until(lambda done=done: len(httpserver.log) == done)  # type: ignore[misc]
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 130
    said = " ".join((earmark.folder / "earmark-0.log").read_text().split())
    assert "the same command with --name run-1 goes on where this stops." in said
    notices = [request.get_json() for request, _ in httpserver.log]
    assert [(notice["event"], notice["done"]) for notice in notices] == [
        ("finished", 1),
        ("finished", 2),
    ]
    assert earmark.left_running() == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_run_continues_under_its_name(
    earmark: Earmark, serve: Callable[..., str], how: signal.Signals
) -> None:
    words = ("earmark", "run", slow_list(earmark, serve), *CHUNK)
    said = interrupt_midway(earmark, earmark.start(*words), how)
    assert said == "Stopping; the same command with --name run-1 goes on where this stops."
    assert earmark.left_running() == []
    assert "running" not in states(earmark)
    earmark(*words[1:], "--name", "run-1")
    assert states(earmark) == {"done": CLIPS}
    assert len(list((earmark.folder / "data").glob("run-*"))) == 1, (
        "the second run left nothing behind"
    )


def test_up_divides_the_cores_reads_the_given_folders_and_ends_on_ctrl_c(
    earmark: Earmark,
) -> None:
    folder = earmark.folder / "two, words"
    folder.mkdir()
    shutil.copy(EXAMPLES / "dog.ogg", folder)
    nursery, earmark.nursery = earmark.nursery, None
    up = earmark.start(
        "earmark", "up", "--workers", "2", "--files", str(folder), "--flower-port", str(free_port())
    )  # fmt: skip
    earmark.nursery = nursery
    wait_until((earmark.folder / "data" / "broker.url").exists)
    workers = [child for child in psutil.Process(up.pid).children() if "worker" in child.cmdline()]
    assert [worker.environ()["EARMARK_MODEL__THREADS"] for worker in workers] == [
        str(max(1, cores() // 2))
    ] * 2
    earmark("submit", str(folder), "--watch", "--strict")
    failed = earmark("submit", str(EXAMPLES), "--watch", "--strict", status=1).stderr
    assert re.search(r"The results are in .*\nNext:\n.* failures run-2\n.* retry run-2\n", failed)
    assert "file_not_allowed" in earmark("failures", "run-2").stdout
    up.send_signal(signal.SIGINT)
    assert up.wait(TIMEOUT_S) == 0
    assert earmark.left_running() == []


def test_an_interrupted_submit_watch_prints_the_command_to_watch_again(
    earmark: Earmark, valkey_url: str, serve: Callable[..., str]
) -> None:
    earmark.settings["EARMARK_BROKER__URL"] = valkey_url
    words = ("earmark", "submit", slow_list(earmark, serve), *CHUNK, "--watch", "--name", "slow")
    watching = earmark.start(*words)
    wait_until(lambda: "pending" in states(earmark) or "queued" in states(earmark))
    earmark.start("earmark", "worker")
    assert "The run goes on; `earmark status slow --watch` shows it again." in interrupt_midway(
        earmark, watching
    )
    earmark("status", "slow", "--watch")
    assert states(earmark) == {"done": CLIPS}
