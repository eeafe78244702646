"""The one Celery task: claim a chunk's clips, classify them, record their outcomes."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, TypeVar

from celery.exceptions import Reject

from db import ledger, passes, reuse, runs, worker_registry
from earmark.core import broker
from earmark.core.clips import Failure
from earmark.core.errors import BY_CODE, DatabaseError, MessageError, ModelError, ServiceError
from workers import foreign_chunks, logs, metrics
from workers.chunk import CHECK_EVERY_S, DRAIN_S, PATIENCE_S, ChunkInProgress
from workers.fitness import Fitness
from workers.foreign_chunks import ForeignChunks
from workers.quarantine import Quarantine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import sqlalchemy as sa
    from celery import Task

    from db.claims import Claim
    from earmark.core.clips import Chunk, Outcome, Postponed, Success
    from earmark.core.settings import Settings
    from workers.clip import ClipInWork
    from workers.loading.loaders import Loaders
    from workers.loading.process import Known
    from workers.models import Models, RunPlan
    from workers.scoring.batcher import Batcher

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: The pause between two tries while the database is out of reach.
OUTAGE_PAUSE_S = 1.0
#: A statement that the database refuses is logged at most this often.
LOG_EVERY_S = 60.0
#: The clips of a refused statement are tried again after this: rarely, as it needs a person.
REFUSED_PAUSE_S = 60.0
#: A worker that pauses puts a chunk back for others, and then waits for so long.
PUT_BACK_PAUSE_S = 3.0
#: A clip that this worker gave back is left to the others for so long.
LEFT_PAUSE_S = 0.25
#: In all for so long: the others are up by the database, but may hear nothing from the broker.
LEFT_S = 60.0
#: A worker says this often that it is up, and at once that it pauses.
BEAT_S = 5.0


class WorkerState:
    """The state that all tasks of this process share, from start-up to shutdown.

    There is one per worker, `tasks.state`. Timers of the process call `renew` and `give_back`;
    `close` records or gives back the rest when the worker stops.
    """

    def __init__(
        self, engine: sa.Engine, settings: Settings, models: Models, loaders: Loaders, name: str
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.draining = threading.Event()
        self.foreign = ForeignChunks(self.draining, settings.ledger.queue_lease_s)
        self.fitness = Fitness(name, settings.fetch.file_roots)
        self._name = name
        self._beaten_at = float("-inf")
        self._told: worker_registry.Pause | None = None
        self._models = models
        self._loaders = loaders
        self._quarantine = Quarantine(settings)
        self._suspects = ThreadPoolExecutor(1, thread_name_prefix="suspect")
        self._late = ThreadPoolExecutor(settings.worker.concurrency, thread_name_prefix="late")
        self._late_free = threading.Semaphore(settings.worker.concurrency)
        #: Tokens of the claims whose leases are renewed.
        self._held: set[int] = set()
        #: Since when clips, by id, are left to other workers.
        self._left_since: dict[int, float] = {}
        #: By id, the clips of all chunks until these are recorded.
        self._in_work: dict[int, ClipInWork] = {}
        #: By token, the clips to give back once the database answers again, each with the seconds
        #: until it may be tried again. Their leases are renewed until then.
        self._given_up: dict[int, dict[int, float]] = {}
        self._refused_at = float("-inf")
        self._ledger_settings = settings.ledger
        self._deadline_s = settings.worker.chunk_deadline_s
        self._database_away = False
        self._counting = threading.Lock()
        self.chunks_taken = self.chunks_in_hand = 0
        #: When the broker and the database last answered, both.
        self.answered_at = float("-inf")
        #: Whether this worker seems to have been given a database of its own by mistake.
        self.wrong_database = False

    def work(self, chunk: Chunk) -> Counter[str]:
        """Classify the chunk's clips that are not done yet, and record them or give them back.

        Return how many clips ended in which way, and how many by which error.

        Slow clips go on in the background after this returns: leases, not the message, keep them
        safe.

        Raises:
            OtherLedgerError, NoSuchRunError: the chunk is not for this worker.
            DatabaseError: the database was out of reach for too long.
        """
        with self.in_hand():
            self._wait_for_network()
            ids = [clip_id for clip_id, _ in chunk.clips]
            with self._claiming(ids) as token:
                claim = self._without_returned(self._claim(chunk, token))
                self.foreign.note_own_chunk()
                counts = Counter(skipped=len(set(ids) - claim.ids))
                ids += claim.ids
                if claim.clips:
                    counts += self._begin(claim)
                else:
                    self._held.discard(token)
            # A copy, since clips that are late add to it.
            return counts + Counter(dict(claim.errors))

    def _claim(self, chunk: Chunk, token: int) -> Claim:
        claim = partial(
            ledger.claim,
            self.engine,
            chunk,
            worker=self._name,
            limits=self._ledger_settings,
            token=token,
        )
        # A chunk that is not claimed yet loses nothing by waiting.
        return self._through_outage(chunk.run_id, claim, math.inf)

    def _without_returned(self, claim: Claim) -> Claim:
        """Leave the clips that this worker gave back to those workers that have not tried them."""
        returned = [clip for clip in claim.clips if self._name in clip.workers_before]
        if not returned:
            return claim
        fit = set()
        for worker in worker_registry.up(self.engine, str(self.settings.broker.queue)):
            if not worker.pause and worker.name != self._name:
                fit.add(worker.name)
        left = {}
        for clip in returned:
            if fit - set(clip.workers_before) and self._may_leave(clip.id):
                left[clip.id] = LEFT_PAUSE_S
        ledger.release(self.engine, claim.token, left)
        return replace(claim, clips=tuple(clip for clip in claim.clips if clip.id not in left))

    def _may_leave(self, clip_id: int) -> bool:
        """Return whether others have not yet had LEFT_S to take a clip."""
        at = monotonic()
        # Those that others took are not seen here again.
        for left_id, since in list(self._left_since.items()):
            if at > since + 2 * LEFT_S:
                self._left_since.pop(left_id, None)
        return at < self._left_since.setdefault(clip_id, at) + LEFT_S

    @property
    def pause(self) -> worker_registry.Pause | None:
        """Why this worker takes no chunks now."""
        if self._loaders.offline:
            return worker_registry.Pause(
                "No network: nearly all downloads, from many hosts, find no server."
            )
        return self.fitness.pause

    def beat(self) -> None:
        """Note in the ledger that this worker is up, and whether it pauses."""
        pause = self.fitness.pause
        if pause and pause.run_id and not runs.is_going(self.engine, pause.run_id):
            self.fitness.end_pause()
        pause = self.pause
        if pause == self._told and monotonic() < self._beaten_at + BEAT_S:
            return
        roots = [str(root) for root in self.settings.fetch.file_roots]
        queue = str(self.settings.broker.queue)
        worker_registry.beat(self.engine, self._name, queue, roots, pause)
        self._told, self._beaten_at = pause, monotonic()

    @property
    def batchers(self) -> list[Batcher]:
        return self._models.batchers

    def renew(self) -> None:
        """Renew the leases of all clips in work here."""
        ledger.renew(self.engine, list(self._held), self._ledger_settings)

    def give_back(self) -> None:
        """Give back the clips of claims that were given up during an outage of the database."""
        for token, delays_s in list(self._given_up.items()):
            ledger.release(self.engine, token, delays_s)
            del self._given_up[token]
            self._held.discard(token)

    def close(self) -> None:
        """Record or give back the clips in work, and close everything."""
        self._late.shutdown()
        self._give_back_at_the_end()
        self._suspects.shutdown(wait=False, cancel_futures=True)
        with suppress(DatabaseError):
            worker_registry.leave(self.engine, self._name)
        self._quarantine.close()
        self._loaders.close()
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
        """Yield a token for a claim of clips.

        If the block fails because of the database, the clips are given back without a crash.
        """
        token = ledger.new_token()
        self._held.add(token)
        try:
            yield token
        except DatabaseError as error:
            self._give_up(token, ids, error)
            raise
        except BaseException:
            # The clips may be the cause, so their leases end, which counts as a crash.
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
                sleep(CHECK_EVERY_S)

    def _begin(self, claim: Claim) -> Counter[str]:
        with ExitStack() as cleanup:
            plans: dict[int, RunPlan] = {}
            failures: list[Outcome] = []
            for part in claim.by_run():
                try:
                    plans[part.run_id] = self._take_plan(part.run_id, cleanup)
                except DatabaseError:
                    raise
                except (ServiceError, ModelError) as error:
                    failures += _without_model(part, error)
            if not plans:
                counts = self._record(claim, failures, plans)
                self._held.discard(claim.token)
                return counts
            running = ChunkInProgress(claim, plans, self._deadline_s, self)
            cleanup.callback(self._let_go, running)
            running.run(PATIENCE_S, self.draining)
            counts = self._record(claim, failures + running.collect(), plans)
            late = running.unfinished and not self.draining.is_set()
            if late and self._late_free.acquire(blocking=False):
                self._late.submit(copy_context().run, self._end_late, running, cleanup.pop_all())
                return counts + Counter(late=len(claim.clips) - counts.total())
            return counts + self._end(running)

    def _take_plan(self, run_id: int, cleanup: ExitStack) -> RunPlan:
        plan = self._through_outage(run_id, partial(self._models.take, run_id))
        cleanup.callback(self._models.give_back, plan)
        return plan

    def _end_late(self, running: ChunkInProgress, cleanup: ExitStack) -> None:
        try:
            with cleanup:
                self._end(running)
        except DatabaseError as error:
            claim = running.claim
            self._give_up(claim.token, [clip.id for clip in claim.clips], error)
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

    def _end(self, running: ChunkInProgress) -> Counter[str]:
        token = running.claim.token
        running.run(math.inf, self.draining)
        running.give_back()
        counts = self._record(running.claim, running.collect(), running.plans)
        release = partial(ledger.release, self.engine, token, running.given_back)
        self._through_outage(running.claim.run_id, release)
        self._held.discard(token)
        return counts + Counter(released=len(running.given_back))

    def _let_go(self, running: ChunkInProgress) -> None:
        running.give_back()
        for clip in running.claim.clips:
            self._in_work.pop(clip.id, None)

    def _record(
        self, claim: Claim, outcomes: list[Outcome], plans: Mapping[int, RunPlan]
    ) -> Counter[str]:
        outcomes = self.fitness.judge(claim, outcomes)
        counts: Counter[str] = Counter()
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                claim.errors[outcome.error.code] += 1
        for part in claim.by_run():
            ids = part.ids
            own = [outcome for outcome in outcomes if outcome.clip_id in ids]
            plan = plans.get(part.run_id)
            counts += self._write(part, own, plan.model.label_ids if plan else ())
        return counts

    def _write(
        self, claim: Claim, outcomes: list[Outcome], label_ids: tuple[int, ...]
    ) -> Counter[str]:
        if not outcomes:
            return Counter()
        finish = partial(
            ledger.finish, self.engine, claim, outcomes, label_ids, self._ledger_settings
        )
        began = monotonic()
        try:
            counts = Counter(self._through_outage(claim.run_id, finish))
            self.fitness.recorded()
        except DatabaseError as error:
            if len(outcomes) == 1 or not error.bug:
                raise
            return self._record_each(claim, outcomes, label_ids)
        stages = metrics.stage_seconds(outcomes, monotonic() - began)
        metrics.chunk(counts, outcomes, stages)
        _log_recorded(counts, stages)
        return counts

    def _record_each(
        self, claim: Claim, outcomes: list[Outcome], label_ids: tuple[int, ...]
    ) -> Counter[str]:
        """Record outcomes one by one, so that refused values of a clip cost no other clip."""
        counts: Counter[str] = Counter()
        refused = None
        for outcome in outcomes:
            try:
                counts += self._write(claim, [outcome], label_ids)
            except DatabaseError as error:
                refused = error
        if refused:
            raise refused
        return counts

    def _through_outage(
        self, run_id: int, transaction: Callable[[], T], outage_s: float | None = None
    ) -> T:
        """Do a transaction; try again while the database is out of reach.

        Raises:
            DatabaseError: the outage was longer than `outage_s` (EARMARK_LEDGER__OUTAGE_S), the
                worker is stopping, or the statement is refused.
        """
        if outage_s is None:
            outage_s = self._ledger_settings.outage_s
        give_up = monotonic() + outage_s
        while True:
            try:
                result = transaction()
            except DatabaseError as error:
                stopping = self.draining.wait(OUTAGE_PAUSE_S)
                if error.bug:
                    self._log_refused(error)
                    self.fitness.refused(run_id, error)
                    raise
                if stopping or monotonic() > give_up:
                    raise
                if not self._database_away:
                    logger.warning("%s", error, extra={"action": "database_away"})
                self._database_away = True
            else:
                self._database_away = False
                return result

    def _log_refused(self, error: DatabaseError) -> None:
        if monotonic() > self._refused_at + LOG_EVERY_S:
            self._refused_at = monotonic()
            logger.error("%s", error, exc_info=error, extra={"action": "statement_refused"})

    # The ways in which a chunk's clips come to their end.

    def load(self, clips: list[ClipInWork], *, join: bool) -> None:
        self._in_work.update((clip.clip_id, clip) for clip in clips)
        self._loaders.deal(
            (clip, replace(clip.plan.job, joins=join, held=clip.held)) for clip in clips
        )

    def in_work(self, clip_id: int) -> ClipInWork | None:
        return self._in_work.get(clip_id)

    def quarantine(self, clip: ClipInWork) -> None:
        self._suspects.submit(copy_context().run, self._classify_alone, clip)

    def _classify_alone(self, clip: ClipInWork) -> None:
        if not clip.wanted:
            return
        try:
            outcome = self._quarantine.classify(clip.claimed, clip.plan.options)
        except Exception as error:
            logger.exception("the quarantine failed", extra={"action": "quarantine_failed"})
            outcome = Failure(clip.clip_id, ModelError(reason=repr(error)))
        clip.end(clip, outcome)

    def result_of(self, known: Known, clip: ClipInWork) -> Success | None:
        result = partial(reuse.result, self.engine, known.clip_id, clip.clip_id)
        success = self._through_outage(clip.plan.run_id, result)
        if success is None or known.source not in (None, success.source):
            return None
        return replace(success, timings=known.timings)

    def verdict(self, clip: ClipInWork) -> Outcome | Postponed | None:
        verdict = partial(passes.verdict, self.engine, clip.claimed, clip.plan.options)
        return self._through_outage(clip.plan.run_id, verdict)

    def forget(self, clips: list[ClipInWork]) -> None:
        self._loaders.forget(clips)

    def drain(self) -> None:
        self._loaders.drain()

    def _wait_for_network(self) -> None:
        if self._loaders.offline:
            logger.warning("no network: taking no chunks for now", extra={"action": "offline"})
        while self._loaders.offline and not self.draining.wait(CHECK_EVERY_S):
            pass


def _without_model(claim: Claim, error: ServiceError | ModelError) -> list[Outcome]:
    """Return the failures of clips whose model cannot be had."""
    reason = error if isinstance(error, ModelError) else ModelError(reason=str(error))
    return [Failure(clip.id, reason) for clip in claim.clips]


def _log_recorded(counts: Counter[str], stages: dict[str, float]) -> None:
    facts: dict[str, object] = {"action": "chunk_done", **counts}
    for stage, seconds in stages.items():
        facts[f"{stage}_s"] = round(seconds, 3)
    clips = ", ".join(f"{clips} {outcome}" for outcome, clips in counts.items() if clips)
    times = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in stages.items())
    logger.info("%s; %s", clips, times, extra=facts)


#: Set at the worker's start-up, before it takes its first message.
state: WorkerState | None = None


class ClipsFailedError(Exception):
    """A chunk's clips all failed: Flower shows it as a failure."""


