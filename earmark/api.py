"""What stands behind the verbs that do work: each a function one can call from Python as well."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from db import runs
from db.identity import with_queue
from earmark import folders, local, progress
from earmark.core import broker
from earmark.core.broker import EMBEDDED_NOTE
from earmark.core.clips import State
from earmark.core.errors import ServiceError, UsageError
from earmark.database import open_database, read_settings
from producer.submit import Submitted, submit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import sqlalchemy as sa

    from db.runs import RunRow
    from earmark.core.options import RunOptions
    from earmark.core.settings import Settings


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that has come to its end."""

    run: RunRow
    progress: runs.Progress
    submitted: Submitted


def find_broker(settings: Settings) -> Settings:
    """Return the settings with the broker that is said, or that `earmark up` on this machine runs."""
    url = settings.broker.url
    note = settings.data_dir / EMBEDDED_NOTE
    if url is None and note.is_file():
        url = note.read_text()
    if url is None:
        raise ServiceError(
            reason="No broker is known: set EARMARK_BROKER__URL, or start `earmark up` here."
        )
    return with_broker(settings, url=url)


def with_broker(settings: Settings, **changes: Any) -> Settings:
    changed = settings.model_copy(update={"broker": settings.broker.model_copy(update=changes)})
    broker.configure(changed.broker)
    return changed


def run(
    sources: Sequence[str],
    settings: Settings,
    *,
    options: RunOptions,
    workers: int = 1,
    changes: dict[str, str] | None = None,
    on_interrupt: str | None = None,
    **submission: Any,
) -> Finished:
    """Classify every clip of the sources on this machine, from an embedded Valkey to the finished run.

    Args:
        changes: settings of the workers, such as `{"fetch__ports": "8080"}`.
        on_interrupt: what to say on Ctrl-C; default: how to go on with the run.
        submission: what `producer.submit.submit` takes as well.
    """
    folders.check(settings)
    engine = open_database(settings, create=True)
    queue = f"run-{secrets.token_hex(4)}"
    roots = as_setting(file_roots(sources))
    changed = {
        "fetch__file_roots": roots,
        "model__name": options.model,
        "model__revision": options.revision,
    }
    with (
        progress.terminable(),
        machine(settings, queue=queue, workers=workers, **{**changed, **(changes or {})}) as (
            here,
            children,
        ),
        progress.interruptible(lambda: on_interrupt or _how_to_go_on(engine, queue)),
    ):
        submitted = submit(sources, engine, here, options=options, **submission)
        disks = folders.DiskWatch(_written(settings, engine), progress.tell)
        state = progress.watch(
            engine, submitted.run_id, here, meanwhile=lambda: _look_after(children, disks)
        )
    if not state.states[State.failed] and not any(child.restarts for child in children):
        # Nobody needs its logs.
        shutil.rmtree(settings.data_dir / queue, ignore_errors=True)
    return Finished(runs.get_run(engine, submitted.run_id), state, submitted)


def _written(settings: Settings, engine: sa.Engine) -> Iterator[Path]:
    yield settings.data_dir
    if engine.dialect.name == "sqlite":
        yield Path(str(engine.url.database)).absolute().parent


def _look_after(children: list[local.Worker], disks: folders.DiskWatch) -> None:
    keep_alive(children)
    disks.look()


def _how_to_go_on(engine: sa.Engine, queue: str) -> str:
    try:
        name = runs.run_on_queue(engine, queue).name
    except UsageError:
        return "Stopped before the first clip was submitted."
    return f"Stopping; the same command with --name {name} goes on where this stops."


@contextmanager
def machine(
    settings: Settings, *, queue: str, workers: int, **changes: Any
) -> Iterator[tuple[Settings, list[local.Worker]]]:
    """Run an embedded Valkey and workers with the changed settings; yield how to reach them."""
    folder = settings.data_dir / queue
    with local.valkey(folder / "valkey") as url:
        here = with_broker(settings, url=url, queue=queue)
        environment = local.environment(here, broker__url=url, broker__queue=queue, **changes)
        with local.workers(
            [environment | own for own in local.shares(workers, settings)], folder
        ) as children:
            yield here, children
    broker.app.close()


