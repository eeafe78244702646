"""The worker process of `celery -A workers.app`: start-up, timers, readiness, clean shutdown."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

import sqlalchemy as sa
from celery import signals

from db import brake, schema
from db.identity import with_queue
from db.session import connect
from earmark.core import broker
from earmark.core.errors import BROKEN_EXIT, SERVICE_EXIT, EarmarkError, ServiceError
from earmark.core.processes import isolate_imports, keep_to_cores
from earmark.core.settings import Settings
from producer.feeder import Feeder
from workers import logs, metrics_server, tasks
from workers.clip import WindowQueue
from workers.foreign_chunks import WrongDatabase
from workers.loading.loaders import Loaders
from workers.models import Models

logger = logging.getLogger(__name__)

#: A timer's failures are logged once in this many: an hour without a broker must not fill the disk.
LOGGED_EACH = 60
#: A failed timer runs again after this: no lease may end because one renewal met a restart.
RETRY_S = 1.0
#: A worker is not ready if its broker and database have not both answered within this.
ANSWERED_S = 30.0
#: Checks per `idle_s`: one check alone may meet a chunk that waits by chance.
CUT_OFF_CHECKS = 8
#: A worker that pauses tells it within this.
PAUSE_CHECK_S = 1.0
#: A run whose clips fail on every worker is paused within this.
BRAKE_S = 2.0
#: A worker with the wrong database logs it within this.
DATABASE_CHECK_S = 2.0


def _read_settings() -> Settings:
    try:
        return Settings.read()
    except ServiceError as error:
        # Celery prints the traceback of any other exception.
        sys.stderr.write(f"{error}\n")
        raise SystemExit(SERVICE_EXIT) from error


# `celery -A` has put the working directory on the path. Nothing may be imported from it.
isolate_imports()
_settings = _read_settings()
app = broker.configure(_settings.broker)
_stopping = threading.Event()


@signals.celeryd_init.connect
def _log_to_stderr(**_: Any) -> None:
    logs.set_up(as_json=_settings.worker.log_json)


@signals.setup_logging.connect
def _log_from(loglevel: int, **_: Any) -> None:
    logging.getLogger().setLevel(loglevel)


# The one signal that comes before Celery chooses its queues.
@signals.celeryd_init.connect
def _get_ready(sender: str, **_: Any) -> None:
    try:
        keep_to_cores(_settings.worker.cores)
        if _settings.worker.metrics_port:
            metrics_server.serve(_settings.worker, _is_ready)
        tasks.state = _new_state(sender)
    except EarmarkError as error:
        _end_unready(str(error))
    except Exception as error:
        logger.exception("the worker cannot start", extra={"action": "start_failed"})
        _end_unready(f"The worker cannot start: {error!r}. The traceback is in its log.")


def _end_unready(sentence: str) -> None:
    # After an exception here, Celery would run a worker that takes messages and cannot use them.
    logging.shutdown()
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()
    os._exit(SERVICE_EXIT)


def _new_state(hostname: str) -> tasks.WorkerState:
    if not _settings.broker.url:
        cure = "`earmark run` and `earmark up` set it"
        raise ServiceError(reason=f"A worker needs EARMARK_BROKER__URL; {cure}.")
    _check_broker()
    engine = connect(_settings.database_url, _settings.database)
    schema.check(engine)
    schema.check_rights(engine)
    settings = with_queue(_settings, engine)
    broker.configure(settings.broker)
    loaders = Loaders(settings, WindowQueue())
    models = Models(engine, settings, loaders.scored)
    models.load(settings.model.name, settings.model.revision)
    loaders.wait_until_ready()
    return tasks.WorkerState(engine, settings, models, loaders, f"{hostname}:{os.getpid()}")


def _check_broker() -> None:
    try:
        broker.check()
    except ServiceError as error:
        if broker.is_unusable(error):
            raise
        logger.warning("%s The worker tries again until it can.", error)


@signals.worker_ready.connect
def _start_timers(**_: Any) -> None:
    state = _ready_state()
    settings = state.settings
    feeder = Feeder(state.engine, settings)
    database = WrongDatabase(state.engine, settings)
    metrics_server.register(state, feeder)
    _every(settings.ledger.lease_s / 3, state.renew)
    _every(RETRY_S, state.give_back)
    _every(settings.ledger.feed_every_s, partial(_feed, feeder))
    _every(DATABASE_CHECK_S, partial(_check_database, database))
    _every(PAUSE_CHECK_S, state.beat)
    _every(BRAKE_S, partial(_brake, state.engine, str(settings.broker.queue)))
    _every(settings.worker.idle_s / CUT_OFF_CHECKS, _CutOff(state).check)
    logger.info("ready, with the model %s", settings.model.name, extra={"action": "ready"})


@signals.worker_shutting_down.connect
def _drain(**_: Any) -> None:
    _stopping.set()
    _ready_state().draining.set()


@signals.worker_shutdown.connect
def _close(**_: Any) -> None:
    _ready_state().close()
    logging.shutdown()
    # Python would wait for threads whose server does not answer. Their clips are given back.
    os._exit(os.EX_OK)


def _ready_state() -> tasks.WorkerState:
    assert tasks.state is not None
    return tasks.state


class _CutOff:
    """Ends this process if chunks wait but none reaches it for a while (exit 70).

    A supervisor starts another process, which the chunks reach.
    """

    def __init__(self, state: tasks.WorkerState) -> None:
        self._state = state
        self._taken = self._checks = 0

    def check(self) -> None:
        state = self._state
        idle = not state.chunks_in_hand and state.chunks_taken == self._taken
        self._taken = state.chunks_taken
        if idle and not state.pause and broker.queue_length():
            self._checks += 1
        else:
            self._checks = 0
        if self._checks == CUT_OFF_CHECKS:
            logger.critical(
                "chunks wait and none has come for %.0f s; the worker ends", _settings.worker.idle_s
            )
            os._exit(BROKEN_EXIT)


def _feed(feeder: Feeder) -> None:
    state = _ready_state()
    feeder.shares_queue = state.foreign.seen
    limits = [batcher.classifier.limits for batcher in state.batchers]
    feeder.batch_windows = max((limit.windows for limit in limits), default=0)
    feeder.feed()
    state.answered_at = monotonic()


def _brake(engine: sa.Engine, queue: str) -> None:
    for sentence in brake.pause_failing(engine, queue):
        logger.error("%s", sentence, extra={"action": "run_paused"})


def _check_database(database: WrongDatabase) -> None:
    database.check()
    _ready_state().wrong_database = database.suspected


def _is_ready() -> bool:
    """Return whether the model is loaded, chunks come that are ours, and the services answer."""
    state = tasks.state
    if state is None or _stopping.is_set() or state.wrong_database or state.foreign.nothing_else:
        return False
    if state.pause:
        return False
    return monotonic() - state.answered_at < ANSWERED_S


def _every(seconds: float, act: Callable[[], object]) -> None:
    threading.Thread(target=_repeat, args=(seconds, act), daemon=True).start()


def _repeat(seconds: float, act: Callable[[], object]) -> None:
    failures = 0
    while not _stopping.wait(min(seconds, RETRY_S) if failures else seconds):
        try:
            act()
            failures = 0
        except Exception as error:
            if failures % LOGGED_EACH == 0:
                logger.warning("%s", error, extra={"action": "timer_failed"})
            failures += 1
