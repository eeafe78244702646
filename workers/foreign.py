"""Chunks that are not for this worker, and a worker that was given the wrong database."""

from __future__ import annotations

import logging
import os
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any

from db import identity
from earmark.core import broker
from earmark.core.errors import BROKEN_EXIT

if TYPE_CHECKING:
    import sqlalchemy as sa

    from earmark.core.settings import Settings

logger = logging.getLogger(__name__)

#: The first pause after a foreign chunk; it doubles while no other comes, so that a shared queue is passed quickly and
#: a queue of foreign chunks alone costs next to nothing.
SHORTEST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 3.0
MOST_DOUBLINGS = 10
#: A worker that has seen nothing but foreign chunks for so long is not ready.
ONLY_FOREIGN_S = 10.0
#: A worker that no foreign chunk has reached for so long is rid of them.
RID_OF_THEM_S = 60.0
#: A feeder notes each half second that it is at work.
OTHERS_ACTIVE_S = 60.0

_CURE = (
    "Leave EARMARK_BROKER__QUEUE unset, so that each database has a queue of its own, or set EARMARK_DATABASE__URL to"
    " the database that these chunks are of."
)


def of_another_ledger(theirs: str, here: str) -> str:
    """Return the sentence about a chunk of another ledger."""
    queue, shown = broker.app.conf.task_default_queue, identity.NAME_CHARS
    return (
        f"The queue {queue} holds chunks of another database (ledger {theirs[:shown]}, this one is {here[:shown]});"
        f" they are put back. {_CURE}"
    )


def of_another_version(version: int) -> str:
    """Return the sentence about a chunk of another version of Earmark."""
    queue, ours = broker.app.conf.task_default_queue, broker.MESSAGE_VERSION
    return (
        f"The queue {queue} holds chunks of message version {version}, this Earmark reads version {ours}; they are put"
        " back. Upgrade every worker and producer to one version: what an older one left in the queue is sent anew."
    )


class ForeignChunks:
    """Puts chunks that this worker cannot use back behind all others, and slows down while no other comes."""

    def __init__(self, draining: threading.Event, keep_s: float) -> None:
        self._draining = draining
        # A chunk's own feeder sends its clips anew after this, so the message is of no use any more.
        self._keep_s = keep_s
        self._changing = threading.Lock()
        self._told: set[str] = set()
        self._in_a_row = 0
        self._first_at = self._last_at = float("-inf")

    @property
    def seen(self) -> bool:
        """Whether foreign chunks have come lately."""
        return monotonic() - self._last_at < RID_OF_THEM_S

    @property
    def nothing_else(self) -> bool:
        """Whether none but foreign chunks have come for a while."""
        return self.seen and self._in_a_row > 0 and monotonic() - self._first_at > ONLY_FOREIGN_S

    def put_back(
        self, message: dict[str, Any], task_id: str, shown: str, sentence: str
    ) -> dict[str, int]:
        """Put a message back, say so once, and wait a little; return what Flower shows.

        Raises:
            ServiceError: the broker is out of reach.
        """
        pause_s = self._note(sentence)
        if not broker.put_back(message, task_id, shown, self._keep_s):
            return {"dropped": 1}
        self._draining.wait(pause_s)
        return {"put_back": 1}

    def end_row(self) -> None:
        """Note that a chunk came which is for this worker."""
        self._in_a_row = 0

    def _note(self, sentence: str) -> float:
        """Count a foreign chunk; return how long to wait before the next."""
        with self._changing:
            self._last_at = monotonic()
            if not self._in_a_row:
                self._first_at = self._last_at
            self._in_a_row += 1
            new = sentence not in self._told
            self._told.add(sentence)
        if new:
            logger.warning("%s", sentence, extra={"action": "foreign_chunk"})
        doubled: float = SHORTEST_PAUSE_S * 2 ** min(self._in_a_row, MOST_DOUBLINGS)
        return min(doubled, LONGEST_PAUSE_S)


class WrongDatabase:
    """Notices a worker with an empty SQLite file of its own beside a broker on which another database is at work."""

    def __init__(self, engine: sa.Engine, settings: Settings) -> None:
        self._engine = engine
        self._ledger_id: str | None = None
        self._possible = engine.dialect.name == "sqlite" and broker.is_elsewhere(settings)
        self.suspected = False

    def check(self) -> None:
        """Look whether this worker can have anything to do here; end it if its database was replaced."""
        found = identity.ledger_id(self._engine)
        self._ledger_id = self._ledger_id or found
        if found != self._ledger_id:
            logger.critical("the database holds another ledger than at the start; the worker ends")
            os._exit(BROKEN_EXIT)
        if self._possible:
            others = broker.other_ledgers(found, OTHERS_ACTIVE_S)
            self._suspect(bool(others) and not identity.has_runs(self._engine))

    def _suspect(self, suspected: bool) -> None:
        if suspected and not self.suspected:
            logger.warning(
                "This worker's database is the SQLite file %s, which has no runs, while another database is at work on"
                " this broker: set EARMARK_DATABASE__URL to that one. Until then this worker does nothing.",
                self._engine.url.database,
                extra={"action": "wrong_database"},
            )
        self.suspected = suspected
