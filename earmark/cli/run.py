"""The verbs that get clips classified."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from db import runs
from earmark import progress
from earmark.cli import options as o
from earmark.database import open_database, read_settings
from earmark.output import EXAMPLE_QUERY

if TYPE_CHECKING:
    from db.runs import RunRow
    from earmark.api import Finished
    from earmark.core.settings import Settings

commands = typer.Typer()


@commands.command(epilog="Example: earmark run recordings/ --db labels.db --top-k 3")
@o.spread
def run(submission: o.Submission, workers: o.Workers = 1) -> None:
    """Classify everything on this machine: embedded Valkey, worker, progress, results."""
    from earmark import api

    settings = read_settings(submission.db)
    finished = api.run(
        submission.sources,
        settings,
        options=submission.options,
        workers=workers,
        **submission.arguments,
    )
    _show(finished, settings, submission.db, strict=submission.strict)


@commands.command(epilog="Example: earmark submit urls.csv --url-col link --name march --watch")
@o.spread
def submit(submission: o.Submission, watch: o.Watch = False) -> None:
    """Put lists into the ledger and the queue; print the run's id."""
    from earmark import api
    from producer.submit import submit as submit_list

    settings = api.find_broker(read_settings(submission.db))
    engine = open_database(settings, create=True)
    again = (
        f"--name {submission.name}" if submission.name else "the --name that `earmark status` shows"
    )
    with progress.interruptible(
        lambda: f"Not all is submitted; the same command with {again} goes on."
    ):
        submitted = submit_list(
            submission.sources, engine, settings, options=submission.options, **submission.arguments
        )
    progress.report_lines(submitted)
    sys.stdout.write(f"{submitted.run_id}\n")
    if watch:
        found = runs.get_run(engine, submitted.run_id)
        state = progress.follow(engine, found, settings)
        progress.summarise(engine, found, state, settings)
        progress.exit_if_strict(state, strict=submission.strict)


@commands.command(
    epilog="Example: EARMARK_BROKER__URL=redis://redis:6379 earmark worker --device cuda:0"
)
def worker(
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Chunks in progress at once.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = None,
    model: Annotated[str | None, typer.Option(help="What to load before the first clip.")] = None,
    log_json: Annotated[
        bool | None, typer.Option("--log-json", help="Log a JSON object a line.")
    ] = None,
) -> None:
    """Run one worker process for one device."""
    from earmark import api

    api.worker(concurrency=concurrency, device=device, model=model, log_json=log_json)


@commands.command(epilog="Example: earmark up --workers 2 --files recordings/")
def up(
    workers: o.Workers = 1,
    files: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="A folder whose files may be submitted; say it again for more.",
        ),
    ] = None,
    flower_port: o.FlowerPort = 5555,
    db: o.Db = None,
) -> None:
    """Keep an embedded Valkey, workers and Flower running until Ctrl-C."""
    from earmark import api

    api.up(read_settings(db), workers=workers, files=files or [], flower_port=flower_port)


@commands.command(epilog="Example: earmark flower --port 5555")
def flower(
    port: o.FlowerPort = 5555,
    address: Annotated[str, typer.Option(help="Any but loopback needs a password.")] = "127.0.0.1",
    basic_auth: Annotated[
        str | None, typer.Option(envvar="FLOWER_BASIC_AUTH", help="USER:PASSWORD.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Keep what it has seen in this file, over restarts.")
    ] = None,
) -> None:
    """Watch workers and chunks in the browser."""
    from earmark import api

    api.flower(port=port, address=address, basic_auth=basic_auth, keep=keep)


@commands.command(epilog="Example: earmark demo --report demo.html")
def demo(
    report: Annotated[
        Path | None, typer.Option(help="Also write the run's page to this file.")
    ] = None,
    db: o.Db = None,
) -> None:
    """Classify the bundled example clips, two of them broken on purpose."""
    from earmark.demo import demo as classify_examples

    settings = read_settings(db)
    _show(classify_examples(settings, report), settings, db, strict=False)


def _show(finished: Finished, settings: Settings, db: str | None, *, strict: bool) -> None:
    engine = open_database(settings)
    progress.report_lines(finished.submitted)
    progress.show_results(engine, finished.run, finished.progress)
    progress.summarise(engine, finished.run, finished.progress, settings)
    progress.screen.print(
        "Next:", *_next_commands(finished.run, db), sep="\n  ", markup=False, soft_wrap=True
    )
    progress.exit_if_strict(finished.progress, strict=strict)


def _next_commands(run: RunRow, db: str | None) -> list[str]:
    where = f" --db {shlex.quote(db)}" if db else ""
    installed = Path(sys.argv[0])
    found = shutil.which("earmark") or installed.name != "earmark"
    program = "earmark" if found else os.path.relpath(installed)
    api = (
        f"results {run.name}",
        f"report {run.name} -o report.html",
        EXAMPLE_QUERY,
        "run YOUR_FOLDER",
    )
    return [f"{program} {verb}{where}" for verb in api]
