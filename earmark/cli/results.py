"""The verbs that read results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa
import typer

from db import results, runs
from db.rows import Rows
from db.runs import RunRow
from earmark import events, files, label_files, output, progress, tables
from earmark.cli import options as o
from earmark.core.errors import UsageError
from earmark.database import find_run, known_labels, open_database, read_settings
from earmark.files import ParquetOptions
from earmark.label_files import LabelFormat  # noqa: TC001
from earmark.output import EXAMPLE_QUERY

commands = typer.Typer()
NO_RUN = "There is no run yet: `earmark run YOUR_FOLDER` makes one."
CONDITIONS = o.parameters(
    results.results,
    {
        "label": "Only this label.",
        "rank": "A row for each of the best labels, up to this rank among those kept.",
        "min_score": "Only from this score up.",
        "max_score": "Only up to this score.",
        "by_score": "The highest score first. Default: the order of the list.",
        "windows": "Every window's best label.",
        "day": "Only recorded on this day (2026-05-01) or in this month.",
        "hours": "Only recorded in these hours of the day, such as 22-3.",
    },
)


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
    elif row and format:
        output.write_record(next(progress.rows(engine, row, settings)), format)
    else:
        every = progress.rows(engine, None, settings)
        output.write(every, format, None, columns=tables.STATUS, empty=NO_RUN)


@commands.command(
    "results", epilog="Example: earmark results march --label siren --min-score 0.6 -o sirens.csv"
)
@o.spread(CONDITIONS)
def show_results(
    run: o.Run,
    given: dict[str, Any],
    format: o.OutputFormat = None,
    file: o.OutputFile = None,
    db: o.Db = None,
) -> None:
    """Print a run's results: each clip with its best label."""
    engine, row = find_run(read_settings(db), run)
    rows = results.results(engine, row.id, **given)
    _write(engine, row, rows, format, file, empty=f"No clip of {row.name} has such a result.")


@commands.command("events", epilog="Example: earmark events march --label siren --min-score 0.3")
def show_events(
    run: o.Run,
    label: o.Label = None,
    min_score: Annotated[
        float, typer.Option(min=0, max=1, help="The score that an event must reach.")
    ] = 0.5,
    low: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="The score down to which an event goes on. Default: --min-score."
        ),
    ] = None,
    gap_s: Annotated[
        float, typer.Option(min=0, help="Join events with a gap of at most so many seconds.")
    ] = 0.0,
    format: o.OutputFormat = None,
    file: o.OutputFile = None,
    db: o.Db = None,
) -> None:
    """Print when each label is heard, also where another one is louder."""
    engine, row = find_run(read_settings(db), run)
    rows = events.events(engine, row, events.Rule(min_score, low, gap_s), label=label)
    _write(engine, row, rows, format, file, empty=f"Nothing is heard like that in {row.name}.")


@commands.command(epilog="Example: earmark export march -o march.parquet")
@o.spread(CONDITIONS, "label", "rank", "min_score", "windows")
def export(
    run: o.Run,
    file: Annotated[
        Path,
        typer.Option("--output", "-o", help="A file; with --parts or --labels audacity a folder."),
    ],
    given: dict[str, Any],
    format: o.OutputFormat = None,
    wide: Annotated[bool, typer.Option("--wide", help="A column with each label's score.")] = False,
    parts: Annotated[
        bool, typer.Option("--parts", help="A folder of Parquet files, as `load_dataset` reads it.")
    ] = False,
    labels: Annotated[
        LabelFormat | None, typer.Option(help="The windows as label files for this program.")
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Each window's vector, in place of its labels.")
    ] = False,
    db: o.Db = None,
) -> None:
    """Write all of a run's results to a file, however many."""
    engine, row = find_run(read_settings(db), run)
    if labels:
        rows = results.results(engine, row.id, in_sequence=True, **given)
        label_files.write(rows, labels, file)
        return
    if wide or embeddings:
        none = {"label": None, "rank": 1, "min_score": None, "windows": False}
        if given != none or (wide and embeddings):
            raise UsageError(reason="--wide or --embeddings goes with no other choice.")
        rows = results.wide(engine, row) if wide else results.embeddings(engine, row)
    else:
        rows = results.results(engine, row.id, **given)
    _write(engine, row, rows, output.Format.parquet if parts else format, file, parts=parts)


def _write(
    engine: sa.Engine,
    run: RunRow,
    rows: Rows,
    format: output.Format | None,
    file: Path | None,
    *,
    empty: str = "There are no results.",
    parts: bool = False,
) -> None:
    """Write results of a run; a Parquet file says what made them."""

    def made_by() -> dict[str, Any]:
        from earmark import parquet

        return parquet.made_by(engine, run)

    options = ParquetOptions(made_by=made_by, parts=parts)
    output.write(rows, format, file, columns=tables.RESULTS, empty=empty, parquet=options)


@commands.command(epilog="Example: earmark report march -o march.html")
def report(
    run: o.Run,
    file: Annotated[
        Path, typer.Option("--output", "-o", help="The page: one file that needs nothing else.")
    ],
    clips: Annotated[
        int, typer.Option(min=0, max=200, help="Clips shown; of more, an even sample.")
    ] = 200,
    truth: o.MaybeTruth = None,
    db: o.Db = None,
) -> None:
    """Write one page on a run: counts, labels, failures, and clips to see and hear."""
    from earmark.web import report as reporting

    settings = read_settings(db)
    engine, row = find_run(settings, run)
    shown = reporting.write(engine, row, settings, file, most=clips, truth=truth)
    progress.tell(f"{file}: {progress.count_of(shown, 'clip')} to see and hear.")


@commands.command(epilog="Example: earmark ui --port 5556")
def ui(
    port: o.UiPort = 5556,
    address: o.UiAddress = "127.0.0.1",
    token: o.UiToken = None,
    flower: Annotated[
        str, typer.Option(help="Where Flower is, for a link.")
    ] = "http://127.0.0.1:5555",
    db: o.Db = None,
) -> None:
    """Serve a page: runs as they go, their clips to see, hear and review, and SQL."""
    from earmark.web import page

    settings = read_settings(db)
    engine = open_database(settings)
    page.serve(engine, settings, address=address, port=port, token=token, flower=flower)


@commands.command(epilog="Example: earmark failures march --format jsonl")
def failures(
    run: o.Run, format: o.OutputFormat = None, file: o.OutputFile = None, db: o.Db = None
) -> None:
    """Print why clips of a run have no result."""
    engine, row = find_run(read_settings(db), run)
    rows = results.failures(engine, row.id)
    _write(engine, row, rows, format, file, empty=f"No clip of {row.name} failed.")


@commands.command(epilog="Example: earmark labels starter")
def labels(
    model: Annotated[str, typer.Argument(help="A model's name.")] = "starter", db: o.Db = None
) -> None:
    """Print a model's labels; a worker of this database must have loaded it before."""
    with files.opened(None) as out:
        for name in known_labels(read_settings(db), model):
            out.write(f"{name}\n")


@commands.command(epilog=f"Example: earmark {EXAMPLE_QUERY}")
def query(
    statement: Annotated[str, typer.Argument(help="One SELECT; docs/guides/sql.md has the views.")],
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
    rows = queries.query(engine, statement, timeout_s=timeout_s)
    output.write(rows, format, file, parquet=ParquetOptions(of_views=False))
