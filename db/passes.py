"""Passes: runs that hear the same clips, each with a model of its own, fetched once for all."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from db import reuse
from db.ledger import open_run
from db.models import Clip, Run
from db.outcomes import stored_score
from db.session import reading, writing
from earmark.core.clips import Failure, Postponed, State, Success
from earmark.core.errors import Cancelled, UsageError, as_recorded
from earmark.core.options import RunOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from db.claims import Claimed
    from db.runs import RunRow
    from earmark.core.clips import Outcome

#: A clip whose fate the first run has not decided, as others work on it, is tried again after this.
FOLLOW_PAUSE_S = 5.0


def short_name(options: RunOptions) -> str:
    """Return what a run of a pass is called by its model: the last part of its path."""
    last = options.model.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", last).strip(".-") or "model"


def base_name(run: RunRow) -> str:
    """Return the name to go on with: what the runs of its pass have in common, or its own."""
    return run.name.rpartition("/")[0] if run.pass_id else run.name


def options_again(together: Sequence[RunRow]) -> list[str]:
    """Return the options of `earmark run` that name the runs of a pass, or a run alone."""
    words = ["--name", base_name(together[0])]
    for run in together:
        options = run.options
        if options.then_label:
            words += ["--then", options.model, "--then-label", ",".join(options.then_label)]
            words += ["--then-min-score", f"{options.then_min_score:g}"]
        elif len(together) > 1 or options.model != RunOptions().model:
            words += ["--model", options.model]
    return words


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
    following = [run_id for run_id, each in zip(ids, options, strict=True) if each.then_label]
    _join(engine, ids, following)
    return ids


def _join(engine: sa.Engine, ids: list[int], following: list[int]) -> None:
    """Make runs those of one pass: of that which some of them have, if they do.

    Some of them follow the first.
    """
    of_runs = Run.id.in_(ids)
    with writing(engine) as connection:
        known = connection.scalar(sa.select(sa.func.min(Run.pass_id)).where(of_runs))
        connection.execute(sa.update(Run).where(of_runs).values(pass_id=known or min(ids)))
        connection.execute(sa.update(Run).where(Run.id.in_(following)).values(follows=ids[0]))


def lets_through(heard: Iterable[tuple[str, float]], options: RunOptions) -> bool:
    """Return whether labels and scores of a clip let it through to a run with these options."""
    for label, score in heard:
        if label in options.then_label and stored_score(score) >= options.then_min_score:
            return True
    return False


def unheard(first: Success, clip_id: int) -> Success:
    """Return the outcome of a clip that the same clip of another run does not let through."""
    return Success(clip_id, first.source, first.facts, (), unheard=True)


def verdict(engine: sa.Engine, clip: Claimed, options: RunOptions) -> Outcome | Postponed | None:
    """Return the end that the first run has for a clip; None if it lets it through."""
    of_first = sa.select(Clip.state, Clip.error_code, Clip.error).where(Clip.id == clip.first)
    heard = sa.text("SELECT label, score FROM top_k WHERE clip_id = :first")
    with reading(engine) as connection:
        first = connection.execute(of_first).first()
        labels = [
            (row.label, row.score) for row in connection.execute(heard, {"first": clip.first})
        ]
    if first is None:
        return Failure(clip.id, Cancelled())
    if first.state in (State.failed, State.cancelled):
        return Failure(clip.id, as_recorded(first.error_code, first.error))
    if first.state == State.done and lets_through(labels, options):
        return None
    success = reuse.result(engine, clip.first or 0, clip.id)
    return unheard(success, clip.id) if success else Postponed(clip.id, FOLLOW_PAUSE_S)