@broker.app.task(name=broker.TASK, bind=True, throws=(ClipsFailedError,))
def classify_chunk(self: Task[Any, Any], message: dict[str, Any]) -> dict[str, int]:
    """Work on one chunk; Flower shows the returned counts."""
    assert state is not None
    if state.draining.is_set():
        raise Reject("this worker is stopping", requeue=True)
    if state.fitness.pause:
        return _leave_to_others(self, message)
    try:
        chunk = broker.decode(message)
    except MessageError as error:
        logger.error("%s", error, extra={"action": "message_refused"})  # noqa: TRY400 - no traceback needed
        return {"refused": 1}
    except broker.OtherVersionError as error:
        return _put_back(self, message, foreign_chunks.of_another_version(error.version))
    with logs.about(run_id=chunk.run_id, chunk_id=self.request.id):
        try:
            counts = state.work(chunk)
            if sentence := only_failures(counts):
                raise ClipsFailedError(sentence)
            return {name: count for name, count in counts.items() if count}
        except DatabaseError as error:
            if state.draining.is_set():
                raise Reject(str(error), requeue=True) from None
            logger.warning(
                "the chunk's clips are given back: %s", error, extra={"action": "chunk_given_back"}
            )
            return {"given_back": len(chunk.clips)}
        except ledger.OtherLedgerError as error:
            return _put_back(
                self, message, foreign_chunks.of_another_ledger(chunk.ledger_id, error.ledger_id)
            )
        except ledger.NoSuchRunError:
            # The run was deleted while its chunks waited.
            logger.info("the run of this chunk is deleted", extra={"action": "no_such_run"})
            return {"dropped": 1}


