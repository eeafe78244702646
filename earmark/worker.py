"""A worker process: Celery with our app, until it is told to stop."""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

from earmark.database import read_settings
from earmark.local_cluster import find_broker

#: More workers than a machine runs; the next one is named after its process.
WORKERS_OF_A_MACHINE = 100
LOCK_FILE = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


def work(
    *,
    concurrency: int | None = None,
    device: str | None = None,
    model: str | None = None,
    log_json: bool | None = None,
) -> None:
    """Run one worker; the values given here go before those of the environment."""
    given = {
        "EARMARK_WORKER__CONCURRENCY": concurrency,
        "EARMARK_MODEL__DEVICE": device,
        "EARMARK_MODEL__NAME": model,
        "EARMARK_WORKER__LOG_JSON": log_json,
    }
    for name, value in given.items():
        if value is not None:
            os.environ[name] = str(value)
    settings = find_broker(read_settings())
    os.environ["EARMARK_BROKER__URL"] = str(settings.broker.url)
    from workers.app import app

    arguments = ["--quiet", "worker", "--pool", "threads"]
    arguments += ["--concurrency", str(settings.worker.concurrency)]
    name = reserve_name(Path(tempfile.gettempdir()), os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    arguments += ["--hostname", f"{name}@%h", "--loglevel", "INFO"]
    arguments += ["--without-gossip", "--without-mingle", "--task-events"]
    app.worker_main(arguments)


def reserve_name(folder: Path, devices: str) -> str:
    """Return this machine's first free worker name, taken until the process ends.

    A worker that is started again has the name of the one before, so that Flower shows one worker.
    """
    device = f"gpu{devices}-" if devices.isdecimal() else ""
    for number in range(1, WORKERS_OF_A_MACHINE + 1):
        name = f"earmark-{device}{number}"
        with suppress(OSError), ExitStack() as opened:
            lock = os.open(folder / f"{name}-{os.getuid()}.lock", LOCK_FILE, 0o600)
            opened.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It is locked, and open, until this process ends.
            opened.pop_all()
            return name
    return f"earmark-{os.getpid()}"
