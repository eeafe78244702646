"""The verbs that use the embeddings which a run keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from earmark import output, progress, terminal
from earmark.cli import options as o
from earmark.cli.results import CONDITIONS

commands = typer.Typer()
#: The columns of a terminal's table.
SIMILAR = ("rank", "score", "clip_id", "uri", "start_s", "end_s", "channel", "label")


@o.verb(
    commands,
    "earmark similar march --to siren.wav -n 20",
    o.some(CONDITIONS, "label", "min_score", "day", "hours"),
)
def similar(
    run: o.Run,
    to: Annotated[
        str, Option(help="The example: a clip's id, a file, a URL or, for a CLAP model, words.")
    ],
    given: dict[str, Any],
    count: Annotated[int, Option("-n", min=1, help="Windows shown.")] = 50,
    *,
    out: o.Output,
) -> None:
    """Print the windows of a run that sound most like an example, best first."""
    rows = run.similar(to, count, **given)
    out.write(rows, columns=SIMILAR, empty="The run has no such window.")


@o.verb(commands, "earmark index march")
def index(run: o.Run) -> None:
    """Write the index that `similar` searches, if the run has changed since."""
    from earmark import similar

    with terminal.screen.status("Writing the index"):
        windows = len(similar.opened(run.engine, run.row, run.settings).windows)
    terminal.tell(f"The index has {terminal.count_of(windows, 'window')} of {run.name}.")


@o.verb(commands, "earmark train march --labels-from species -o head/")
def train(
    run: o.Run,
    labels_from: Annotated[
        str, Option(help="The list's column with a clip's label, or `reviews`.")
    ],
    folder: Annotated[Path, Option("--output", "-o", help="The folder of the head.")],
    format: o.OutputFormat = None,
) -> None:
    """Train a head on a run's embeddings, and measure it label by label."""
    with terminal.screen.status("Training"):
        rows = run.train(labels_from, folder)
    output.write(rows, format, None)
    terminal.tell(f"The head is in {folder}; rows without figures had too few examples.")


@o.verb(commands, "earmark rescore march --head head/ --name march-2")
def rescore(
    run: o.RunToChange,
    head: Annotated[
        Path, Option(exists=True, file_okay=False, help="A folder that `earmark train` wrote.")
    ],
    name: Annotated[str, Option(help="The name of the new run.")],
) -> None:
    """Make a new run with a head's results for a run's embeddings, without touching audio."""
    with terminal.screen.status("Scoring"):
        made = run.rescore(head, name)
    progress.summarise(made.engine, made.row, made.progress(), made.settings)
