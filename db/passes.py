"""Passes: runs that hear the same clips, each with a model of its own, fetched once for all."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from db.ledger import open_run
from db.models import Run
from db.session import writing
from earmark.core.errors import UsageError
from earmark.core.options import RunOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from db.runs import RunRow


def short_name(options: RunOptions) -> str:
    """Return what a run of a pass is called by its model: the last part of its path."""
    last = options.model.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", last).strip(".-") or "model"


def base_name(run: RunRow) -> str:
    """Return the name to go on with: what the runs of its pass have in common, or its own."""
    return run.name.rpartition("/")[0] if run.pass_id else run.name


def open_runs(
    engine: sa.Engine, name: str | None, options: RunOptions | Sequence[RunOptions], **kept: Any
) -> list[int]:
    """Return the ids of runs, one for each model, made now unless they exist.

    Of several models they are called `NAME/MODEL`. Without a name it is `run-<id>`, by the first
    of them.

    Raises:
        UsageError: two models have the same short name, or a run exists with other options.
    """
    if isinstance(options, RunOptions):
        options = [options]
    if len(options) == 1:
        return [open_run(engine, name, options[0], **kept)]
    models = list(map(short_name, options))
    if len(set(models)) < len(models):
        raise UsageError(reason=f"Two of the models would be called the same: {', '.join(models)}.")
    if name is None:
        first = open_run(engine, None, options[0], **kept)
        name = f"run-{first}"
        with writing(engine) as connection:
            renamed = sa.update(Run).where(Run.id == first)
            connection.execute(renamed.values(name=f"{name}/{models[0]}"))
    ids = []
    for model, each in zip(models, options, strict=True):
        ids.append(open_run(engine, f"{name}/{model}", each, **kept))
    _join(engine, ids)
    return ids


def _join(engine: sa.Engine, ids: list[int]) -> None:
    """Make runs those of one pass: of that which some of them have, if they do."""
    of_runs = Run.id.in_(ids)
    with writing(engine) as connection:
        known = connection.scalar(sa.select(sa.func.min(Run.pass_id)).where(of_runs))
        connection.execute(sa.update(Run).where(of_runs).values(pass_id=known or min(ids)))
