"""Clips that people retry and cancel."""

from __future__ import annotations

import sqlalchemy as sa

from db import changes, feeding, ledger, runs
from earmark.core import clips as words
from earmark.core.errors import Dns, NotFound
from earmark.core.settings import Ledger
from tests.db.builders import chunk_of, labels, row, submit, success

LIMITS = Ledger()


def test_cancelled_clips_are_final_and_failed_ones_can_be_retried(engine: sa.Engine) -> None:
    run_id, ids = submit(engine, 3)
    claim = ledger.claim(engine, chunk_of(engine, ids[:2]), worker="a", limits=LIMITS)
    failures = [
        words.Failure(ids[0], NotFound(status=404)),
        words.Failure(ids[1], NotFound(status=404)),
    ]
    ledger.finish(engine, claim, failures, (), LIMITS)
    assert changes.cancel(engine, run_id) == 1
    assert ledger.claim(engine, chunk_of(engine, ids), worker="a", limits=LIMITS).clips == ()
    assert changes.retry_failed(engine, run_id, ["dns"]) == 0
    assert changes.retry_failed(engine, run_id, ["not_found"]) == 2
    assert row(engine, ids[0]).error_code is None


def test_a_cancelled_run_is_final_and_stays_cancelled(engine: sa.Engine) -> None:
    run_id, ids = submit(engine, 3)
    feeding.pick(engine, "clips", 10, LIMITS)
    claim = ledger.claim(engine, chunk_of(engine, ids[:2]), worker="a", limits=LIMITS)
    assert changes.cancel(engine, run_id) == 3
    assert runs.progress(engine, run_id).finished
    ended = [words.Failure(ids[0], Dns(host="h")), success(ids[1])]
    assert ledger.finish(engine, claim, ended, labels(engine), LIMITS)["lost"] == 2
    assert {row(engine, clip_id).state for clip_id in ids} == {"cancelled"}
    assert feeding.pick(engine, "clips", 10, LIMITS) == []
