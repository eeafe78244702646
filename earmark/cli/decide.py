"""The verbs that turn scores into decisions: review, evaluate, thresholds."""

from __future__ import annotations

import getpass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from db import decisions, reviews
from earmark import output, progress
from earmark.cli import options as o  # noqa: TC001 - Typer reads it
from earmark.database import find_run, read_settings

commands = typer.Typer()


class Show(StrEnum):
    """What an evaluation prints: measures by label, clips by truth and label, or each clip."""

    labels = "labels"
    confusion = "confusion"
    clips = "clips"


@commands.command(epilog="Example: earmark review march")
def review(
    run: o.Run,
    take: Annotated[
        Path | None, typer.Option("--import", help="Add the reviews of this CSV file, and end.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the reviews to this file, and end.")
    ] = None,
    port: o.UiPort = 5556,
    address: o.UiAddress = "127.0.0.1",
    token: o.UiToken = None,
    db: o.Db = None,
) -> None:
    """Serve the page on which you hear clips and judge their labels, with one key each."""
    from earmark import review_files
    from earmark.web import page

    settings = read_settings(db)
    engine, row = find_run(settings, run, change=not file)
    if take:
        count = review_files.take(engine, row.id, take, getpass.getuser())
        progress.tell(f"Imported: {progress.count_of(count, 'review')}.")
    elif file:
        output.write(reviews.reviews(engine, row.id), None, file)
    else:
        path = f"/runs/{row.id}/review"
        page.serve(engine, settings, address=address, port=port, token=token, flower="", path=path)


@commands.command(epilog="Example: earmark thresholds march --precision 0.95")
def thresholds(
    run: o.Run,
    precision: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="The share of right clips to promise.")
    ] = 0.95,
    looks: Annotated[
        int, typer.Option(min=1, help="How often you mean to look, with more reviews each time.")
    ] = 1,
    format: o.OutputFormat = None,
    file: o.OutputFile = None,
    db: o.Db = None,
) -> None:
    """Find by reviews the least score from which a label is right often enough; keep it."""
    from earmark import thresholds as finding

    engine, row = find_run(read_settings(db), run, change=True)
    found = list(finding.thresholds(engine, row, precision, looks=looks))
    output.write(found, format, file)
    progress.tell_all(map(finding.sentence, found))


@commands.command(epilog="Example: earmark evaluate march --truth species")
def evaluate(
    run: o.Run,
    truth: o.Truth,
    show: Annotated[Show, typer.Option(help="Measures, the confusion matrix, or clips.")] = (
        Show.labels
    ),
    format: o.OutputFormat = None,
    file: o.OutputFile = None,
    db: o.Db = None,
) -> None:
    """Compare a run with the truth: precision, recall, F1, average precision of each label."""
    from earmark import evaluation

    engine, row = find_run(read_settings(db), run)
    if show is Show.clips:
        output.write(decisions.cell(engine, row.id, truth, None), format, file)
    elif show is Show.confusion:
        output.write(evaluation.evaluate(engine, row, truth).cells, format, file)
    else:
        labels = evaluation.evaluate(engine, row, truth).labels
        output.write(labels, format, file, columns=evaluation.SHOWN)
