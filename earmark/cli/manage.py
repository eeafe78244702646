"""The verbs that change a run or the database."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer
from typer import Option

from earmark import terminal
from earmark.cli import options as o
from earmark.core.errors import BY_CODE, UsageError
from earmark.database import connect_to, read_settings

commands = typer.Typer()
database = typer.Typer(help="The database's schema.", no_args_is_help=True)


def _codes(text: str) -> str:
    unknown = sorted(set(text.split(",")) - set(BY_CODE))
    if unknown:
        raise UsageError(
            reason=f"There is no error code {', '.join(unknown)}; there are {', '.join(BY_CODE)}."
        )
    return text


@o.verb(commands, "earmark retry march --error timeout,dns")
def retry(
    run: o.RunToChange,
    error: Annotated[
        str | None,
        Option(parser=_codes, metavar="CODES", help="Only these error codes, comma-separated."),
    ] = None,
    done: Annotated[bool, Option("--done", help="Redo the clips that are done as well.")] = False,
) -> None:
    """Put a run's failed clips back to work."""
    from db import changes
    from db.passes import options_again
    from db.runs import in_pass
    from earmark.local_cluster import has_broker

    codes = error.split(",") if error else []
    with terminal.screen.status("Putting clips back to work"):
        count = changes.retry_failed(run.engine, run.id, codes)
        if done:
            count += changes.redo_done(run.engine, run.id)
    terminal.tell(f"Back to work: {terminal.count_of(count, 'clip')}.")
    if count and not has_broker(run.settings):
        words = shlex.join(options_again(in_pass(run.engine, run.row)))
        again = f"`earmark run YOUR_LIST {words}`, with the same list"
        terminal.tell(f"No worker runs on this machine. {again}, works them off.")


@o.verb(commands, "earmark resume march --stop-at 40%")
def resume(run: o.RunToChange, stop_at: o.MaybeStopAt = None) -> None:
    """Let a paused run go on; on one machine, give `earmark run` the same --name again."""
    from db import brake

    brake.resume(run.engine, run.id, stop_at)
    terminal.tell(f"The run {run.name} {'goes on' if run.row.paused else 'is not paused'}.")


@o.verb(commands, "earmark cancel march")
def cancel(run: o.RunToChange) -> None:
    """Stop a run at once; results that workers still hold are discarded."""
    from db import changes

    terminal.tell(f"Cancelled: {terminal.count_of(changes.cancel(run.engine, run.id), 'clip')}.")


@o.verb(commands, "earmark prune march --yes")
def prune(
    run: o.RunToChange,
    yes: Annotated[bool, Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a run with its clips and results."""
    from db import changes
    from earmark import local_cluster, similar

    if not yes:
        typer.confirm(f"Delete the run {run.name} with all its results?", abort=True)
    with terminal.screen.status("Deleting clips"):
        count = changes.prune(run.engine, run.id)
    similar.remove(run.engine, run.row, run.settings)
    local_cluster.remove_logs(run.settings, run.row.queue)
    terminal.tell(f"Deleted: {terminal.count_of(count, 'clip')}.")


@o.verb(database, "earmark db upgrade")
def db_upgrade(db: o.Db = None) -> None:
    """Bring the database to this version's schema."""
    from db import schema

    schema.upgrade(connect_to(read_settings(db)))
    db_check(db)


@o.verb(database, "earmark db check")
def db_check(db: o.Db = None) -> None:
    """Say whether the database has this version's schema."""
    from db import schema, urls

    engine = connect_to(read_settings(db))
    schema.check(engine)
    terminal.tell(f"{urls.shown(engine.url)} is ready.")
