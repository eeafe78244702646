"""The verbs that get clips classified."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from db import charts, urls
from db.runs import Progress
from earmark import progress, terminal
from earmark.cli import options as o
from earmark.core.clips import State
from earmark.core.errors import BY_CODE, Cause, ClipError
from earmark.core.options import split
from earmark.core.settings import Settings
from earmark.database import read_settings
from earmark.output import EXAMPLE_QUERY

if TYPE_CHECKING:
    from earmark.run_object import Run

commands = typer.Typer()


@o.verb(commands, "earmark run recordings/ --db labels.db --top-k 3", o.SUBMISSION)
def run(
    given: dict[str, Any],
    workers: o.Workers = 1,
    watch: Annotated[
        bool, Option("--watch", help="Take new files of the folders as they come, until Ctrl-C.")
    ] = False,
    notify: o.Notify = None,
    db: o.Db = None,
) -> None:
    """Classify everything on this machine: embedded Valkey, worker, progress, results."""
    from earmark.run_here import run_here

    settings, sources = read_settings(db), given.pop("sources")
    options, submission = split(given)
    finished = run_here(
        sources, settings, options, workers=workers, watch=watch, notify=notify, **submission
    )
    _show(finished, settings, db, strict=given["strict"])


@o.verb(commands, "earmark submit urls.csv --url-col link --name march --watch", o.SUBMISSION)
def submit(given: dict[str, Any], watch: o.Watch = False, db: o.Db = None) -> None:
    """Put lists into the database and the queue; print the run's id."""
    from earmark import api

    settings = read_settings(db)
    name = "the --name that `earmark status` shows"
    if given["name"]:
        name = f"--name {given['name']}"
    with terminal.interruptible(
        lambda: f"Not all is submitted; the same command with {name} goes on."
    ):
        run = api.submit(settings=settings, tell=terminal.tell, **given)
    terminal.tell_all(run.report())
    for each in run.together:
        sys.stdout.write(f"{each.id}\n")
    if watch:
        states = []
        for each in run.together:
            states.append(progress.follow(run.engine, each.row, settings))
            progress.summarise(run.engine, each.row, states[-1], settings)
        _end(run, states, db, strict=given["strict"])


@o.verb(commands, "EARMARK_BROKER__URL=redis://redis:6379 earmark worker --device cuda:0")
def worker(
    concurrency: Annotated[int | None, Option(min=1, help="Chunks in progress at once.")] = None,
    device: Annotated[str | None, Option(help="auto, cpu, cuda, cuda:1 or mps.")] = None,
    model: Annotated[str | None, Option(help="The model to load at the start.")] = None,
    log_json: Annotated[bool | None, Option("--log-json", help="Log a JSON object a line.")] = None,
) -> None:
    """Run one worker process for one device."""
    from earmark.worker import work

    work(concurrency=concurrency, device=device, model=model, log_json=log_json)


@o.verb(commands, "earmark up --workers 2 --files recordings/")
def up(
    workers: o.Workers = 1,
    files: Annotated[
        list[Path] | None,
        Option(
            exists=True,
            file_okay=False,
            help="A folder whose files may be submitted; say it again for more.",
        ),
    ] = None,
    flower_port: o.FlowerPort = 5555,
    db: o.Db = None,
) -> None:
    """Keep an embedded Valkey, workers and Flower running until Ctrl-C."""
    from earmark.up import up as keep_running

    keep_running(read_settings(db), workers=workers, files=files or [], flower_port=flower_port)


@o.verb(commands, "earmark flower --port 5555")
def flower(
    port: o.FlowerPort = 5555,
    address: Annotated[str, Option(help="Any but loopback needs a password.")] = "127.0.0.1",
    basic_auth: Annotated[
        str | None, Option(envvar="FLOWER_BASIC_AUTH", help="USER:PASSWORD.")
    ] = None,
    keep: Annotated[
        Path | None, Option(help="Keep the history in this file, over restarts.")
    ] = None,
) -> None:
    """Watch workers and chunks in the browser."""
    from earmark.flower import serve

    serve(port=port, address=address, basic_auth=basic_auth, keep=keep)


@o.verb(commands, "earmark demo --report demo.html")
def demo(
    report: Annotated[Path | None, Option(help="Also write the run's page to this file.")] = None,
    db: o.Db = None,
) -> None:
    """Classify the bundled example clips, two of them broken on purpose."""
    from earmark.demo import demo as classify_examples

    settings = read_settings(db)
    _show(classify_examples(settings, report), settings, db, and_then="run YOUR_FOLDER")
    if report:
        terminal.tell(f"{report} shows the clips and plays them.")


def _show(
    run: Run,
    settings: Settings,
    db: str | None,
    *,
    strict: bool = False,
    and_then: str | None = None,
) -> None:
    terminal.tell_all(run.report())
    states = []
    for each in run.together:
        states.append(each.progress())
        progress.show_results(run.engine, each.row, states[-1])
        progress.summarise(run.engine, each.row, states[-1], settings)
    _end(run, states, db, strict=strict, and_then=and_then)


def _end(
    run: Run, states: list[Progress], db: str | None, *, strict: bool, and_then: str | None = None
) -> None:
    """Say where the results are and what one may do next; exit by the outcome."""
    verbs = []
    for each, state in zip(run.together, states, strict=True):
        verbs += next_verbs(each, state)
    if and_then:
        verbs.append(and_then)
    where = f" --db {shlex.quote(db)}" if db else ""
    commands = [f"  {_program()} {verb}{where}" for verb in dict.fromkeys(verbs)]
    terminal.tell(f"The results are in {urls.shown(run.engine.url)}.")
    if commands:
        terminal.tell_all(["Next:", *commands])
    for state in states:
        progress.exit_by_outcome(state, strict=strict)


def next_verbs(run: Run, state: Progress) -> list[str]:
    """Return what one may do next; `retry` only where another try may help."""
    verbs = []
    if state.states[State.failed]:
        verbs.append(f"failures {run.name}")
        errors = charts.top_errors(run.engine, run.id)
        if any(_may_succeed(code) for code, *_ in errors):
            verbs.append(f"retry {run.name}")
    if state.states[State.done]:
        verbs += [f"results {run.name}", f"report {run.name} -o report.html", EXAMPLE_QUERY]
    return verbs


def _may_succeed(code: str) -> bool:
    kind = BY_CODE.get(code, ClipError)
    return kind.transient or kind.cause != Cause.clip


def _program() -> str:
    """Return the command that started this process, as the user can type it again."""
    started = Path(sys.argv[0])
    if started.name != "earmark" or shutil.which("earmark"):
        return "earmark"
    return os.path.relpath(started)