def only_failures(counts: Counter[str]) -> str | None:
    """Return the errors of a chunk of which no clip did well, the most frequent first."""
    failed = sum(counts[outcome] for outcome in ("failed", "retried", "given_back"))
    if not failed or any(counts[outcome] for outcome in ("done", "late", "lost", "released")):
        return None
    errors = [f"{code} ({clips})" for code, clips in counts.most_common() if code in BY_CODE]
    return ", ".join(errors)


def _leave_to_others(task: Task[Any, Any], message: dict[str, Any]) -> dict[str, int]:
    assert state is not None
    shown = str(getattr(task.request, "argsrepr", ""))
    try:
        broker.put_back(message, str(task.request.id), shown, state.settings.ledger.queue_lease_s)
    except ServiceError as error:
        raise Reject(str(error), requeue=True) from error
    state.draining.wait(PUT_BACK_PAUSE_S)
    return {"put_back": 1}


def _put_back(task: Task[Any, Any], message: dict[str, Any], sentence: str) -> dict[str, int]:
    assert state is not None
    shown = str(getattr(task.request, "argsrepr", ""))
    try:
        with state.in_hand():
            return state.foreign.put_back(message, str(task.request.id), shown, sentence)
    except ServiceError as error:
        raise Reject(str(error), requeue=True) from error
