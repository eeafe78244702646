"""The verbs that answer a question before or after a run."""

from __future__ import annotations

from typing import Annotated

import typer

from console import options as o
from console import output
from console.database import read_settings

verbs = typer.Typer()


@verbs.command(epilog="Example: earmark plan urls.csv --url-col link --within 8h")
@o.spread
def plan(
    task: o.Task,
    sample: Annotated[int, typer.Option(min=1, help="Clips tried, chosen at random.")] = 200,
    within: Annotated[str | None, typer.Option(help="How many workers do it in this time: 90s, 30min, 8h, 2d?")] = None,
    how: o.As = None,
) -> None:
    """Try a random sample of a list, keep nothing, and tell what all of it will take."""
    from console import plan as planning

    within_s = planning.seconds_in(within) if within else None
    found = planning.plan(
        task.sources, read_settings(), options=task.options, sample=sample, within_s=within_s, **task.said()
    )
    if how:
        output.write([found.as_json()], how, None)
        return
    typer.echo("\n".join(planning.sentences(found, within)))
    output.print_rows(found.hosts[:10], "by host")
    output.print_rows(found.errors, "failures, each tried once")
