"""Chunks that this worker cannot use, and the check for a worker with the wrong database."""

from __future__ import annotations

import logging
import os
import threading
from time import monotonic
from typing import Any

import sqlalchemy as sa

from db import identity
from earmark.core import broker
from earmark.core.errors import BROKEN_EXIT
from earmark.core.settings import Settings

logger = logging.getLogger(__name__)

#: The pause after a first foreign chunk. It doubles with each foreign chunk in a row: a shared
#: queue is passed quickly, and a queue of foreign chunks alone costs next to nothing.
SHORTEST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 3.0
MOST_DOUBLINGS = 10
#: A worker that has received only foreign chunks for this long is not ready.
ONLY_FOREIGN_S = 10.0
#: A worker that has received no foreign chunk for this long does not share its queue any more.
FORGET_S = 60.0
#: Another ledger is active if its feeder, which marks its queue twice a second, did so within this.
OTHERS_ACTIVE_S = 60.0

_CURE = (
    "Leave EARMARK_BROKER__QUEUE unset, so that each database has its own queue, or set"
    " EARMARK_DATABASE__URL to the database of these chunks."
)


def of_another_ledger(theirs: str, here: str) -> str:
    """Return the sentence about a chunk of another ledger."""
    queue, chars = broker.app.conf.task_default_queue, identity.NAME_CHARS
    return (
        f"The queue {queue} holds chunks of another database (ledger {theirs[:chars]}, this one is"
        f" {here[:chars]}); they are put back. {_CURE}"
    )


def of_another_version(version: int) -> str:
    """Return the sentence about a chunk of another version of Earmark."""
    queue, ours = broker.app.conf.task_default_queue, broker.MESSAGE_VERSION
    return (
        f"The queue {queue} holds chunks of message version {version}, this Earmark reads version"
        f" {ours}; they are put back. Upgrade every worker and producer to one version: clips that"
        " an older one left in the queue are sent again."
    )


class ForeignChunks:
    """Puts chunks that this worker cannot use back at the end of the queue.

    It pauses longer while only such chunks come.
    """

    def __init__(self, draining: threading.Event, keep_s: float) -> None:
        self._draining = draining
        # The chunk's own feeder has sent its clips again after this, so the message is dropped.
        self._keep_s = keep_s
        self._changing = threading.Lock()
        self._warned: set[str] = set()
        self._in_a_row = 0
        self._first_at = self._last_at = float("-inf")

    @property
    def seen(self) -> bool:
        """Whether foreign chunks came within the last minute."""
        return monotonic() - self._last_at < FORGET_S

    @property
    def nothing_else(self) -> bool:
        """Whether only foreign chunks came for a while."""
        return self.seen and self._in_a_row > 0 and monotonic() - self._first_at > ONLY_FOREIGN_S

    def put_back(
        self, message: dict[str, Any], task_id: str, shown: str, sentence: str
    ) -> dict[str, int]:
        """Put a message back, log this once, and pause; return the task's result.

        Raises:
            ServiceError: the broker is out of reach.
        """
        pause_s = self._note(sentence)
        if not broker.put_back(message, task_id, shown, self._keep_s):
            return {"dropped": 1}
        self._draining.wait(pause_s)
        return {"put_back": 1}

    def note_own_chunk(self) -> None:
        """Note that a chunk came that this worker can use."""
        self._in_a_row = 0

    def _note(self, sentence: str) -> float:
        """Count a foreign chunk; return the pause before the next one."""
        with self._changing:
            self._last_at = monotonic()
            if not self._in_a_row:
                self._first_at = self._last_at
            self._in_a_row += 1
            new = sentence not in self._warned
            self._warned.add(sentence)
        if new:
            logger.warning("%s", sentence, extra={"action": "foreign_chunk"})
        doubled: float = SHORTEST_PAUSE_S * 2 ** min(self._in_a_row, MOST_DOUBLINGS)
        return min(doubled, LONGEST_PAUSE_S)


class WrongDatabase:
    """Checks for a worker that has an empty SQLite file while another database uses its broker.

    Use one per worker and `check` it every few seconds; `suspected` is then current.
    """

    def __init__(self, engine: sa.Engine, settings: Settings) -> None:
        self._engine = engine
        self._ledger_id: str | None = None
        self._possible = engine.dialect.name == "sqlite" and broker.is_elsewhere(settings)
        self.suspected = False

    def check(self) -> None:
        """Update `suspected`; end this process if its database was replaced."""
        ledger_id = identity.ledger_id(self._engine)
        self._ledger_id = self._ledger_id or ledger_id
        if ledger_id != self._ledger_id:
            logger.critical("the database holds another ledger than at the start; the worker ends")
            os._exit(BROKEN_EXIT)
        if self._possible:
            others = broker.other_ledgers(ledger_id, OTHERS_ACTIVE_S)
            self._suspect(bool(others) and not identity.has_runs(self._engine))

    def _suspect(self, suspected: bool) -> None:
        if suspected and not self.suspected:
            logger.warning(
                "This worker's database is the SQLite file %s, which has no runs, while another"
                " database is at work on this broker: set EARMARK_DATABASE__URL to that one. Until"
                " then this worker does nothing.",
                self._engine.url.database,
                extra={"action": "wrong_database"},
            )
        self.suspected = suspected
