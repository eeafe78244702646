"""The one task: claim a chunk's clips, classify them, record their outcomes; decides nothing twice."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from celery.exceptions import Reject

from db import ledger
from earmark import broker
from earmark.clips import Failure
from earmark.errors import ClipError, MessageError, ModelError, ServiceError
from workers import sacrifice

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sqlalchemy as sa

    from db.ledger import Claim, Claimed
    from earmark.clips import Chunk, Outcome
    from earmark.settings import Settings
    from workers.models import Job, Models
    from workers.pipeline import Pipeline

logger = logging.getLogger(__name__)

#: A clip that has seen this many workers die is suspected of killing them.
SUSPECT_CRASHES = 2
#: How often a waiting chunk looks whether the worker is to stop.
LOOK_UP_S = 0.25


class Desk:
    """What the tasks of this process share, from start-up to shutdown."""

    def __init__(self, engine: sa.Engine, settings: Settings, models: Models, pipeline: Pipeline, name: str) -> None:
        self.engine = engine
        self.settings = settings
        self.models = models
        self.name = name
        self.draining = threading.Event()
        self._pipeline = pipeline
        self._threads = ThreadPoolExecutor(settings.worker.clips_in_flight, thread_name_prefix="clip")
        self._held: set[int] = set()

    def work(self, chunk: Chunk) -> dict[str, int]:
        """Bring every clip of the chunk that is still to do to a final state, or give it back."""
        limits = self.settings.ledger
        claim = ledger.claim(self.engine, [clip_id for clip_id, _ in chunk.clips], worker=self.name, limits=limits)
        counts = Counter({"skipped": len(chunk.clips) - len(claim.clips)})
        if claim.clips:
            with self._holding(claim.token):
                outcomes, label_ids = self._outcomes(chunk.run_id, claim)
                counts += Counter(ledger.finish(self.engine, claim, outcomes, label_ids, limits))
                undone = {clip.id for clip in claim.clips} - {outcome.clip_id for outcome in outcomes}
                ledger.release(self.engine, claim.token, undone)
                counts["released"] = len(undone)
        return {name: count for name, count in counts.items() if count}

    def renew(self) -> None:
        """Lengthen the leases of everything being worked on here."""
        ledger.renew(self.engine, list(self._held), self.settings.ledger)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._pipeline.close()
        self.models.close()
        self.engine.dispose()

    @contextmanager
    def _holding(self, token: int) -> Iterator[None]:
        self._held.add(token)
        try:
            yield
        finally:
            self._held.discard(token)

    def _outcomes(self, run_id: int, claim: Claim) -> tuple[list[Outcome], tuple[int, ...]]:
        try:
            with self.models.of_run(run_id) as job:
                return self._classify(claim.clips, job), job.model.label_ids
        except (ServiceError, ClipError) as error:
            reason = error if isinstance(error, ClipError) else ModelError(reason=str(error))
            return [Failure(clip.id, reason) for clip in claim.clips], ()

    def _classify(self, clips: tuple[Claimed, ...], job: Job) -> list[Outcome]:
        working = [self._threads.submit(partial(self._classify_one, clip, job)) for clip in clips]
        deadline = monotonic() + self.settings.worker.chunk_deadline_s
        running = set(working)
        while running and monotonic() < deadline:
            _, running = wait(running, timeout=LOOK_UP_S)
            if self.draining.is_set():
                running = {future for future in running if not future.cancel()}
        return [future.result() for future in working if _has_result(future)]

    def _classify_one(self, clip: Claimed, job: Job) -> Outcome:
        if clip.crashes >= SUSPECT_CRASHES:
            return sacrifice.classify(clip, job.options, self.settings)
        return self._pipeline.classify(clip, job)


def _has_result(future: Future[Outcome]) -> bool:
    return future.done() and not future.cancelled()


#: Set at the worker's start-up, before it takes its first message.
desk: Desk | None = None


@broker.app.task(name=broker.TASK)
def classify_chunk(message: dict[str, Any]) -> dict[str, int]:
    """Work on one chunk; what is returned is what Flower shows."""
    assert desk is not None
    if desk.draining.is_set():
        raise Reject("this worker is stopping", requeue=True)
    try:
        chunk = broker.decode(message)
    except MessageError as error:
        logger.error("%s", error, extra={"action": "message_refused"})  # noqa: TRY400 - the sentence says it all
        return {"refused": 1}
    started = monotonic()
    counts = desk.work(chunk)
    logger.info(
        "run %d: %s in %.1f s",
        chunk.run_id,
        ", ".join(f"{count} {name}" for name, count in counts.items()),
        monotonic() - started,
        extra={"action": "chunk_done", "run_id": chunk.run_id, **counts},
    )
    return counts
