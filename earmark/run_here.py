"""A run on this machine, from its submission to its end: a queue, workers, progress."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import sqlalchemy as sa

from db import runs, urls
from db.passes import base_name
from earmark import folders, local_cluster, progress, terminal
from earmark import notify as webhook
from earmark.core.clips import Clip, State
from earmark.core.errors import UsageError
from earmark.core.options import RunOptions
from earmark.core.settings import Settings
from earmark.database import open_database
from earmark.growing_folders import GrowingFolders
from earmark.run_object import Run
from producer.submit import submit
from workers.scoring import heads, hub, local_models

if TYPE_CHECKING:
    from earmark.local_cluster import LocalCluster


def run_here(
    sources: Sequence[str | Clip],
    settings: Settings,
    options: Sequence[RunOptions],
    *,
    workers: int = 1,
    roots: Sequence[Path] | None = None,
    quiet: bool = False,
    on_interrupt: str | None = None,
    watch: bool = False,
    notify: str | None = None,
    **submission: Any,
) -> Run:
    """Do the work of `run` with all of its settings and options given.

    Args:
        roots: the folders that the workers may read; default: those of the sources.
        on_interrupt: the sentence for Ctrl-C; default: how to go on with the run.
        submission: further arguments of `producer.submit.submit`.
    """
    growth = GrowingFolders(map(str, sources)) if watch else None
    _check(settings, options, notify)
    engine = open_database(settings, create=True)
    queue = f"run-{secrets.token_hex(4)}"
    local = _on_files_of(sources, roots, settings, options[0])
    with (
        terminal.terminable(),
        local_cluster.running(local, queue=queue, workers=workers) as here,
        terminal.interruptible(lambda: on_interrupt or _how_to_go_on(engine, queue)),
    ):
        look = _look_after(here, engine)
        watch_all = partial(_watch, engine, settings, notify, quiet)
        if growth:
            _grow(growth, here, engine, look, watch_all, {"options": options, **submission})
        submitted = submit(sources, engine, here.settings, options=options, **submission)
        watch_all(submitted.run_ids, look)
    run = Run(engine, runs.get_run(engine, submitted.run_id), settings, submitted)
    if not here.restarts and not any(map(_has_failures, run.together)):
        local_cluster.remove_logs(settings, queue)
    return run


def _watch(
    engine: sa.Engine,
    settings: Settings,
    notify: str | None,
    quiet: bool,
    run_ids: Iterable[int],
    meanwhile: Callable[[], object],
) -> None:
    for run_id in run_ids:
        with webhook.telling(notify, engine, run_id, settings):
            progress.watch(engine, run_id, settings, meanwhile=meanwhile, quiet=quiet)


def _has_failures(run: Run) -> bool:
    return bool(run.progress().states[State.failed])


def _check(settings: Settings, options: Sequence[RunOptions], notify: str | None) -> None:
    """Raise an EarmarkError if a run here could not work, before it begins."""
    if notify:
        webhook.check(notify, settings)
    folders.check(settings)
    for each in options:
        hub.check(each, here=True)
        if each.head:
            heads.load(each.head)
    local_models.check_then(options)


def _on_files_of(
    sources: Sequence[str | Clip],
    roots: Sequence[Path] | None,
    settings: Settings,
    options: RunOptions,
) -> Settings:
    """Return the settings of workers for one run."""
    model = {"name": options.model, "revision": options.revision}
    if roots is None:
        roots = folders.file_roots(map(str, sources))
    return settings.changed(fetch={"file_roots": roots}, model=model)


def _grow(
    growth: GrowingFolders,
    here: LocalCluster,
    engine: sa.Engine,
    look: Callable[[], None],
    watch_all: Callable[[Iterable[int], Callable[[], object]], None],
    submission: dict[str, Any],
) -> NoReturn:
    """Submit the files of growing folders as they are complete, until Ctrl-C."""

    def take() -> list[int]:
        look()
        if not (files := growth.complete()):
            return []
        submitted = submit(files, engine, here.settings, **submission)
        submission["name"] = base_name(runs.get_run(engine, submitted.run_id))
        return submitted.run_ids

    while True:
        watch_all(take(), take)
        time.sleep(progress.LOOK_S)


def _look_after(here: LocalCluster, engine: sa.Engine) -> Callable[[], None]:
    """Return a function for between two looks at a run: restart workers, check the disks."""
    written = [here.settings.data_dir]
    if file := urls.file_of(engine.url):
        written.append(file.absolute().parent)
    disks = folders.DiskWatch(written, terminal.tell)

    def look() -> None:
        here.keep_alive()
        disks.look()

    return look


def _how_to_go_on(engine: sa.Engine, queue: str) -> str:
    try:
        name = base_name(runs.run_on_queue(engine, queue))
    except UsageError:
        return "Stopped before the first clip was submitted."
    return f"Stopping; the same command with --name {name} goes on where this stops."
