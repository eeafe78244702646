"""Child processes of the command line: started with our settings, stopped in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from earmark.core.processes import end_with_parent
from earmark.core.settings import Settings

#: A worker lets its running clips end: seconds, unless a download has just begun.
STOP_S = 15.0
#: The command line in a process of its own; -P keeps the working directory off its import path.
EARMARK = (sys.executable, "-P", "-m", "earmark")


def start(
    command: list[str], *, log: Any, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a child that ends with this process and writes to an open file."""
    # A session of its own: Ctrl-C reaches only us, and we stop the children in the right order.
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=partial(end_with_parent, os.getpid()),  # noqa: PLW1509 - one call, no locks
    )


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
    for name, value in _changed_variables(settings):
        if value is None:
            variables.pop(name, None)
        else:
            variables[name] = value
    variables["EARMARK_DATABASE__URL"] = settings.database_url
    return variables


def _changed_variables(settings: Settings) -> Iterator[tuple[str, str | None]]:
    """Yield the variables of the settings that a child would not read by itself."""
    inherited = Settings().model_dump(mode="json")
    for group, values in settings.model_dump(mode="json").items():
        if not isinstance(values, dict):
            if values != inherited[group]:
                yield f"EARMARK_{group}".upper(), str(values)
            continue
        for name, value in values.items():
            if value != inherited[group][name]:
                yield f"EARMARK_{group}__{name}".upper(), _as_text(value)


def _as_text(value: Any) -> str | None:
    if isinstance(value, list):
        # As JSON, since the name of a folder may have a comma.
        return json.dumps([str(part) for part in value])
    if isinstance(value, dict):
        return json.dumps(value)
    return None if value is None else str(value)
