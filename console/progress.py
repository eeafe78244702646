"""A run's progress, live on a terminal, and what it came to at the end."""

from __future__ import annotations

import time
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from db import results

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import sqlalchemy as sa

    from db.results import RunRow

#: Quick enough to look alive, slow enough to cost a million-row run nothing.
LOOK_S = 0.5
#: So many clips fit on one screen; of more, the labels are counted.
CLIPS_ON_SCREEN = 20
#: A clip's row shows so many of its labels.
LABELS_SHOWN = 3

screen = Console(stderr=True, highlight=False)


def watch(engine: sa.Engine, run_id: int, *, meanwhile: Callable[[], None] = lambda: None) -> results.Progress:
    """Show a run's progress until every clip is final; return what it came to."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=screen, transient=True) as bar:
        task = bar.add_task("starting")
        while True:
            state = results.progress(engine, run_id)
            bar.update(task, total=state.total, completed=state.final, description=_doing(state))
            if state.finished:
                return state
            meanwhile()
            time.sleep(LOOK_S)


def follow(engine: sa.Engine, run: str | None, *, strict: bool = False) -> None:
    """Show a run that is worked on elsewhere until its end, and then what it came to."""
    found = results.find_run(engine, run)
    with interruptible(lambda: f"The run goes on; `earmark status {found.name} --watch` shows it again."):
        state = watch(engine, found.id)
    summarise(engine, found, state)
    exit_if_strict(state, strict=strict)


def exit_if_strict(state: results.Progress, *, strict: bool) -> None:
    if strict and state.states["failed"]:
        raise typer.Exit(1)


@contextmanager
def interruptible(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Answer Ctrl-C with a sentence, then let it end what has to be ended."""
    try:
        yield
    except KeyboardInterrupt:
        screen.print(how_to_go_on(), markup=False, soft_wrap=True)
        raise


def _doing(state: results.Progress) -> str:
    if not state.final:
        return "listening" if state.states["running"] else "loading the model"
    failed = f", [red]{state.states['failed']} failed[/]" if state.states["failed"] else ""
    return f"{state.final / max(state.seconds, 0.1):.1f} clips/s{failed}"


def show_results(engine: sa.Engine, run: RunRow, state: results.Progress) -> None:
    """Print a small run clip by clip, of a large one how often each label came first."""
    table = _clip_table(engine, run.id) if state.total <= CLIPS_ON_SCREEN else _label_table(engine, run.id)
    Console(highlight=False).print(table)


def _clip_table(engine: sa.Engine, run_id: int) -> Table:
    table = Table("clip", "what is heard", box=None, header_style="bold", padding=(0, 2, 0, 0))
    heard = groupby(results.rows(engine, results.top_k(run_id)), itemgetter("clip_id"))
    lines = {clip_id: _labels(list(predictions)) for clip_id, predictions in heard}
    for row in results.rows(engine, results.clips(run_id)):
        text = f"[red]{row['error_code']}[/]: {escape(row['error'])}" if row["error"] else lines.get(row["clip_id"], "")
        table.add_row(escape(_short(row["uri"])), text)
    return table


def _labels(predictions: list[dict[str, Any]]) -> str:
    best, *others = [f"{escape(row['label'])} {row['score']:.2f}" for row in predictions[:LABELS_SHOWN]]
    return "  ".join([f"[bold green]{best}[/]", *(f"[dim]{other}[/]" for other in others)])


def _short(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2] or uri


def _label_table(engine: sa.Engine, run_id: int) -> Table:
    table = Table("label", "clips", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for label, clips in results.label_counts(engine, run_id, CLIPS_ON_SCREEN):
        table.add_row(escape(label), str(clips))
    return table


def summarise(engine: sa.Engine, run: RunRow, state: results.Progress) -> None:
    """Print what a run came to: counts, rate and the reasons of its failures."""
    counts = ", ".join(f"{state.states[name]} {name}" for name in ("done", "failed", "cancelled") if state.states[name])
    screen.print(
        f"[bold]{escape(run.name)}[/]: {state.total} clips, {counts}. {state.audio_s / 60:.1f} minutes of audio in "
        f"{state.seconds:.0f} s, {state.final / max(state.seconds, 0.1):.1f} clips/s."
    )
    for code, count, example in results.top_errors(engine, run.id):
        screen.print(f"  [red]{count} {code}[/], such as: {escape(example)}")
    for code, count, example in results.top_errors(engine, run.id, "pending"):
        screen.print(f"  [yellow]{count} {code}, to be tried again[/], such as: {escape(example)}")
