"""A worker process: Celery with our app, until it is told to stop."""

from __future__ import annotations

import os

from earmark.database import read_settings
from earmark.machine import find_broker


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
    arguments += ["--hostname", f"earmark-{os.getpid()}@%h", "--loglevel", "INFO"]
    arguments += ["--without-gossip", "--without-mingle", "--task-events"]
    app.worker_main(arguments)
