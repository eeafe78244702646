"""The verbs that answer a question before or after a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer import Argument, Option

from db import results, runs
from earmark import output, terminal
from earmark.cli import options as o
from earmark.core.clips import Part
from earmark.core.errors import SERVICE_EXIT, UsageError
from earmark.core.options import Listing, RunOptions, of_each_model
from earmark.core.spelling import printable
from earmark.database import open_database, read_settings

commands = typer.Typer()
HOSTS_SHOWN = 10


@o.verb(commands, "earmark plan urls.csv --url-col link --within 8h", o.TASK)
def plan(
    given: dict[str, Any],
    sample: Annotated[int, Option(min=1, help="Clips tried, chosen at random.")] = 200,
    within: Annotated[
        str | None, Option(help="Tell how many workers finish in this time: 90s, 30min, 8h, 2d.")
    ] = None,
    format: o.TextFormat = None,
) -> None:
    """Try a random sample of a list, keep nothing, and estimate the whole list."""
    from earmark import plan as planning

    estimate = planning.plan(
        given["sources"],
        read_settings(),
        options=of_each_model(given),
        sample=sample,
        within_s=planning.seconds_in(within) if within else None,
        limit=given["limit"],
        listing=Listing.from_arguments(given),
    )
    if format:
        output.write_record(estimate.as_json(), format)
        return
    typer.echo("\n".join(planning.sentences(estimate, within)))
    output.print_rows(estimate.hosts[:HOSTS_SHOWN], "by host")
    output.print_rows(estimate.errors, "failures, each tried once")


@o.verb(commands, "EARMARK_DATABASE__URL=postgresql://db/earmark earmark doctor")
def doctor(format: o.TextFormat = None, db: o.Db = None) -> None:
    """Check what a run needs on this machine, and name each cure; exit with 3 after a fault."""
    from earmark.doctor import examine

    rows = []
    for check in examine(read_settings(db)):
        rows.append({"check": check.name, "ok": check.ok, "found": check.sentence})
        if format is None:
            mark = "ok " if check.ok else "FIX"
            typer.echo(f"{mark}  {check.name:<10}  {check.sentence}")
    if format:
        output.write(rows, format, None)
    if not all(row["ok"] for row in rows):
        raise typer.Exit(SERVICE_EXIT)


@o.verb(commands, "earmark models")
def models(
    names: Annotated[
        list[str] | None,
        Argument(help="Hugging Face ids or folders. Default: all on this machine."),
    ] = None,
    format: o.OutputFormat = None,
) -> None:
    """Load the models on this machine, list their labels, and time each on 5 s of sound."""
    from earmark import catalog

    with terminal.screen.status("Loading and measuring models"):
        entries = catalog.models(names or (), read_settings())
    output.write(map(asdict, entries), format, None, columns=catalog.COLUMNS)


@o.verb(
    commands,
    "earmark explain 1234, or: earmark explain https://example.org/a.wav",
    o.some(o.SCORING, "model", "revision", "labels", "channels"),
)
def explain(
    clip: Annotated[
        str, Argument(help="A clip's id, as `results` and `failures` give it, or a URL or path.")
    ],
    given: dict[str, Any],
    db: o.Db = None,
) -> None:
    """Fetch and classify one clip in this process and show each step; exit with 1 if it fails."""
    from earmark import explain, folders

    settings = read_settings(db)
    options = RunOptions.from_arguments(given)
    uri, part = folders.uri_of(clip), None
    if clip.isascii() and clip.isdigit():
        engine = open_database(settings)
        row = results.clip(engine, int(clip))
        uri, options = row.uri, runs.get_run(engine, row.run_id).options
        part = Part.of(row._asdict())
        explain.tell_row(row, _say)
    if not explain.explain(uri, settings, options, _say, part):
        raise typer.Exit(1)


@o.verb(
    commands,
    "earmark plot siren.wav -o siren.png",
    o.some(o.SCORING, "model", "revision", "window_s", "labels"),
)
def plot(
    file: Annotated[str, Argument(help="An audio file or its URL.")],
    picture: Annotated[Path, Option("--output", "-o", help="A .png, .svg or .pdf file.")],
    given: dict[str, Any],
) -> None:
    """Draw one clip: waveform, mel spectrogram, labels over time, and the best labels."""
    from earmark import folders, plots

    uri = folders.uri_of(file)
    if "://" not in file and not Path(uri).is_file():
        raise UsageError(reason=f"There is no file {uri}.")
    options = RunOptions.from_arguments(given)
    drawn = plots.plot_clip(uri, read_settings(), options)
    plots.save(drawn, picture)
    typer.echo(str(picture))


def _say(step: str, text: str) -> None:
    shown = Text(printable(text))
    shown.highlight_regex("[▁-▏]+", "green")
    Console(highlight=False).print(Text.assemble((f"{step:<11}  ", "bold"), shown), soft_wrap=True)
