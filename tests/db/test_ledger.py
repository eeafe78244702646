"""The ledger: one worker claims a clip; only its holder finishes it, and counts the try then."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import sqlalchemy as sa

from db import feeding, ledger, outcomes
from db.models import Lease
from db.session import reading, writing
from earmark.core import clips as words
from earmark.core.errors import NotFound, RateLimited, ServerError, UsageError
from earmark.core.options import RunOptions
from earmark.core.settings import Ledger
from tests.db.builders import add_clips, chunk_of, expire_leases, labels, row, submit, success
from tests.end_to_end.conftest import wait_until

LIMITS = Ledger()


def test_a_chunk_of_another_ledger_or_run_takes_no_clip(engine: sa.Engine) -> None:
    submit(engine)
    _, ids = submit(engine, 2)
    ours = chunk_of(engine, ids)
    with pytest.raises(ledger.OtherLedgerError):
        ledger.claim(engine, replace(ours, ledger_id="another"), worker="w", limits=LIMITS)
    with pytest.raises(ledger.NoSuchRunError):
        ledger.claim(engine, replace(ours, run_id=99), worker="w", limits=LIMITS)
    assert ledger.claim(engine, replace(ours, run_id=1), worker="w", limits=LIMITS).clips == ()
    assert [clip.id for clip in ledger.claim(engine, ours, worker="w", limits=LIMITS).clips] == ids


def test_a_clip_that_a_run_has_already_is_not_added_again(engine: sa.Engine) -> None:
    run_id, _ = submit(engine, 3)
    same = [words.Clip("HTTPS://H:443/0.wav#part"), words.Clip("https://h/9.wav")]
    assert add_clips(engine, run_id, same) == 1


def test_a_claim_whose_answer_was_lost_is_repeated_with_its_token(engine: sa.Engine) -> None:
    _, ids = submit(engine, 2)
    token = ledger.new_token()
    lost = ledger.claim(engine, chunk_of(engine, ids), worker="w", limits=LIMITS, token=token)
    assert (
        ledger.claim(engine, chunk_of(engine, ids), worker="w", limits=LIMITS, token=token) == lost
    )
    assert ledger.claim(engine, chunk_of(engine, ids), worker="other", limits=LIMITS).clips == ()


def test_the_same_name_goes_on_with_the_same_run_and_refuses_other_options(
    engine: sa.Engine,
) -> None:
    first = ledger.open_run(engine, "mine", RunOptions(), queue="clips", chunk_size=16)
    assert ledger.open_run(engine, "mine", RunOptions(), queue="clips", chunk_size=16) == first
    with pytest.raises(UsageError, match="another top_k"):
        ledger.open_run(engine, "mine", RunOptions(top_k=1), queue="clips", chunk_size=16)


def test_a_chunk_delivered_twice_is_claimed_once(engine: sa.Engine) -> None:
    _, ids = submit(engine, 3)
    first = ledger.claim(engine, chunk_of(engine, ids), worker="a", limits=LIMITS)
    second = ledger.claim(engine, chunk_of(engine, ids), worker="b", limits=LIMITS)
    assert [clip.id for clip in first.clips] == ids
    assert [clip.attempts for clip in first.clips] == [1, 1, 1]
    assert second.clips == ()


def test_concurrent_claims_of_the_same_clips_are_disjoint(engine: sa.Engine) -> None:
    _, ids = submit(engine, 40)
    with ThreadPoolExecutor(8) as pool:
        claims = list(
            pool.map(
                lambda _: ledger.claim(engine, chunk_of(engine, ids), worker="w", limits=LIMITS),
                range(8),
            )
        )
    claimed = [clip.id for claim in claims for clip in claim.clips]
    assert sorted(claimed) == ids


def test_a_clip_that_ends_while_it_is_claimed_again_keeps_no_lease(engine: sa.Engine) -> None:
    _, ids = submit(engine, 1)
    first = ledger.claim(engine, chunk_of(engine, ids), worker="a", limits=LIMITS)
    names, claimed = labels(engine), {clip.id: clip for clip in first.clips}
    again = partial(ledger.claim, engine, chunk_of(engine, ids), worker="b", limits=LIMITS)
    with ThreadPoolExecutor(1) as pool:
        with writing(engine) as connection:
            outcomes.write(connection, first.token, [success(ids[0])], claimed, names, LIMITS)
            second = pool.submit(again)
            if engine.dialect.name == "postgresql":
                wait_until(lambda: waits_for_another(engine))
        assert second.result().clips == ()
    with reading(engine) as connection:
        assert connection.execute(sa.select(Lease.clip_id)).all() == []


def waits_for_another(engine: sa.Engine) -> bool:
    with reading(engine) as connection:
        waiting = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return bool(connection.execute(waiting).scalar_one())


def test_results_and_state_are_written_together(engine: sa.Engine) -> None:
    _, ids = submit(engine, 2)
    claim = ledger.claim(engine, chunk_of(engine, ids), worker="a", limits=LIMITS)
    outcomes = [success(ids[0]), words.Failure(ids[1], NotFound(status=404))]
    counts = ledger.finish(engine, claim, outcomes, labels(engine), LIMITS)
    assert counts == {"done": 1, "failed": 1, "retried": 0, "given_back": 0, "lost": 0}
    with reading(engine) as connection:
        results = connection.execute(
            sa.text("SELECT clip_id, label, score, duration_s FROM results")
        ).all()
        failures = connection.execute(
            sa.text("SELECT clip_id, error_code, error FROM failures")
        ).all()
    assert [tuple(result) for result in results] == [(ids[0], "siren", 0.75, 5.0)]
    assert [tuple(failure) for failure in failures] == [
        (ids[1], "not_found", "The server says there is nothing at this URL (HTTP 404).")
    ]


def test_a_worker_cannot_write_after_its_lease_ended(engine: sa.Engine) -> None:
    _, ids = submit(engine, 1)
    zombie = ledger.claim(engine, chunk_of(engine, ids), worker="a", limits=LIMITS)
    expire_leases(engine)
    assert feeding.take_back(engine, "clips") == 1
    living = ledger.claim(engine, chunk_of(engine, ids), worker="b", limits=LIMITS)
    names = labels(engine)
    assert ledger.finish(engine, zombie, [success(ids[0])], names, LIMITS)["lost"] == 1
    assert row(engine, ids[0]).state_now == "running"
    assert ledger.finish(engine, living, [success(ids[0])], names, LIMITS)["done"] == 1
    assert ledger.finish(engine, living, [success(ids[0])], names, LIMITS)["lost"] == 1
    with reading(engine) as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM top_k")) == 2


def test_a_worker_death_counts_as_a_crash_and_not_as_a_try(engine: sa.Engine) -> None:
    _, ids = submit(engine, 1)
    for _ in range(5):
        ledger.claim(engine, chunk_of(engine, ids), worker="a", limits=LIMITS)
        expire_leases(engine)
        feeding.take_back(engine, "clips")
    assert (row(engine, ids[0]).attempts, row(engine, ids[0]).crashes) == (0, 5)


def test_more_ended_leases_than_a_statement_has_parameters_are_taken_back(
    engine: sa.Engine,
) -> None:
    run_id, ids = submit(engine, 1)
    ledger.claim(engine, chunk_of(engine, ids), worker="a", limits=LIMITS)
    # Debian's SQLite takes 250,000 parameters, PostgreSQL 65,535.
    count = 300_000 if engine.dialect.name == "sqlite" else 70_000
    numbers = (
        "WITH RECURSIVE n(i) AS (SELECT CAST(:first AS integer)"
        f" UNION ALL SELECT i + 1 FROM n WHERE i < {count})"
    )
    leases = f"{numbers} INSERT INTO leases (clip_id, run_id, until) SELECT i, :run_id, 0 FROM n"
    with writing(engine) as connection:
        connection.execute(sa.text(leases), {"first": ids[0] + 1, "run_id": run_id})
    expire_leases(engine)
    assert feeding.take_back(engine, "clips") == 1
    with reading(engine) as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(Lease)) == 0


def test_a_renewed_lease_is_not_taken_back(engine: sa.Engine) -> None:
    _, ids = submit(engine, 1)
    claim = ledger.claim(engine, chunk_of(engine, ids), worker="a", limits=LIMITS)
    expire_leases(engine)
    ledger.renew(engine, [claim.token], LIMITS)
    assert feeding.take_back(engine, "clips") == 0


def test_a_transient_failure_is_tried_again_after_a_pause_and_then_final(engine: sa.Engine) -> None:
    _, ids = submit(engine, 1)
    limits = Ledger(max_attempts=2, retry_base_s=0.0)
    failure = [words.Failure(ids[0], ServerError(status=503))]
    first = ledger.claim(engine, chunk_of(engine, ids), worker="a", limits=limits)
    assert ledger.finish(engine, first, failure, (), limits)["retried"] == 1
    assert row(engine, ids[0]).state == "pending"
    second = ledger.claim(engine, chunk_of(engine, ids), worker="a", limits=limits)
    assert ledger.finish(engine, second, failure, (), limits)["failed"] == 1
    assert (row(engine, ids[0]).state, row(engine, ids[0]).attempts) == ("failed", 2)


def test_retry_after_is_honoured_up_to_the_cap(engine: sa.Engine) -> None:
    _, ids = submit(engine, 2)
    claim = ledger.claim(engine, chunk_of(engine, ids), worker="a", limits=LIMITS)
    asked = [
        words.Failure(ids[0], RateLimited(retry_after_s=100.0)),
        words.Failure(ids[1], RateLimited(retry_after_s=1e9)),
    ]
    ledger.finish(engine, claim, asked, (), LIMITS)
    pause = row(engine, ids[1]).not_before - row(engine, ids[0]).not_before
    assert pause == pytest.approx(LIMITS.retry_cap_s - 100.0, abs=1.0)
    assert ledger.claim(engine, chunk_of(engine, ids), worker="b", limits=LIMITS).clips == ()
    assert feeding.pick(engine, "clips", 10, LIMITS) == []


def test_released_clips_are_free_at_once_and_lose_no_try(engine: sa.Engine) -> None:
    _, ids = submit(engine, 2)
    claim = ledger.claim(engine, chunk_of(engine, ids), worker="a", limits=LIMITS)
    ledger.release(engine, claim.token, {ids[0]: 0.0, ids[1]: 60.0})
    again = ledger.claim(engine, chunk_of(engine, ids), worker="b", limits=LIMITS)
    assert [(clip.id, clip.attempts) for clip in again.clips] == [(ids[0], 1)]


def test_picking_is_fair_between_runs_and_bounded(engine: sa.Engine) -> None:
    first, _ = submit(engine, 30)
    second, _ = submit(engine, 30)
    picked = feeding.pick(engine, "clips", 2, LIMITS)
    assert [(part.run_id, len(part.clips)) for part in picked] == [(first, 16), (second, 16)]
    assert feeding.pick(engine, "other", 20, LIMITS) == []


def test_clips_lost_from_the_queue_are_taken_back_when_their_lease_ends(engine: sa.Engine) -> None:
    submit(engine, 3)
    feeding.pick(engine, "clips", 10, LIMITS)
    assert feeding.take_back_queued(engine, "clips", LIMITS.queue_lease_s - 10) == 0
    assert feeding.take_back_queued(engine, "clips", LIMITS.queue_lease_s) == 3
    assert len(feeding.pick(engine, "clips", 10, LIMITS)[0].clips) == 3


def test_a_model_is_registered_once_with_its_labels_in_order(engine: sa.Engine) -> None:
    assert labels(engine) == labels(engine)
    run_id, _ = submit(engine, 1)
    assert ledger.settle_model(engine, run_id, 1) == 1
    assert ledger.settle_model(engine, run_id, 2) == 1
