"""The one task: claim a chunk's clips, classify them, record their outcomes; decides nothing twice."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, TypeVar

from celery.exceptions import Reject

from db import ledger
from earmark.core import broker
from earmark.core.clips import Failure, Postponed
from earmark.core.errors import DatabaseError, MessageError, ModelError, ServiceError
from workers import foreign, logs, metrics
from workers.chunk import DRAIN_S, LOOK_UP_S, PATIENCE_S, ChunkInProgress
from workers.foreign import ForeignChunks
from workers.quarantine import Quarantine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import sqlalchemy as sa
    from celery import Task

    from db.ledger import Claim, Claimed
    from earmark.core.clips import Chunk, Outcome
    from earmark.core.settings import Settings
    from workers.models import Models, RunPlan
    from workers.pipeline import Pipeline
    from workers.scoring.batcher import Batcher

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: A clip that has seen this many workers die is suspected of killing them.
SUSPECT_CRASHES = 2
#: Between two tries to reach a database that is away.
OUTAGE_PAUSE_S = 1.0
#: A statement that the database refuses as wrong is told once in so long.
TOLD_EVERY_S = 60.0
#: Its clips are tried again after this: it needs a person, so trying often is of no use.
REFUSED_PAUSE_S = 60.0


class WorkerState:
    """What the tasks of this process share, from start-up to shutdown."""

    def __init__(
        self, engine: sa.Engine, settings: Settings, models: Models, pipeline: Pipeline, name: str
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.draining = threading.Event()
        self.foreign = ForeignChunks(self.draining, settings.ledger.queue_lease_s)
        self._name = name
        self._models = models
        self._pipeline = pipeline
        self._quarantine = Quarantine(settings)
        self._clips = ThreadPoolExecutor(settings.worker.clips_in_flight, thread_name_prefix="clip")
        self._late = ThreadPoolExecutor(settings.worker.concurrency, thread_name_prefix="late")
        self._late_free = threading.Semaphore(settings.worker.concurrency)
        self._held: set[int] = set()
        #: By token, the clips to give back once the database answers again. Until then their leases are renewed.
        self._given_up: dict[int, dict[int, float]] = {}
        self._refused_at = float("-inf")
        self._limits = settings.ledger
        self._deadline_s = settings.worker.chunk_deadline_s
        self._database_away = False
        self._counting = threading.Lock()
        self.chunks_taken = self.chunks_in_hand = 0
        #: When broker and database have both answered last.
        self.answered_at = float("-inf")
        #: Whether this worker seems to have been given a database of its own by mistake.
        self.wrong_database = False

    def work(self, chunk: Chunk) -> Counter[str]:
        """Bring the chunk's clips that are still to do to a final state, or give them back.

        Clips that take long go on behind the chunk's back: the ledger, not the message, keeps them safe.

        Raises:
            OtherLedgerError, NoSuchRunError: the chunk is not for this worker.
            DatabaseError: the database was out of reach for too long.
        """
        with self.in_hand():
            self._wait_for_network()
            ids = [clip_id for clip_id, _ in chunk.clips]
            with self._claiming(ids) as token:
                claiming = partial(
                    ledger.claim, worker=self._name, limits=self._limits, token=token
                )
                # A chunk that is not claimed yet has nothing to lose by waiting.
                claim = self._patiently(partial(claiming, self.engine, chunk), math.inf)
                self.foreign.end_row()
                counts = Counter(skipped=len(ids) - len(claim.clips))
                if claim.clips:
                    counts += self._begin(chunk.run_id, claim)
                else:
                    self._held.discard(token)
            return counts

    @property
    def batchers(self) -> list[Batcher]:
        return self._models.batchers

    def renew(self) -> None:
        """Lengthen the leases of everything being worked on here."""
        ledger.renew(self.engine, list(self._held), self._limits)

    def give_back(self) -> None:
        """Give back the clips of claims that were given up while the database was away."""
        for token, delays_s in list(self._given_up.items()):
            ledger.release(self.engine, token, delays_s)
            del self._given_up[token]
            self._held.discard(token)

    def close(self) -> None:
        """Record or give back what is still being worked on."""
        self._late.shutdown()
        self._give_back_at_the_end()
        self._clips.shutdown(wait=False, cancel_futures=True)
        self._quarantine.close()
        self._pipeline.close()
        self._models.close()
        self.engine.dispose()

    @contextmanager
    def in_hand(self) -> Iterator[None]:
        with self._counting:
            self.chunks_taken += 1
            self.chunks_in_hand += 1
        try:
            yield
        finally:
            with self._counting:
                self.chunks_in_hand -= 1

    @contextmanager
    def _claiming(self, ids: list[int]) -> Iterator[int]:
        """Yield a token for a claim of clips; if the block fails for the database's sake, they go back uncounted."""
        token = ledger.new_token()
        self._held.add(token)
        try:
            yield token
        except DatabaseError as error:
            self._give_up(token, ids, error)
            raise
        except BaseException:
            # Something of the clips' own may be the cause: their lease ends, which counts as a crash.
            self._held.discard(token)
            raise

    def _give_up(self, token: int, clip_ids: Iterable[int], error: DatabaseError) -> None:
        pause_s = REFUSED_PAUSE_S if error.bug else 0.0
        self._given_up[token] = dict.fromkeys(clip_ids, pause_s)

    def _give_back_at_the_end(self) -> None:
        give_up = monotonic() + DRAIN_S
        while self._given_up and monotonic() < give_up:
            try:
                self.give_back()
            except DatabaseError:
                sleep(LOOK_UP_S)

    def _begin(self, run_id: int, claim: Claim) -> Counter[str]:
        try:
            plan = self._patiently(partial(self._models.take, run_id))
        except DatabaseError:
            raise
        except (ServiceError, ModelError) as error:
            reason = error if isinstance(error, ModelError) else ModelError(reason=str(error))
            counts = self._record(claim, [Failure(clip.id, reason) for clip in claim.clips], ())
            self._held.discard(claim.token)
            return counts
        # In a copy of this context, so that what its thread logs names the run and the chunk.
        running = ChunkInProgress(
            claim,
            lambda clip: self._clips.submit(copy_context().run, self._classify, clip, plan),
            self._deadline_s,
        )
        try:
            running.go_on(PATIENCE_S, self.draining)
            counts = self._record(claim, running.collect(), plan.model.label_ids)
        except BaseException:
            self._models.give_back(plan)
            raise
        if (
            running.unfinished
            and not self.draining.is_set()
            and self._late_free.acquire(blocking=False)
        ):
            self._late.submit(copy_context().run, self._end_late, running, plan)
            return counts + Counter(late=len(claim.clips) - counts.total())
        return counts + self._end(running, plan)

    def _end_late(self, running: ChunkInProgress, plan: RunPlan) -> None:
        try:
            self._end(running, plan)
        except DatabaseError as error:
            self._give_up(running.claim.token, [clip.id for clip in running.claim.clips], error)
            logger.warning(
                "late clips are given back: %s", error, extra={"action": "late_given_back"}
            )
        except Exception:
            self._held.discard(running.claim.token)
            logger.exception(
                "late clips were not recorded; their leases will end", extra={"action": "late_lost"}
            )
        finally:
            self._late_free.release()

    def _end(self, running: ChunkInProgress, plan: RunPlan) -> Counter[str]:
        try:
            running.go_on(self._deadline_s, self.draining)
            running.give_back()
            counts = self._record(running.claim, running.collect(), plan.model.label_ids)
            self._patiently(
                partial(ledger.release, self.engine, running.claim.token, running.given_back)
            )
            self._held.discard(running.claim.token)
        finally:
            self._models.give_back(plan)
        return counts + Counter(released=len(running.given_back))

    def _record(
        self, claim: Claim, outcomes: list[Outcome], label_ids: tuple[int, ...]
    ) -> Counter[str]:
        if not outcomes:
            return Counter()
        finish = partial(ledger.finish, self.engine, claim, outcomes, label_ids, self._limits)
        began = monotonic()
        try:
            counts = Counter(self._patiently(finish))
        except DatabaseError as error:
            if len(outcomes) == 1 or not error.bug:
                raise
            return self._record_each(claim, outcomes, label_ids)
        stages = metrics.chunk(counts, outcomes, monotonic() - began)
        logger.info(
            "%s; %s",
            ", ".join(f"{clips} {outcome}" for outcome, clips in counts.items() if clips),
            ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in stages.items()),
            extra={
                "action": "chunk_done",
                **counts,
                **{f"{stage}_s": round(stages[stage], 3) for stage in stages},
            },
        )
        return counts

    def _record_each(
        self, claim: Claim, outcomes: list[Outcome], label_ids: tuple[int, ...]
    ) -> Counter[str]:
        """Record outcomes one by one: values of one clip that the database refuses cost its neighbours nothing."""
        counts: Counter[str] = Counter()
        refused = None
        for outcome in outcomes:
            try:
                counts += self._record(claim, [outcome], label_ids)
            except DatabaseError as error:
                refused = error
        if refused:
            raise refused
        return counts

    def _patiently(self, transaction: Callable[[], T], outage_s: float | None = None) -> T:
        """Do a transaction, again and again while the database is out of reach; raises DatabaseError in the end."""
        give_up = monotonic() + (self._limits.outage_s if outage_s is None else outage_s)
        while True:
            try:
                ended = transaction()
            except DatabaseError as error:
                stopping = self.draining.wait(OUTAGE_PAUSE_S)
                if error.bug:
                    self._tell_refused(error)
                    raise
                if stopping or monotonic() > give_up:
                    raise
                if not self._database_away:
                    logger.warning("%s", error, extra={"action": "database_away"})
                self._database_away = True
            else:
                self._database_away = False
                return ended

    def _tell_refused(self, error: DatabaseError) -> None:
        if monotonic() > self._refused_at + TOLD_EVERY_S:
            self._refused_at = monotonic()
            logger.error("%s", error, exc_info=error, extra={"action": "statement_refused"})

    def _classify(self, clip: Claimed, plan: RunPlan) -> Outcome | Postponed:
        if clip.crashes >= SUSPECT_CRASHES:
            return self._quarantine.classify(clip, plan.options)
        return self._pipeline.classify(clip, plan)

    def _wait_for_network(self) -> None:
        if self._pipeline.offline:
            logger.warning("no network: taking no chunks for now", extra={"action": "offline"})
        while self._pipeline.offline and not self.draining.wait(LOOK_UP_S):
            pass


