"""The verbs that change a run or the database."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from earmark import progress
from earmark.cli import options as o  # noqa: TC001 - Typer reads it
from earmark.core.errors import BY_CODE, UsageError
from earmark.database import connect_to, find_run, read_settings

commands = typer.Typer()
database = typer.Typer(help="The database's schema.", no_args_is_help=True)


@commands.command(epilog="Example: earmark retry march --error timeout,dns")
def retry(
    run: o.Run,
    error: Annotated[
        str | None, typer.Option(help="Only these error codes, comma-separated.")
    ] = None,
    done: Annotated[
        bool, typer.Option("--done", help="Redo the clips that are done as well.")
    ] = False,
    db: o.Db = None,
) -> None:
    """Put a run's failed clips back to work."""
    from db import ledger
    from db.passes import options_again
    from db.runs import in_pass
    from earmark.machine import has_broker

    codes = error.split(",") if error else []
    _check_codes(codes)
    settings = read_settings(db)
    engine, row = find_run(settings, run, change=True)
    with progress.screen.status("Putting clips back to work"):
        count = ledger.retry_failed(engine, row.id, codes)
        if done:
            count += ledger.redo_done(engine, row.id)
    progress.tell(f"Back to work: {progress.count_of(count, 'clip')}.")
    if count and not has_broker(settings):
        words = shlex.join(options_again(in_pass(engine, row)))
        again = f"`earmark run YOUR_LIST {words}`, with the same list"
        progress.tell(f"No worker runs on this machine. {again}, works them off.")


@commands.command(epilog="Example: earmark resume march --stop-at 40%")
def resume(run: o.Run, stop_at: o.MaybeStopAt = None, db: o.Db = None) -> None:
    """Let a paused run go on; on one machine, give `earmark run` the same --name again."""
    from db import brake

    engine, row = find_run(read_settings(db), run, change=True)
    brake.resume(engine, row.id, stop_at)
    progress.tell(f"The run {row.name} {'goes on' if row.paused else 'is not paused'}.")


@commands.command(epilog="Example: earmark cancel march")
def cancel(run: o.Run, db: o.Db = None) -> None:
    """Stop a run at once; results that workers still hold are discarded."""
    from db import ledger

    engine, row = find_run(read_settings(db), run, change=True)
    progress.tell(f"Cancelled: {progress.count_of(ledger.cancel(engine, row.id), 'clip')}.")


@commands.command(epilog="Example: earmark prune march --yes")
def prune(
    run: o.Run,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    db: o.Db = None,
) -> None:
    """Delete a run with its clips and results."""
    from db import ledger
    from earmark import machine, similar

    settings = read_settings(db)
    engine, row = find_run(settings, run, change=True)
    if not yes:
        typer.confirm(f"Delete the run {row.name} with all its results?", abort=True)
    with progress.screen.status("Deleting clips"):
        count = ledger.prune(engine, row.id)
    similar.remove(engine, row, settings)
    machine.remove_logs(settings, row.queue)
    progress.tell(f"Deleted: {progress.count_of(count, 'clip')}.")


def _check_codes(codes: list[str]) -> None:
    unknown = sorted(set(codes) - set(BY_CODE))
    if unknown:
        raise UsageError(
            reason=f"There is no error code {', '.join(unknown)}; there are {', '.join(BY_CODE)}."
        )


@database.command("upgrade", epilog="Example: earmark db upgrade")
def db_upgrade(db: o.Db = None) -> None:
    """Bring the database to this version's schema."""
    from db import schema

    schema.upgrade(connect_to(read_settings(db)))
    db_check(db)


@database.command("check", epilog="Example: earmark db check")
def db_check(db: o.Db = None) -> None:
    """Say whether the database has this version's schema."""
    from db import schema, urls

    engine = connect_to(read_settings(db))
    schema.check(engine)
    progress.tell(f"{urls.shown(engine.url)} is ready.")
