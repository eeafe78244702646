"""A run's progress, live on a terminal, and its summary at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import sqlalchemy as sa
import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from db import charts, results, runs, worker_registry
from db.pace import Pace, pace
from db.runs import RunRow
from earmark.advice import bottleneck
from earmark.core.clips import State
from earmark.core.errors import ServiceError
from earmark.core.settings import Settings
from earmark.terminal import count_of, in_words, interruptible, screen

#: Quick enough to look alive, slow enough to cost a million-row run nothing.
LOOK_S = 0.5
#: A pace that changes faster is hard to read.
LOOK_AT_PACE_S = 2.0
#: So many clips fit on one screen; of more, the labels are counted.
CLIPS_ON_SCREEN = 20
#: Of the failures, the most frequent kinds.
CODES_ON_SCREEN = 5
#: Of the workers that take no chunks, so many are named.
WORKERS_ON_SCREEN = 3
#: A clip's row shows so many of its labels.
LABELS_SHOWN = 3


class _Bar(Progress):
    """A progress bar with what is known of the pace below it."""

    stages = ""
    advice: str | None = None
    delays: Sequence[str] = ()

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.stages:
            yield f"  [dim]{self.stages}[/]"
        if self.advice:
            yield f"  [yellow]{self.advice}[/]"
        for delay in self.delays:
            yield f"  [yellow]{escape(delay)}[/]"


def watch(
    engine: sa.Engine,
    run_id: int,
    settings: Settings,
    *,
    meanwhile: Callable[[], object] = lambda: None,
    quiet: bool = False,
) -> runs.Progress:
    """Show a run's progress until every clip is final or it is paused; return the last one."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with _Bar(*columns, console=screen, transient=True, disable=quiet) as bar:
        task = bar.add_task("starting")
        looked = float("-inf")
        while True:
            state = runs.progress(engine, run_id)
            if time.monotonic() - looked > LOOK_AT_PACE_S:
                going = pace(engine, run_id, state)
                bar.delays = delays(engine, run_id)
                looked = time.monotonic()
            bar.stages = stages_in_words(going)
            bar.advice = bottleneck(going.workload, settings.worker)
            bar.update(
                task, total=state.total, completed=state.final, description=_doing(state, going)
            )
            if state.finished or state.paused:
                return state
            meanwhile()
            time.sleep(LOOK_S)


def follow(engine: sa.Engine, run: RunRow, settings: Settings) -> runs.Progress:
    """Watch a run that workers elsewhere do, until its end or Ctrl-C."""
    with interruptible(
        lambda: f"The run goes on; `earmark status {run.name} --watch` shows it again."
    ):
        return watch(engine, run.id, settings)


