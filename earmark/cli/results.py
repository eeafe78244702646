"""The verbs that read results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from db import results, runs
from db.rows import Rows
from earmark import files, label_files, output, progress, tables, terminal
from earmark.cli import options as o
from earmark.core.errors import UsageError
from earmark.database import known_labels, open_database, read_settings
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
    rank={"min": 1, "flags": ["--rank", "--top-k"]},
)

EVENTS = o.parameters(
    o.Run.events,
    {
        "label": "Only this label.",
        "min_score": "The score that an event must reach.",
        "low": "The score down to which an event goes on. Default: --min-score.",
        "gap_s": "Join events with a gap of at most so many seconds.",
    },
    min_score={"min": 0, "max": 1},
    low={"min": 0, "max": 1},
    gap_s={"min": 0},
)


@o.verb(commands, "earmark status march --watch")
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


@o.verb(
    commands,
    "earmark results march --label siren --min-score 0.6 -o sirens.csv",
    CONDITIONS,
)
def show_results(run: o.Run, given: dict[str, Any], out: o.Output) -> None:
    """Print a run's results: each clip with its best label."""
    _write(run, run.results(**given), out, empty=f"No clip of {run.name} has such a result.")


@o.verb(commands, "earmark events march --label siren --min-score 0.3", EVENTS)
def show_events(run: o.Run, given: dict[str, Any], out: o.Output) -> None:
    """Print when each label is heard, also where another one is louder."""
    _write(run, run.events(**given), out, empty=f"Nothing is heard like that in {run.name}.")


@o.verb(
    commands,
    "earmark export march -o march.parquet",
    o.some(CONDITIONS, "label", "rank", "min_score", "windows"),
)
def export(
    run: o.Run,
    file: Annotated[
        Path, Option("--output", "-o", help="A file; with --parts or --labels audacity a folder.")
    ],
    given: dict[str, Any],
    format: o.OutputFormat = None,
    wide: Annotated[bool, Option("--wide", help="A column with each label's score.")] = False,
    parts: Annotated[
        bool, Option("--parts", help="A folder of Parquet files, as `load_dataset` reads it.")
    ] = False,
    labels: Annotated[
        LabelFormat | None, Option(help="The windows as label files for this program.")
    ] = None,
    embeddings: Annotated[
        bool, Option("--embeddings", help="Each window's vector, in place of its labels.")
    ] = False,
) -> None:
    """Write all of a run's results to a file, however many."""
    if labels:
        rows = results.results(run.engine, run.id, in_sequence=True, **given)
        label_files.write(rows, labels, file)
        return
    if wide or embeddings:
        none = {"label": None, "rank": 1, "min_score": None, "windows": False}
        if given != none or (wide and embeddings):
            raise UsageError(reason="--wide or --embeddings goes with no other choice.")
        rows = (results.wide if wide else results.embeddings)(run.engine, run.row)
    else:
        rows = run.results(**given)
    out = o.Output(output.Format.parquet if parts else format, file)
    _write(run, rows, out, empty="There are no results.", parts=parts)


def _write(run: o.Run, rows: Rows, out: o.Output, *, empty: str, parts: bool = False) -> None:
    """Write results of a run; a Parquet file says what made them."""

    def made_by() -> dict[str, Any]:
        from earmark import parquet

        return parquet.made_by(run.engine, run.row)

    options = ParquetOptions(made_by=made_by, parts=parts)
    out.write(rows, columns=tables.RESULTS, empty=empty, parquet=options)


@o.verb(commands, "earmark report march -o march.html")
def report(
    run: o.Run,
    file: Annotated[
        Path, Option("--output", "-o", help="The page: one file that needs nothing else.")
    ],
    clips: Annotated[
        int, Option(min=0, max=200, help="Clips shown; of more, an even sample.")
    ] = 200,
    truth: o.MaybeTruth = None,
) -> None:
    """Write one page on a run: counts, labels, failures, and clips to see and hear."""
    from earmark.web import report as reporting

    shown = reporting.write(run.engine, run.row, run.settings, file, most=clips, truth=truth)
    terminal.tell(f"{file}: {terminal.count_of(shown, 'clip')} to see and hear.")


@o.verb(commands, "earmark ui --port 5556")
def ui(
    port: o.UiPort = 5556,
    address: o.UiAddress = "127.0.0.1",
    token: o.UiToken = None,
    flower: Annotated[str, Option(help="Where Flower is, for a link.")] = "http://127.0.0.1:5555",
    db: o.Db = None,
) -> None:
    """Serve a page: runs as they go, their clips to see, hear and review, and SQL."""
    from earmark.web import page

    settings = read_settings(db)
    engine = open_database(settings)
    page.serve(engine, settings, address=address, port=port, token=token, flower=flower)


@o.verb(commands, "earmark failures march --format jsonl")
def failures(run: o.Run, out: o.Output) -> None:
    """Print why clips of a run have no result."""
    _write(run, run.failures(), out, empty=f"No clip of {run.name} failed.")


@o.verb(commands, "earmark labels starter")
def labels(
    model: Annotated[str, Argument(help="A model's name.")] = "starter", db: o.Db = None
) -> None:
    """Print a model's labels; a worker of this database must have loaded it before."""
    with files.opened(None) as out:
        for name in known_labels(read_settings(db), model):
            out.write(f"{name}\n")


@o.verb(commands, f"earmark {EXAMPLE_QUERY}")
def query(
    statement: Annotated[str, Argument(help="One SELECT; docs/guides/sql.md has the views.")],
    out: o.Output,
    timeout_s: Annotated[float, Option(min=0.1, help="Give up after so many seconds.")] = 30.0,
    db: o.Db = None,
) -> None:
    """Read the results with SQL."""
    from db import query as queries

    engine = open_database(read_settings(db))
    rows = queries.query(engine, statement, timeout_s=timeout_s)
    out.write(rows, parquet=ParquetOptions(of_views=False))
