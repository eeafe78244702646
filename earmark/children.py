"""Child processes of the command line: started with our settings, stopped in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from earmark.core.processes import end_with_parent
from earmark.core.settings import PREFIX, Settings

#: A worker lets its running clips end: seconds, unless a download has just begun.
STOP_S = 15.0
#: The command line in a process of its own; -P keeps the working directory off its import path.
EARMARK = (sys.executable, "-P", "-m", "earmark")


def start(
    command: list[str], log: Path, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a child that ends with this process and adds to a log."""
    with log.open("ab") as file:
        # A session of its own: Ctrl-C reaches only us, and we stop children in the right order.
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, os.getpid()),  # noqa: PLW1509 - one call, no locks
        )


@contextmanager
def running(
    command: list[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a child with a new log, and stop it at the end."""
    log.unlink(missing_ok=True)
    process = start(command, log, environment)
    try:
        yield process
    finally:
        stop(process)


def stop(*processes: subprocess.Popen[bytes]) -> None:
    """End children: in order if they can within their time, else by force."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_line(log: Path) -> str:
    """Return the last line a child has written, for a sentence about its end."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def environment(settings: Settings) -> dict[str, str]:
    """Return the environment of a child that works with these settings."""
    # Several processes share the cores, and a worker sets its own number of threads.
    variables = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    inherited = Settings().model_dump(mode="json")
    for group, values in settings.model_dump(mode="json").items():
        if values != inherited[group]:
            own = f"{PREFIX}{group}".upper()
            # A variable of one setting would go before that of its group.
            for name in list(variables):
                if name.upper().startswith(f"{own}__"):
                    del variables[name]
            variables[own] = values if isinstance(values, str) else json.dumps(values)
    variables["EARMARK_DATABASE__URL"] = settings.database_url
    return variables