def rows(engine: sa.Engine, run: RunRow | None, settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield the counts and the pace of one run or of all, the newest first."""
    for row in runs.run_progress(engine, run.id if run else None):
        state = runs.progress(engine, row["run_id"])
        going = pace(engine, row["run_id"], state)
        yield {
            **row,
            "clips_per_s": going.clips_per_s,
            "audio_s_per_s": going.audio_s_per_s,
            "eta_s": going.eta_s,
            "bottleneck": bottleneck(going.workload, settings.worker),
            "fetch_ms": going.fetch_ms,
            "decode_ms": going.decode_ms,
            "classify_ms": going.classify_ms,
        }


def exit_by_outcome(state: runs.Progress, *, strict: bool) -> None:
    """End with 3 if the run is paused, with 1 if no clip succeeded or, if strict, one failed.

    Raises:
        ServiceError: the run is paused.
    """
    if state.paused:
        raise ServiceError(reason=state.paused)
    if state.states[State.failed] and (strict or not state.states[State.done]):
        raise typer.Exit(1)


def delays(engine: sa.Engine, run_id: int) -> list[str]:
    """Return what holds some clips of a run up: workers that pause, errors tried again later."""
    up = worker_registry.up(engine, runs.get_run(engine, run_id).queue)
    paused = [worker for worker in up if worker.pause]
    sentences = []
    for worker in paused[:WORKERS_ON_SCREEN]:
        assert worker.pause
        sentences.append(f"The worker {worker.name} takes no chunks. {worker.pause.reason}")
    if (others := len(paused) - WORKERS_ON_SCREEN) > 0:
        sentences.append(f"Others that pause: {count_of(others, 'worker')}.")
    clips, seconds = runs.waiting(engine, run_id)
    if clips:
        count = "at least " * (clips == runs.MOST_WAITING) + count_of(clips, "clip")
        sentences.append(f"Waiting for another try: {count}, the next in {in_words(seconds)}.")
    return sentences


def _doing(state: runs.Progress, going: Pace) -> str:
    if not state.final:
        return "listening" if state.states[State.running] else "loading the model"
    failed = f"[red]{state.states[State.failed]} failed[/]" if state.states[State.failed] else ""
    return ", ".join(filter(None, (pace_in_words(going), failed))) or "listening"


def pace_in_words(going: Pace) -> str:
    """Return how fast a run goes and how long it will take, as far as that is known."""
    if going.clips_per_s is None:
        return ""
    left = "" if going.eta_s is None else f", {in_words(going.eta_s)} to go"
    return f"{going.clips_per_s:.1f} clips/s, {going.audio_s_per_s:.0f} s of audio a second{left}"


def stages_in_words(going: Pace) -> str:
    """Return the time of a clip in each stage, waits included, as far as that is known."""
    if going.fetch_ms is None:
        return ""
    return (
        f"a clip spends {going.fetch_ms:.0f} ms downloading, {going.decode_ms:.0f} ms decoding,"
        f" {going.classify_ms:.0f} ms at the model"
    )


def show_results(engine: sa.Engine, run: RunRow, state: runs.Progress) -> None:
    """Print a small run clip by clip, of a large one how often each label came first."""
    make_table = _clip_table if state.total <= CLIPS_ON_SCREEN else _label_table
    Console(highlight=False).print(make_table(engine, run.id))


def _clip_table(engine: sa.Engine, run_id: int) -> Table:
    table = Table("clip", "what is heard", box=None, header_style="bold", padding=(0, 2, 0, 0))
    heard = groupby(results.top_k(engine, run_id), itemgetter("clip_id"))
    lines = {clip_id: _labels(list(predictions)) for clip_id, predictions in heard}
    for row in results.clips(engine, run_id):
        text = lines.get(row["clip_id"], "[dim]not heard[/]" if row["unheard"] else "")
        if row["error"]:
            text = f"[red]{row['error_code']}[/]: {escape(row['error'])}"
        table.add_row(escape(_short(row["member"] or row["uri"])), text)
    return table


def _labels(predictions: list[dict[str, Any]]) -> str:
    parts = []
    style = "bold green"
    for row in predictions[:LABELS_SHOWN]:
        parts.append(f"[{style}]{escape(row['label'])} {row['score']:.2f}[/]")
        style = "dim"
    return "  ".join(parts)


def _short(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2] or uri


def _label_table(engine: sa.Engine, run_id: int) -> Table:
    table = Table("label", "clips", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for label, clips in charts.label_counts(engine, run_id, CLIPS_ON_SCREEN):
        table.add_row(escape(label), str(clips))
    return table


def summarise(engine: sa.Engine, run: RunRow, state: runs.Progress, settings: Settings) -> None:
    """Print a run's counts, its pace and the reasons of its failures."""
    going = pace(engine, run.id, state)
    advice = bottleneck(going.workload, settings.worker)
    counts = "".join(f", {number} {name}" for name, number in state.states.items() if number)
    audio = f"{state.audio_s / 60:.1f} minutes of audio in {in_words(state.seconds)}."
    clips = count_of(state.total, "clip")
    screen.print(f"[bold]{escape(run.name)}[/]: {clips}{counts}. {audio}")
    for line in (pace_in_words(going), stages_in_words(going), advice):
        if line:
            screen.print(f"  {line}")
    if not state.finished:
        for delay in delays(engine, run.id):
            screen.print(f"  [yellow]{escape(delay)}[/]")
    if labels := ", ".join(run.options.then_label):
        count, score = charts.unheard(engine, run.id), run.options.then_min_score
        screen.print(f"  {count} not heard: none of these reached {score:g}: {escape(labels)}.")
    if state.paused:
        screen.print(f"  [red]{escape(state.paused)}[/]")
    _print_failures(engine, run)


def _print_failures(engine: sa.Engine, run: RunRow) -> None:
    failures = charts.top_errors(engine, run.id)
    for code, count, example in failures[:CODES_ON_SCREEN]:
        screen.print(f"  [red]{count} {code}[/], such as: {escape(example)}")
    if (others := len(failures) - CODES_ON_SCREEN) > 0:
        screen.print(f"  and {others} other kinds of failure: earmark failures {escape(run.name)}")
    hosts = [f"{escape(host)} ({failed})" for host, failed in charts.failing_hosts(engine, run.id)]
    if hosts:
        screen.print(f"  most failures: {', '.join(hosts)}")
    for code, count, example in charts.top_errors(engine, run.id, State.pending)[:CODES_ON_SCREEN]:
        screen.print(f"  [yellow]{count} {code}, to be tried again[/], such as: {escape(example)}")