#: Set at the worker's start-up, before it takes its first message.
state: WorkerState | None = None


@broker.app.task(name=broker.TASK, bind=True)
def classify_chunk(self: Task[Any, Any], message: dict[str, Any]) -> dict[str, int]:
    """Work on one chunk; what is returned is what Flower shows."""
    assert state is not None
    if state.draining.is_set():
        raise Reject("this worker is stopping", requeue=True)
    try:
        chunk = broker.decode(message)
    except MessageError as error:
        logger.error("%s", error, extra={"action": "message_refused"})  # noqa: TRY400 - the sentence says it all
        return {"refused": 1}
    except broker.OtherVersionError as error:
        return _put_back(self, message, foreign.of_another_version(error.version))
    with logs.about(run_id=chunk.run_id, chunk_id=self.request.id):
        try:
            return {name: count for name, count in state.work(chunk).items() if count}
        except DatabaseError as error:
            if state.draining.is_set():
                raise Reject(str(error), requeue=True) from None
            logger.warning(
                "the chunk's clips are given back: %s", error, extra={"action": "chunk_given_back"}
            )
            return {"given_back": len(chunk.clips)}
        except ledger.OtherLedgerError as error:
            return _put_back(
                self, message, foreign.of_another_ledger(chunk.ledger_id, error.ledger_id)
            )
        except ledger.NoSuchRunError:
            # It was deleted while its chunks waited: nobody needs them any more.
            logger.info("the run of this chunk is deleted", extra={"action": "no_such_run"})
            return {"dropped": 1}


def _put_back(task: Task[Any, Any], message: dict[str, Any], sentence: str) -> dict[str, int]:
    assert state is not None
    shown = str(getattr(task.request, "argsrepr", ""))
    try:
        with state.in_hand():
            return state.foreign.put_back(message, str(task.request.id), shown, sentence)
    except ServiceError as error:
        raise Reject(str(error), requeue=True) from error