def keep_alive(children: list[local.Worker]) -> None:
    for child in children:
        child.keep_alive()


def file_roots(sources: Sequence[str]) -> list[Path]:
    """Return the folders that local workers may read: what was submitted.

    A list may name any file of this machine, and who types `run` owns both; a cluster's workers keep their setting.
    """
    roots = []
    for source in sources:
        path = Path(source).expanduser().absolute()
        if path.is_dir():
            roots.append(path)
        elif "://" not in source:
            roots.append(Path(path.anchor))
    return roots


def as_setting(folders: Iterable[Path]) -> str:
    """Return folders as the environment gives them: as JSON, since a name may have a comma."""
    return json.dumps([str(folder) for folder in folders])


def up(
    settings: Settings, *, workers: int = 1, files: Sequence[Path] = (), flower_port: int = 5555
) -> None:
    """Keep an embedded Valkey, workers that may read these folders, and Flower running until Ctrl-C."""
    folders.check(settings)
    engine = open_database(settings, create=True)
    queue = str(with_queue(settings, engine).broker.queue)
    note = settings.data_dir / EMBEDDED_NOTE
    changes = (
        {"fetch__file_roots": as_setting([folder.absolute() for folder in files])} if files else {}
    )
    with (
        progress.terminable(),
        machine(settings, queue=queue, workers=workers, **changes) as (here, children),
    ):
        assert here.broker.url is not None
        note.write_text(here.broker.url)
        try:
            environment = local.environment(here, broker__url=here.broker.url, broker__queue=queue)
            with local.flower(environment, flower_port, settings.data_dir):
                progress.screen.print(
                    f"[bold]Up[/]: {workers} worker(s); Flower at http://127.0.0.1:{flower_port}"
                )
                progress.screen.print(
                    "In another terminal: earmark submit LIST --watch. Ctrl-C stops everything."
                )
                _wait_for_ctrl_c(children)
        finally:
            note.unlink(missing_ok=True)


def _wait_for_ctrl_c(children: list[local.Worker]) -> None:
    try:
        while True:
            keep_alive(children)
            time.sleep(progress.LOOK_S)
    except KeyboardInterrupt:
        progress.screen.print("Stopping.")


def worker(
    *,
    concurrency: int | None = None,
    device: str | None = None,
    model: str | None = None,
    log_json: bool | None = None,
) -> None:
    """Run one worker process until it is told to stop; said values go before those of the environment."""
    said = {
        "WORKER__CONCURRENCY": concurrency,
        "MODEL__DEVICE": device,
        "MODEL__NAME": model,
        "WORKER__LOG_JSON": log_json,
    }
    os.environ.update(
        {f"EARMARK_{name}": str(value) for name, value in said.items() if value is not None}
    )
    settings = find_broker(read_settings())
    os.environ["EARMARK_BROKER__URL"] = str(settings.broker.url)
    from workers.app import app

    app.worker_main(
        [
            *(
                "--quiet",
                "worker",
                "--pool",
                "threads",
                "--concurrency",
                str(settings.worker.concurrency),
            ),
            *("--hostname", f"earmark-{os.getpid()}@%h", "--loglevel", "INFO"),
            *("--without-gossip", "--without-mingle", "--task-events"),
        ]
    )


def flower(
    *, port: int, address: str, basic_auth: str | None = None, keep: Path | None = None
) -> None:
    """Run Flower on our broker until it is told to stop; off this machine only with a password."""
    settings = find_broker(read_settings())
    password = basic_auth or settings.flower.basic_auth
    arguments = local.flower_arguments(port, address, password, keep)
    os.environ["EARMARK_BROKER__URL"] = str(settings.broker.url)
    if password:
        os.environ["FLOWER_BASIC_AUTH"] = password
    else:
        # Flower's API is closed without a password; on loopback it serves this machine's own tools.
        os.environ["FLOWER_UNAUTHENTICATED_API"] = "true"
    # In this process: `celery -A` would put the working directory on the import path.
    from workers.app import app

    app.start(["flower", *arguments])
