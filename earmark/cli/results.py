"""The verbs that read results."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003
from typing import Annotated

import typer

from db import results, runs
from earmark import label_files, output, progress
from earmark.cli import options as o  # noqa: TC001 - Typer reads it
from earmark.database import find_run, known_labels, open_database, read_settings
from earmark.label_files import LabelFormat  # noqa: TC001
from earmark.output import EXAMPLE_QUERY

commands = typer.Typer()


@commands.command(epilog="Example: earmark status march --watch")
def status(
    run: o.LatestRun = None,
    watch: o.Watch = False,
    format: o.OutputFormat = None,
    db: o.Db = None,
) -> None:
    """Show how far the runs are, or one of them: counts, pace, time to go, bottleneck."""
    settings = read_settings(db)
    engine = open_database(settings)
    row = runs.find_run(engine, run) if run or watch else None
    if row and watch:
        progress.follow(engine, row, settings)
    if row and format is None:
        progress.summarise(engine, row, runs.progress(engine, row.id), settings)
    else:
        output.write(progress.rows(engine, row, settings), format, None)


@commands.command(
    "results", epilog="Example: earmark results march --label siren --min-score 0.6 -o sirens.csv"
)
def show_results(
    run: o.Run,
    label: Annotated[str | None, typer.Option(help="Only this label.")] = None,
    min_score: Annotated[float | None, typer.Option(help="Only from this score up.")] = None,
    windows: Annotated[bool, typer.Option("--windows", help="Every window's best label.")] = False,
    format: o.OutputFormat = None,
    file: o.OutputFile = None,
    db: o.Db = None,
) -> None:
    """Print a run's results: each clip with its best label."""
    engine, row = find_run(read_settings(db), run)
    rows = results.results(engine, row.id, label=label, min_score=min_score, windows=windows)
    output.write(rows, format, file, brief=True)


@commands.command(epilog="Example: earmark export march -o march.parquet")
def export(
    run: o.Run,
    file: Annotated[
        Path, typer.Option("--output", "-o", help="A file; with --labels audacity a folder.")
    ],
    format: o.OutputFormat = None,
    windows: Annotated[bool, typer.Option("--windows", help="Every window's best label.")] = False,
    labels: Annotated[
        LabelFormat | None, typer.Option(help="The windows as label files for this program.")
    ] = None,
    db: o.Db = None,
) -> None:
    """Write all of a run's results to a file, however many."""
    engine, row = find_run(read_settings(db), run)
    rows = results.results(engine, row.id, windows=windows or labels is not None)
    if labels:
        label_files.write(rows, labels, file)
    else:
        output.write(rows, format, file)


@commands.command(epilog="Example: earmark report march -o march.html")
def report(
    run: o.Run,
    file: Annotated[
        Path, typer.Option("--output", "-o", help="The page: one file that needs nothing else.")
    ],
    clips: Annotated[
        int, typer.Option(min=0, max=200, help="Clips shown; of more, an even sample.")
    ] = 200,
    db: o.Db = None,
) -> None:
    """Write one page on a run: counts, labels, failures, and clips to see and hear."""
    from earmark.web import report as reporting

    settings = read_settings(db)
    engine, row = find_run(settings, run)
    shown = reporting.write(engine, row, settings, file, most=clips)
    progress.screen.print(f"{file}: {shown} clips to see and hear.", markup=False, soft_wrap=True)


@commands.command(epilog="Example: earmark ui --port 5556")
def ui(
    port: Annotated[int, typer.Option(help="The page's port on this machine.")] = 5556,
    address: Annotated[str, typer.Option(help="Any but loopback needs a token.")] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(envvar="EARMARK_UI_TOKEN", help="The password asked for.")
    ] = None,
    flower: Annotated[
        str, typer.Option(help="Where Flower is, for a link.")
    ] = "http://127.0.0.1:5555",
    db: o.Db = None,
) -> None:
    """Serve a read-only page: runs as they go, their clips to see and hear, and SQL."""
    from earmark.web import page

    settings = read_settings(db)
    engine = open_database(settings)
    token = token or settings.ui_token
    page.serve(engine, settings, address=address, port=port, token=token, flower=flower)


@commands.command(epilog="Example: earmark failures march --format jsonl")
def failures(
    run: o.Run, format: o.OutputFormat = None, file: o.OutputFile = None, db: o.Db = None
) -> None:
    """Print why clips of a run have no result."""
    engine, row = find_run(read_settings(db), run)
    output.write(results.failures(engine, row.id), format, file, brief=True)


@commands.command(epilog="Example: earmark labels starter")
def labels(
    model: Annotated[str, typer.Argument(help="A model's name.")] = "starter", db: o.Db = None
) -> None:
    """Print the labels of a model that some worker has loaded."""
    with output.opened(None) as out:
        for name in known_labels(read_settings(db), model):
            out.write(f"{name}\n")


@commands.command(epilog=f"Example: earmark {EXAMPLE_QUERY}")
def query(
    statement: Annotated[str, typer.Argument(help="One SELECT; docs/sql.md has the views.")],
    format: o.OutputFormat = None,
    file: o.OutputFile = None,
    timeout_s: Annotated[
        float, typer.Option(min=0.1, help="Give up after so many seconds.")
    ] = 30.0,
    db: o.Db = None,
) -> None:
    """Read the results with SQL."""
    from db import query as queries

    engine = open_database(read_settings(db))
    output.write(queries.query(engine, statement, timeout_s=timeout_s), format, file)
