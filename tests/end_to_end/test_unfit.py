"""Workers that may not read the files: the run is not ruined, and whoever looks sees why."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from earmark.demo import EXAMPLES
from tests.end_to_end.conftest import get_json, scalar, wait_until
from tests.servers import answers, free_port

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import Earmark

CLIPS = 40
ROOTS = "EARMARK_FETCH__FILE_ROOTS"


def folder_of_clips(folder: Path) -> str:
    folder.mkdir()
    for number in range(CLIPS):
        shutil.copy(EXAMPLES / "dog.ogg", folder / f"{number}.ogg")
    return str(folder)


@pytest.mark.chaos
def test_an_unfit_worker_fails_no_clip_and_a_run_without_a_fit_one_pauses(
    cluster: Earmark, tmp_path: Path
) -> None:
    clips, port = folder_of_clips(tmp_path / "clips"), free_port()
    cluster.start("earmark", "flower", "--port", str(port))
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/healthcheck"))
    cluster.start("earmark", "worker", "--concurrency", "1")
    cluster.wait_for_workers(1)
    wait_until(lambda: scalar(cluster, "SELECT count(*) FROM workers") == 1)

    paused = cluster("submit", clips, "--name", "march", "--watch", status=3)
    assert "None of the 1 workers that are up may read" in paused.stderr
    sentence = paused.stderr.splitlines()[-1]
    assert sentence.startswith("earmark: The run march is paused: none of the 1 workers")
    assert "EARMARK_FETCH__FILE_ROOTS" in sentence
    assert "`earmark resume march`" in sentence
    assert scalar(cluster, "SELECT count(*) FROM clips WHERE state = 'failed'") == 0
    wait_until(lambda: bool(get_json(f"http://127.0.0.1:{port}/api/tasks?state=FAILURE")))
    failed = list(get_json(f"http://127.0.0.1:{port}/api/tasks?state=FAILURE").values())
    assert "file_not_allowed (32)" in failed[0]["exception"]
    assert failed[0]["args"].startswith("(march, 32 clips: ")

    cluster.settings[ROOTS] = clips
    cluster.start("earmark", "worker", "--concurrency", "2")
    cluster.wait_for_workers(2)
    cluster("resume", "march")
    wait_until(lambda: scalar(cluster, "SELECT done FROM run_progress") == CLIPS)
    shown = cluster("status", "march").stderr
    assert f"{CLIPS} clips, {CLIPS} done" in shown


def test_when_nothing_succeeds_run_exits_with_1_and_names_what_helps(
    earmark: Earmark,
) -> None:
    (earmark.folder / "notes.wav").write_text("this is no sound")
    ended = earmark("run", "notes.wav", "--name", "march", status=1)
    assert "earmark failures march" in ended.stderr
    # What is no sound stays so.
    assert "earmark retry march" not in ended.stderr
    assert "earmark results march" not in ended.stderr
    # The logs of a run that failed are kept, until the run is deleted.
    assert len(list((earmark.folder / "data").glob("run-*"))) == 1
    earmark("prune", "march", "--yes")
    assert not list((earmark.folder / "data").glob("run-*"))
    ended = earmark("run", "notes.wav", str(EXAMPLES / "dog.ogg"), "--name", "april")
    assert "earmark results april" in ended.stderr
