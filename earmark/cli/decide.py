"""The verbs that turn scores into decisions: review, evaluate, thresholds."""

from __future__ import annotations

import getpass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from db import access, decisions, reviews
from earmark import output, terminal
from earmark.cli import options as o

commands = typer.Typer()


class Show(StrEnum):
    """What an evaluation prints: measures by label, clips by truth and label, or each clip."""

    labels = "labels"
    confusion = "confusion"
    clips = "clips"


@o.verb(commands, "earmark review march")
def review(
    run: o.Run,
    take: Annotated[
        Path | None, Option("--import", help="Add the reviews of this CSV file, and end.")
    ] = None,
    file: Annotated[
        Path | None, Option("--output", "-o", help="Write the reviews to this file, and end.")
    ] = None,
    port: o.UiPort = 5556,
    address: o.UiAddress = "127.0.0.1",
    token: o.UiToken = None,
) -> None:
    """Serve the page on which you hear clips and judge their labels, with one key each."""
    from earmark import review_files
    from earmark.web import page

    if not file:
        access.check_writable(run.engine)
    if take:
        count = review_files.take(run.engine, run.id, take, getpass.getuser())
        terminal.tell(f"Imported: {terminal.count_of(count, 'review')}.")
    elif file:
        output.write(reviews.reviews(run.engine, run.id), None, file)
    else:
        where: Any = {"address": address, "port": port, "token": token}
        path = f"/runs/{run.id}/review"
        page.serve(run.engine, run.settings, **where, flower="", path=path)


@o.verb(commands, "earmark thresholds march --precision 0.95")
def thresholds(
    run: o.RunToChange,
    precision: Annotated[
        float, Option(min=0.5, max=0.999, help="The share of right clips to promise.")
    ] = 0.95,
    looks: Annotated[
        int, Option(min=1, help="How often you mean to look, with more reviews each time.")
    ] = 1,
    *,
    out: o.Output,
) -> None:
    """Find by reviews the least score from which a label is right often enough; keep it."""
    from earmark import thresholds as finding

    found = list(finding.thresholds(run.engine, run.row, precision, looks=looks))
    out.write(found)
    terminal.tell_all(map(finding.sentence, found))


@o.verb(commands, "earmark evaluate march --truth species")
def evaluate(
    run: o.Run,
    truth: o.Truth,
    show: Annotated[Show, Option(help="Measures, the confusion matrix, or clips.")] = Show.labels,
    *,
    out: o.Output,
) -> None:
    """Compare a run with the truth: precision, recall, F1, average precision of each label."""
    from earmark import evaluation

    if show is Show.clips:
        out.write(decisions.cell(run.engine, run.id, truth, None))
        return
    found = evaluation.evaluate(run.engine, run.row, truth)
    if show is Show.confusion:
        out.write(found.cells)
    else:
        out.write(found.labels, columns=evaluation.SHOWN)
