"""A webhook that is told when a run has ended or was stopped.

The URL is the secret of most webhooks, so no more than its host is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import sqlalchemy as sa

from db import runs
from earmark import terminal
from earmark.core.clips import State
from earmark.core.errors import DownloadError, UsageError
from earmark.core.settings import Settings


def check(url: str, settings: Settings) -> None:
    """Raise UsageError if this can be no webhook."""
    # Imported here because it loads an HTTP client.
    from earmark.core.addresses import check_url

    try:
        check_url(url, settings.fetch)
    except DownloadError as error:
        raise UsageError(reason=f"--notify cannot be used: {error}") from None


@contextmanager
def telling(url: str | None, engine: sa.Engine, run_id: int, settings: Settings) -> Iterator[None]:
    """Tell a webhook, if there is one, whether the run finished, paused or was stopped."""
    event = "stopped"
    try:
        yield
        event = "finished"
    finally:
        if url:
            state = runs.progress(engine, run_id)
            if state.paused:
                event = "paused"
            _post(url, runs.get_run(engine, run_id).name, event, state, settings)


def _post(url: str, name: str, event: str, state: runs.Progress, settings: Settings) -> None:
    from earmark.core.guard import Guard

    done, failed = state.states[State.done], state.states[State.failed]
    clips = terminal.count_of(state.total, "clip")
    notice = {
        "text": f"Earmark: {name} {event}, {clips}, {done} done, {failed} failed",
        "run": name,
        "event": event,
        "clips": state.total,
        **{str(known): count for known, count in state.states.items()},
    }
    with closing(Guard(settings.changed(fetch={"max_redirects": 0}).fetch)) as guard:
        try:
            with guard.open(url, json.dumps(notice).encode()) as answer:
                problem = "" if answer.status < 300 else f"HTTP {answer.status}"
        except DownloadError as error:
            problem = str(error)
    if problem:
        host = urlsplit(url).hostname
        terminal.tell(f"The webhook at {host} was not told that the run {event}: {problem}")
