"""What `status` tells of a run."""

from __future__ import annotations

import contextlib
import io
import re
from typing import TYPE_CHECKING

import pytest
import typer
from rich.console import Console

from db import changes, ledger, runs, worker_registry
from db.worker_registry import Pause
from earmark import progress
from earmark.api import Run
from earmark.cli.run import next_verbs
from earmark.core.clips import Failure, State
from earmark.core.errors import ClipError, Connect, FileNotFound, NotAudio, NotFound, ServiceError
from earmark.core.settings import Ledger, Settings
from tests.db.builders import chunk_of, submit
from tests.db.test_pace import going

if TYPE_CHECKING:
    import sqlalchemy as sa


def test_status_names_final_failures_and_what_waits_for_another_try(
    engine: sa.Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id, ids = submit(engine, 2)
    claim = ledger.claim(engine, chunk_of(engine, ids), worker="w", limits=Ledger())
    failures = [Failure(ids[0], NotFound(status=404)), Failure(ids[1], Connect(reason="no route"))]
    ledger.finish(engine, claim, failures, (), Ledger())
    progress.summarise(
        engine, runs.get_run(engine, run_id), runs.progress(engine, run_id), Settings()
    )
    shown = " ".join(capsys.readouterr().err.split())
    assert "1 not_found, such as: The server says there is nothing at this URL (HTTP 404)." in shown
    assert "1 connect, to be tried again, such as: The server cannot be reached: no route." in shown


def test_watching_shows_pace_and_advice_as_they_are(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(
        progress, "screen", Console(file=shown, force_terminal=True, color_system=None, width=200)
    )
    run_id = going(engine, seconds=20.0, fetch_ms=2500)
    progress.watch(engine, run_id, Settings(), meanwhile=lambda: changes.cancel(engine, run_id))
    assert re.search(r"\d clips/s, \d+ s of audio a second, \d+ s to go", shown.getvalue())
    assert "a clip spends 2500 ms downloading, " in shown.getvalue()
    assert "for downloads: raise EARMARK_WORKER__CLIPS_IN_FLIGHT" in shown.getvalue()


@pytest.mark.parametrize(
    ("done", "failed", "strict", "ends"),
    [(5, 0, 1, False), (5, 1, 0, False), (5, 1, 1, True), (0, 3, 0, True), (0, 0, 0, False)],
)
def test_a_run_without_any_success_exits_with_1(
    done: int, failed: int, strict: int, ends: bool
) -> None:
    states = {State.done: done, State.failed: failed}
    expected = pytest.raises(typer.Exit) if ends else contextlib.nullcontext()
    with expected:
        progress.exit_by_outcome(runs.Progress(states, 1.0, 1.0), strict=bool(strict))


@pytest.mark.parametrize(
    ("errors", "verbs"),
    [
        ([NotFound(status=404), NotAudio(kind="an HTML page")], ["failures"]),
        ([NotFound(status=404), FileNotFound()], ["failures", "retry"]),
        ([Connect(reason="no route")], ["failures", "retry"]),
    ],
)
def test_retry_is_offered_only_where_another_try_may_help(
    engine: sa.Engine, errors: list[ClipError], verbs: list[str]
) -> None:
    run_id, ids = submit(engine, len(errors))
    claim = ledger.claim(engine, chunk_of(engine, ids), worker="w", limits=Ledger())
    failures = [Failure(*each) for each in zip(ids, errors, strict=True)]
    ledger.finish(engine, claim, failures, (), Ledger(max_attempts=1))
    run = Run(engine, runs.get_run(engine, run_id), Settings())
    assert next_verbs(run, run.progress()) == [f"{each} {run.name}" for each in verbs]


def test_a_paused_run_is_an_error_of_the_service() -> None:
    states = {State.done: 5, State.failed: 0}
    with pytest.raises(ServiceError, match="is paused"):
        progress.exit_by_outcome(runs.Progress(states, 1.0, 1.0, "It is paused."), strict=False)


def test_what_holds_clips_up_is_told(engine: sa.Engine) -> None:
    run_id, ids = submit(engine, 2)
    assert progress.delays(engine, run_id) == []
    claim = ledger.claim(engine, chunk_of(engine, ids), worker="w", limits=Ledger())
    failures = [Failure(clip_id, Connect(reason="no route")) for clip_id in ids]
    ledger.finish(engine, claim, failures, (), Ledger(retry_base_s=2000, retry_cap_s=600))
    for number in range(5):
        worker_registry.beat(
            engine, f"w{number}", "clips", [], Pause("no network") if number else None
        )
    *paused, waiting = progress.delays(engine, run_id)
    assert paused[0] == "The worker w1 takes no chunks. no network"
    assert paused[3:] == ["Others that pause: 1 worker."]
    assert re.fullmatch(
        r"Waiting for another try: 2 clips, the next in (10 min 0 s|9 min \d+ s)\.", waiting
    )
