"""The verbs that look closer at results: `compare` and `cut`."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from db import compare as comparing
from db import runs
from db.compare import Comparison
from earmark import output, terminal
from earmark.cli import options as o
from earmark.core.clips import State
from earmark.database import open_database, read_settings
from earmark.files import ParquetOptions

commands = typer.Typer()
OtherRun = Annotated[str, Argument(help="Another run's id or name.")]
#: Rows of a table that stands below another one.
ROWS_BELOW = 12
MEASURES = ("clips", "precision", "recall", "f1")


@o.verb(commands, "earmark compare march april --by clip -o changed.csv")
def compare(
    a: o.RunName,
    b: OtherRun,
    by: Annotated[
        Literal["label", "change", "clip"],
        Option(help="A row for each label, each change of label, or each changed clip."),
    ] = "label",
    truth: Annotated[
        str | None,
        Option(help="Show precision and recall by this column of the lists, or by `reviews`."),
    ] = None,
    format: o.OutputFormat = None,
    file: o.OutputFile = None,
    db: o.Db = None,
) -> None:
    """Compare the labels of two runs over the same clips."""
    engine = open_database(read_settings(db))
    before, after = runs.find_run(engine, a), runs.find_run(engine, b)
    with terminal.screen.status(f"Comparing {before.name} and {after.name}"):
        comparison = comparing.compare(engine, before, after)
        rows_by = {
            "label": comparison.labels,
            "change": comparison.changes,
            "clip": comparison.changed,
        }
        rows = _judged(comparison, truth) if truth else rows_by[by]()
    terminal.tell_all(_sentences(comparison))
    parquet = ParquetOptions(of_views=False)
    output.write(rows, format, file, empty="Nothing changed.", parquet=parquet)
    if by == "label" and not (format or file) and sys.stdout.isatty():
        output.print_rows(islice(comparison.changes(), ROWS_BELOW), "What became what")


def _judged(comparison: Comparison, truth: str) -> list[dict[str, Any]]:
    """Return how well each run does, label by label, where the truth is known."""
    import polars as pl

    from earmark.evaluation import evaluate

    tables = []
    for name, run in (("a", comparison.a), ("b", comparison.b)):
        table = pl.DataFrame(evaluate(comparison.engine, run, truth).labels)
        tables.append(table.select("label", pl.col(MEASURES).name.suffix(f"_{name}")))
    return tables[0].join(tables[1], on="label", how="full", coalesce=True).to_dicts()


def _sentences(comparison: Comparison) -> list[str]:
    a, b = comparison.a.name, comparison.b.name
    sentences = [f"No clip is done in both {a} and {b}."]
    if comparison.clips:
        count = terminal.count_of(comparison.clips, "clip")
        agreement = f"{comparison.agreement:.1%} have one best label."
        sentences = [f"{count} done in both {a} and {b}; {agreement}"]
    for run in (comparison.a, comparison.b):
        done = runs.progress(comparison.engine, run.id).states[State.done]
        if more := done - comparison.clips:
            sentences.append(f"{terminal.count_of(more, 'more clip')} done in {run.name} alone.")
    for option, (ours, theirs) in comparison.differences.items():
        sentences.append(f"Their {option} differs: {ours} in {a}, {theirs} in {b}.")
    return sentences


@o.verb(commands, "earmark cut march --label siren --min-score 0.6 -o sirens/")
def cut(
    run: o.Run,
    folder: Annotated[Path, Option("--output", "-o", help="A new folder.")],
    label: o.Label = None,
    min_score: Annotated[float, Option(help="The score that an event must reach.")] = 0.5,
    pad: Annotated[float, Option(min=0, help="Seconds kept before and after each event.")] = 1.0,
    sample: Annotated[
        int | None, Option(min=1, help="Only so many, spread over the scores.")
    ] = None,
    format: Annotated[Literal["flac", "wav"], Option(help="The files' format.")] = "flac",
) -> None:
    """Cut events out of the recordings: a sound file for each, and a table of them."""
    from earmark.cut import cutting

    with cutting(
        run.engine, run.row, run.settings, folder,
        label=label, min_score=min_score, sample=sample, pad_s=pad, format=format,
    ) as (rows, missing):  # fmt: skip
        table = folder / "metadata.csv"
        output.write(rows, output.Format.csv, table, empty="Nothing was cut.")
    if missing:
        clips = terminal.count_of(len(missing), "clip")
        terminal.tell(f"Events of {clips} are missing, as of {missing[0]}")
