"""`earmark up`: an embedded Valkey, workers and Flower on this machine, until Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from db.identity import with_queue
from earmark import children, folders, local_cluster, progress, terminal
from earmark.core.broker import EMBEDDED_NOTE
from earmark.core.settings import Settings
from earmark.database import open_database
from earmark.ports import LOOPBACK, check_port

if TYPE_CHECKING:
    from earmark.local_cluster import LocalCluster


def up(
    settings: Settings, *, workers: int = 1, files: Sequence[Path] = (), flower_port: int = 5555
) -> None:
    """Keep an embedded Valkey, workers that may read these folders, and Flower until Ctrl-C."""
    folders.check(settings)
    check_port(LOOPBACK, flower_port)
    engine = open_database(settings, create=True)
    queue = str(with_queue(settings, engine).broker.queue)
    note = settings.data_dir / EMBEDDED_NOTE
    if files:
        roots = list(map(Path.absolute, files))
        settings = settings.changed(fetch={"file_roots": roots})
    cluster = local_cluster.running(settings, queue=queue, workers=workers)
    with terminal.terminable(), cluster as here:
        assert here.settings.broker.url is not None
        note.write_text(here.settings.broker.url)
        environment = children.environment(here.settings)
        command = [*children.EARMARK, "flower", "--port", str(flower_port)]
        try:
            with children.running(command, settings.data_dir / "flower.log", environment):
                _tell_up(workers, flower_port)
                _wait_for_ctrl_c(here)
        finally:
            note.unlink(missing_ok=True)


def _tell_up(workers: int, flower_port: int) -> None:
    flower_url = f"http://127.0.0.1:{flower_port}"
    terminal.screen.print(f"[bold]Up[/]: {workers} worker(s); Flower at {flower_url}")
    terminal.screen.print(
        "In another terminal: earmark submit LIST --watch. Ctrl-C stops everything."
    )


def _wait_for_ctrl_c(here: LocalCluster) -> None:
    try:
        while True:
            here.keep_alive()
            time.sleep(progress.LOOK_S)
    except KeyboardInterrupt:
        terminal.screen.print("Stopping.")
