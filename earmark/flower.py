"""Flower, which shows workers and chunks in the browser."""

from __future__ import annotations

import os
from pathlib import Path

from earmark.core.broker import LOOPBACK
from earmark.core.errors import UsageError
from earmark.database import read_settings
from earmark.local_cluster import find_broker
from earmark.ports import check_port

#: Finished chunks Flower remembers: 160,000 clips, some 50 MB.
REMEMBERED_TASKS = 10_000
COLUMNS = "uuid,state,args,result,worker,received,runtime,retries"
#: A worker that is gone stays on the page for an hour, so that somebody can see that it is gone.
FORGET_WORKER_S = 3600
SAVE_EVERY_MS = 30_000


def arguments(
    port: int, address: str, basic_auth: str | None, keep: Path | None = None
) -> list[str]:
    """Return the arguments of a Flower that shows and does not steer.

    Raises:
        UsageError: it would be open to other machines without a password, or its port is taken.
    """
    if basic_auth and not all(basic_auth.partition(":")):
        raise UsageError(reason="--basic-auth must be USER:PASSWORD.")
    if not basic_auth and address not in LOOPBACK:
        raise UsageError(
            reason=f"Flower on {address} needs --basic-auth USER:PASSWORD: it shows every run."
        )
    check_port(address, port)
    words = [f"--port={port}", f"--address={address}", "--inspect-timeout=5000", "--read-only"]
    words += [f"--max-tasks={REMEMBERED_TASKS}", f"--tasks-columns={COLUMNS}"]
    words += [f"--purge-offline-workers={FORGET_WORKER_S}"]
    # By default Flower runs the flowerconfig.py of the working directory.
    words += [f"--conf={os.devnull}"]
    if keep:
        words += ["--persistent=True", f"--db={keep}", f"--state-save-interval={SAVE_EVERY_MS}"]
    return words


def serve(
    *, port: int, address: str, basic_auth: str | None = None, keep: Path | None = None
) -> None:
    """Run Flower on our broker until it is told to stop; off this machine only with a password."""
    settings = find_broker(read_settings())
    password = basic_auth or settings.flower.basic_auth
    words = arguments(port, address, password, keep)
    os.environ["EARMARK_BROKER__URL"] = str(settings.broker.url)
    if password:
        os.environ["FLOWER_BASIC_AUTH"] = password
    else:
        # Flower's API is closed without a password; on loopback it serves this machine's own tools.
        os.environ["FLOWER_UNAUTHENTICATED_API"] = "true"
    # In this process: `celery -A` would put the working directory on the import path.
    from workers.app import app

    app.start(["flower", *words])
