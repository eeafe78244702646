"""Log records in, lines of text or JSON out on stderr, each with its run and its chunk."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

_PLAIN = frozenset([*vars(logging.makeLogRecord({})), "message", "asctime"])
_about: ContextVar[dict[str, object]] = ContextVar("about", default={})  # noqa: B039 - never changed in place


def set_up(*, as_json: bool) -> None:
    """Send this process's log and warnings to stderr."""
    logging.captureWarnings(capture=True)
    formatter: logging.Formatter = Text("%(asctime)s %(levelname)s %(name)s: %(message)s")
    if as_json:
        formatter = Json()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for chatty in ("celery.worker.strategy", "celery.app.trace", "httpx", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


@contextmanager
def about(**facts: object) -> Iterator[None]:
    """Add these facts to all log lines of the block, and of threads with a copy of its context."""
    token = _about.set(facts)
    try:
        yield
    finally:
        _about.reset(token)


class Text(logging.Formatter):
    """A line for people: the facts of `about` come before the message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        if facts := _about.get():
            shown = ", ".join(f"{name} {value}" for name, value in facts.items())
            record.message = f"{shown}: {record.message}"
        return super().formatMessage(record)


class Json(logging.Formatter):
    """One JSON object a line: time, level, logger, message, facts of `about`, facts of the line."""

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in _PLAIN}
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_about.get(),
            **extra,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
