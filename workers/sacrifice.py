"""A suspected clip in, its outcome out, worked on in a process of its own that may die of it."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from earmark import broker
from earmark.clips import Failure
from earmark.errors import WorkerLost
from workers.decode import Decoders
from workers.models import Job, Loaded, open_model
from workers.pipeline import Pipeline
from workers.polite import PoliteFetcher

if TYPE_CHECKING:
    from db.ledger import Claimed
    from earmark.clips import Outcome, Postponed
    from earmark.options import RunOptions
    from earmark.settings import Settings


def classify(clip: Claimed, options: RunOptions, settings: Settings) -> Outcome | Postponed:
    """Return the clip's outcome; a process that dies or hangs makes it `worker_lost`."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=spawn)
    try:
        return pool.submit(_classify_alone, clip, options, settings).result(settings.worker.chunk_deadline_s / 2)
    except (BrokenProcessPool, TookTooLong):
        return Failure(clip.id, WorkerLost())
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown()


def _classify_alone(clip: Claimed, options: RunOptions, settings: Settings) -> Outcome | Postponed:
    broker.configure(settings.broker)
    pipeline = Pipeline(PoliteFetcher(settings), Decoders(settings.audio, 1), 1)
    card, batcher = open_model((options.model, options.revision, options.labels), settings)
    outcome = pipeline.classify(clip, Job(options, Loaded(card, batcher, model_id=0, label_ids=())))
    pipeline.close()
    return outcome
