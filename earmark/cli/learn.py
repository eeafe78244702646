"""The verbs that use the embeddings which a run keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from db import runs
from earmark import output, progress
from earmark.cli import options as o
from earmark.cli.results import CONDITIONS
from earmark.database import find_run, read_settings

commands = typer.Typer()
#: The columns of a terminal's table.
SIMILAR = ("rank", "score", "clip_id", "uri", "start_s", "end_s", "channel", "label")


@commands.command(epilog="Example: earmark similar march --to siren.wav -n 20")
@o.spread(CONDITIONS, "label", "min_score", "day", "hours")
def similar(
    run: o.Run,
    to: Annotated[
        str,
        typer.Option(help="The example: a clip's id, a file, a URL or, for a CLAP model, words."),
    ],
    given: dict[str, Any],
    count: Annotated[int, typer.Option("-n", min=1, help="Windows shown.")] = 50,
    format: o.OutputFormat = None,
    file: o.OutputFile = None,
    db: o.Db = None,
) -> None:
    """Print the windows of a run that sound most like an example, best first."""
    from earmark import similar

    settings = read_settings(db)
    engine, row = find_run(settings, run)
    rows = similar.similar(engine, row, settings, to, count, **given)
    output.write(rows, format, file, columns=SIMILAR, empty="The run has no such window.")


@commands.command(epilog="Example: earmark index march")
def index(run: o.Run, db: o.Db = None) -> None:
    """Write the index that `similar` searches, if the run has changed since."""
    from earmark import similar

    settings = read_settings(db)
    engine, row = find_run(settings, run)
    with progress.screen.status("Writing the index"):
        windows = len(similar.opened(engine, row, settings).windows)
    progress.tell(f"The index has {progress.count_of(windows, 'window')} of {row.name}.")


@commands.command(epilog="Example: earmark train march --labels-from species -o head/")
def train(
    run: o.Run,
    labels_from: Annotated[
        str, typer.Option(help="The list's column with a clip's label, or `reviews`.")
    ],
    folder: Annotated[Path, typer.Option("--output", "-o", help="The folder of the head.")],
    format: o.OutputFormat = None,
    db: o.Db = None,
) -> None:
    """Train a head on a run's embeddings, and measure it label by label."""
    from earmark.train import train

    settings = read_settings(db)
    engine, row = find_run(settings, run)
    with progress.screen.status("Training"):
        rows = train(engine, row, settings, labels_from, folder)
    output.write(rows, format, None)
    progress.tell(f"The head is in {folder}; rows without figures had too few examples.")


@commands.command(epilog="Example: earmark rescore march --head head/ --name march-2")
def rescore(
    run: o.Run,
    head: Annotated[
        Path,
        typer.Option(exists=True, file_okay=False, help="A folder that `earmark train` wrote."),
    ],
    name: Annotated[str, typer.Option(help="The name of the new run.")],
    db: o.Db = None,
) -> None:
    """Make a new run with a head's results for a run's embeddings, without touching audio."""
    from earmark.rescore import rescore

    settings = read_settings(db)
    engine, row = find_run(settings, run, change=True)
    with progress.screen.status("Scoring"):
        made = rescore(engine, row, settings, name, str(head.resolve()))
    progress.summarise(engine, made, runs.progress(engine, made.id), settings)
