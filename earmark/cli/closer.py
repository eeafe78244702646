"""The verbs that look closer at results: `compare` and `cut`."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from db import compare as comparing
from db import runs
from earmark import output, progress
from earmark.cli import options as o  # noqa: TC001 - Typer reads it
from earmark.core.clips import State
from earmark.database import find_run, read_settings
from earmark.files import ParquetOptions

if TYPE_CHECKING:
    from db.compare import Comparison
    from db.rows import Rows

commands = typer.Typer()
OtherRun = Annotated[str, typer.Argument(help="Another run's id or name.")]
#: Rows of a table that stands below another one.
ROWS_BELOW = 12


class By(StrEnum):
    """What a row of a comparison is."""

    label = "label"
    #: One label that became another one.
    change = "change"
    clip = "clip"


@commands.command(epilog="Example: earmark compare march april --by clip -o changed.csv")
def compare(
    a: o.Run,
    b: OtherRun,
    by: Annotated[
        By, typer.Option(help="A row for each label, each change of label, or each changed clip.")
    ] = By.label,
    format: o.OutputFormat = None,
    file: o.OutputFile = None,
    db: o.Db = None,
) -> None:
    """Compare what two runs heard in the same clips: with two models, or with other options."""
    engine, before = find_run(read_settings(db), a)
    after = runs.find_run(engine, b)
    with progress.screen.status(f"Comparing {before.name} and {after.name}"):
        comparison = comparing.compare(engine, before, after)
        rows = _rows(comparison, by)
    progress.tell_all(_sentences(comparison))
    parquet = ParquetOptions(of_views=False)
    output.write(rows, format, file, empty="Nothing changed.", parquet=parquet)
    if by is By.label and not (format or file) and sys.stdout.isatty():
        output.print_rows(comparison.changes(ROWS_BELOW), "What became what")


def _rows(comparison: Comparison, by: By) -> Rows:
    match by:
        case By.label:
            return comparison.labels()
        case By.change:
            return comparison.changes()
    return comparison.changed()


def _sentences(comparison: Comparison) -> list[str]:
    a, b = comparison.a.name, comparison.b.name
    count = progress.count_of(comparison.clips, "clip")
    sentences = [f"{count} done in both {a} and {b}, {comparison.agreement:.1%} with one label."]
    for run in (comparison.a, comparison.b):
        done = runs.progress(comparison.engine, run.id).states[State.done]
        if more := done - comparison.clips:
            sentences.append(f"{progress.count_of(more, 'more clip')} done in {run.name} alone.")
    for option, (ours, theirs) in comparison.differences.items():
        sentences.append(f"Their {option} differs: {ours} in {a}, {theirs} in {b}.")
    return sentences
