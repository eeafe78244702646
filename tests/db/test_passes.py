"""Runs of one pass: a claim takes the same clips of all, and each run keeps states of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from db import brake, bulk_insert, changes, feeding, ledger, passes, reuse, runs
from db.bulk_insert import listed
from db.models import Clip
from db.session import reading, writing
from earmark.core.clips import Clip as Listed
from earmark.core.clips import Failure, Postponed
from earmark.core.errors import ModelError, ServerError, UsageError
from earmark.core.options import RunOptions, of_each_model
from earmark.core.settings import Ledger
from tests.db.builders import chunk_of, expire_leases, labels, row, submit, success

if TYPE_CHECKING:
    from db.claims import Claim

LIMITS = Ledger(max_attempts=3)
MODELS = ("starter", "owner/bird net@2", "./dnsmos/")
CLIPS = 3


class Pass:
    """A pass of two models over three clips."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        # Ids of the two runs would be the same places without it.
        submit(engine, 2)
        self.run_ids = self.open()
        rows = [listed(Listed(f"https://h/{n}.wav")) for n in range(CLIPS)]
        assert set(bulk_insert.add(engine, dict.fromkeys(self.run_ids, rows)).values()) == {CLIPS}
        self.first, self.second = (self.ids(run_id) for run_id in self.run_ids)

    def open(self) -> list[int]:
        return open_runs(self.engine, "list", *MODELS[:2])

    def ids(self, run_id: int) -> list[int]:
        of_run = sa.select(Clip.id).where(Clip.run_id == run_id).order_by(Clip.id)
        with reading(self.engine) as connection:
            return list(connection.scalars(of_run))

    def claim(self, ids: list[int]) -> Claim:
        return ledger.claim(self.engine, chunk_of(self.engine, ids), worker="w", limits=LIMITS)

    def finish(self, claim: Claim, *failing: int) -> None:
        outcomes = []
        for clip in claim.clips:
            failure = Failure(clip.id, ModelError(reason="no"))
            outcomes.append(failure if clip.id in failing else success(clip.id))
        ledger.finish(self.engine, claim, outcomes, labels(self.engine), LIMITS)

    def states(self, ids: list[int]) -> list[str]:
        return [row(self.engine, clip_id).state_now for clip_id in ids]


def open_runs(engine: sa.Engine, name: str | None, *models: str) -> list[int]:
    options = of_each_model({"model": models})
    return passes.open_runs(engine, name, options, queue="clips", chunk_size=16)


@pytest.fixture
def both(engine: sa.Engine) -> Pass:
    return Pass(engine)


def taken(claim: Claim) -> list[int]:
    return sorted(clip.id for clip in claim.clips)


def test_each_model_has_a_run_that_the_name_leads_to(engine: sa.Engine) -> None:
    ids = open_runs(engine, "march", *MODELS)
    rows = [runs.get_run(engine, run_id) for run_id in ids]
    assert [run.name for run in rows] == ["march/starter", "march/bird-net-2", "march/dnsmos"]
    assert [run.options.model for run in rows] == list(MODELS)
    assert runs.in_pass(engine, rows[1]) == rows
    assert {passes.base_name(run) for run in rows} == {"march"}
    assert open_runs(engine, "march", *MODELS) == ids
    with pytest.raises(UsageError, match="another top_k"):
        passes.open_runs(
            engine, "march", [RunOptions(), RunOptions(model=MODELS[2], top_k=1)], queue="clips"
        )


def test_a_pass_without_a_name_is_called_after_its_first_run(engine: sa.Engine) -> None:
    first, _ = open_runs(engine, None, *MODELS[:2])
    run = runs.get_run(engine, first)
    assert run.name == f"run-{first}/starter"
    assert open_runs(engine, passes.base_name(run), *MODELS[:2])[0] == first
    (alone,) = open_runs(engine, None, "starter")
    assert runs.get_run(engine, alone).name == f"run-{alone}"
    assert runs.in_pass(engine, runs.get_run(engine, alone)) == [runs.get_run(engine, alone)]


def test_models_whose_runs_would_have_one_name_are_refused(engine: sa.Engine) -> None:
    with pytest.raises(UsageError, match="called the same: base, base"):
        open_runs(engine, None, "one/base", "other/base")


def test_a_model_that_joins_later_hears_what_the_others_have_heard(both: Pass) -> None:
    both.finish(both.claim(both.first))
    ids = open_runs(both.engine, "list", "later", "starter")
    assert len(runs.in_pass(both.engine, runs.get_run(both.engine, ids[0]))) == 3
    rows = [listed(Listed(f"https://h/{n}.wav")) for n in range(CLIPS)]
    assert max(bulk_insert.add(both.engine, dict.fromkeys(ids, rows)).values()) == CLIPS
    later = both.ids(ids[0])
    assert taken(both.claim(later)) == later


@pytest.mark.parametrize("of_second", [False, True])
def test_a_chunk_of_either_run_takes_the_clips_of_both(both: Pass, *, of_second: bool) -> None:
    named, same = (both.second, both.first) if of_second else (both.first, both.second)
    claim = both.claim(named[:2])
    assert taken(claim) == sorted([*named[:2], *same[:2]])
    parts = {part.run_id: part.ids for part in claim.by_run()}
    assert set(parts) == set(both.run_ids)
    assert parts[both.run_ids[1]] == set(both.second[:2])
    assert both.claim(same[:2]).clips == ()
    assert taken(both.claim(same)) == sorted([named[2], same[2]])


def test_workers_that_claim_both_at_once_never_part_a_clip_from_its_like(both: Pass) -> None:
    chunks = [both.first[:2], both.second[1:], both.second[:1], both.first[1:]]
    with ThreadPoolExecutor(4) as pool:
        claims = list(pool.map(both.claim, chunks))
    pairs = dict(zip(both.first, both.second, strict=True))
    for claim in claims:
        ids = set(taken(claim))
        assert {pairs[clip_id] for clip_id in ids & set(both.first)} == ids & set(both.second)
    assert sorted(clip for claim in claims for clip in taken(claim)) == both.first + both.second


def test_a_model_that_fails_fails_its_own_run_and_is_retried_alone(both: Pass) -> None:
    both.finish(both.claim(both.first), *both.second)
    assert both.states(both.first) == ["done"] * CLIPS
    assert both.states(both.second) == ["failed"] * CLIPS
    assert changes.retry_failed(both.engine, both.run_ids[1]) == CLIPS
    claim = both.claim(both.second)
    assert taken(claim) == both.second
    both.finish(claim)
    assert both.states([*both.first, *both.second]) == ["done"] * 2 * CLIPS


def test_a_clip_that_pauses_before_its_next_try_is_taken_along(both: Pass) -> None:
    claim = both.claim(both.first[:1])
    outcomes = [Failure(clip.id, ServerError(status=500)) for clip in claim.clips]
    ledger.finish(both.engine, claim, outcomes, (), Ledger(retry_base_s=3600))
    assert both.claim(both.first[:1]).clips == ()
    with writing(both.engine) as connection:
        due = sa.update(Clip).where(Clip.id == both.second[0])
        connection.execute(due.values(not_before=1.0))
    assert taken(both.claim(both.second[:1])) == [both.first[0], both.second[0]]


def test_a_suspect_travels_without_the_same_clip_of_the_other_run(both: Pass) -> None:
    both.claim(both.first[:1])
    expire_leases(both.engine)
    assert feeding.take_back(both.engine, "clips") == 2
    assert taken(both.claim(both.first[:1])) == both.first[:1]
    assert taken(both.claim(both.second[:1])) == both.second[:1]


def test_a_run_that_is_paused_or_cancelled_leaves_the_other_alone(both: Pass) -> None:
    brake.pause(both.engine, both.run_ids[1], "it fails")
    assert taken(both.claim(both.first[:1])) == both.first[:1]
    brake.resume(both.engine, both.run_ids[1])
    changes.cancel(both.engine, both.run_ids[0])
    assert both.states(both.first) == ["cancelled"] * CLIPS
    assert both.claim(both.first).clips == ()
    claim = both.claim(both.second)
    assert taken(claim) == both.second
    both.finish(claim)
    assert both.states(both.second) == ["done"] * CLIPS


class Then(Pass):
    """A pass whose second run hears only what the first one lets through."""

    def open(self) -> list[int]:
        return follow(self.engine, "siren", 0.75)

    def verdict(self, clip_id: int) -> Any:
        (clip,) = self.claim([clip_id]).clips
        end = passes.verdict(self.engine, clip, runs.get_run(self.engine, clip.run_id).options)
        expire_leases(self.engine)
        feeding.take_back(self.engine, "clips")
        return end


def follow(engine: sa.Engine, label: str, min_score: float) -> list[int]:
    given = {"then": MODELS[1], "then_label": label, "then_min_score": min_score}
    return passes.open_runs(engine, "list", of_each_model(given), queue="clips", chunk_size=16)


@pytest.fixture
def then(engine: sa.Engine) -> Then:
    return Then(engine)


def test_a_run_that_follows_another_one_waits_for_its_verdict(then: Then) -> None:
    claim = then.claim(then.second)
    assert {clip.id: clip.first for clip in claim.clips} == {
        **dict.fromkeys(then.first),
        **dict(zip(then.second, then.first, strict=True)),
    }
    first = [success(then.first[0]), replace(success(then.first[1]), predictions=())]
    failed = Failure(then.first[2], ServerError(status=500))
    limits = Ledger(max_attempts=1)
    ledger.finish(then.engine, claim, first, labels(then.engine), limits)
    ledger.finish(then.engine, claim, [failed], (), limits)
    expire_leases(then.engine)
    feeding.take_back(then.engine, "clips")

    assert then.verdict(then.second[0]) is None
    unheard = then.verdict(then.second[1])
    assert (unheard.clip_id, unheard.unheard, unheard.predictions) == (then.second[1], True, ())
    # The first run has used up its tries, and this one has not.
    claim = then.claim(then.second)
    ends = [passes.verdict(then.engine, clip, RunOptions()) for clip in claim.clips[1:]]
    assert ends[1] == replace(ends[1], clip_id=then.second[2])
    ledger.finish(then.engine, claim, ends, (), LIMITS)
    assert then.states(then.second) == ["running", "done", "failed"]
    row_of = [row(then.engine, clip_id) for clip_id in (*then.second, then.first[2])]
    assert [clip.unheard for clip in row_of] == [False, True, False, False]
    assert (row_of[2].error_code, row_of[2].error) == (row_of[3].error_code, row_of[3].error)


def test_a_verdict_is_put_off_while_others_have_the_first_clip(then: Then) -> None:
    (clip,) = (clip for clip in then.claim(then.second[:1]).clips if clip.first)
    end = passes.verdict(then.engine, clip, RunOptions(then_label=("siren",)))
    assert end == Postponed(clip.id, passes.FOLLOW_PAUSE_S)


def test_what_nobody_can_let_through_any_more_fails_as_cancelled(then: Then) -> None:
    changes.cancel(then.engine, then.run_ids[0])
    assert then.verdict(then.second[0]).error.code == "cancelled"
    changes.prune(then.engine, then.run_ids[0])
    assert then.verdict(then.second[1]).error.code == "cancelled"


@pytest.mark.parametrize("done", [False, True])
def test_a_retry_of_the_first_run_lets_the_second_one_follow(then: Then, *, done: bool) -> None:
    claim = then.claim(then.first)
    failing = () if done else (then.first[0], then.second[0])
    then.finish(claim, *failing, then.second[1])
    if done:
        assert changes.redo_done(then.engine, then.run_ids[0]) == CLIPS
        expected = ["pending", "pending", "pending"]
    else:
        assert changes.retry_failed(then.engine, then.run_ids[0]) == 1
        expected = ["pending", "failed", "done"]
    assert then.states(then.second) == expected


def test_a_run_whose_first_run_is_paused_is_not_fed(then: Then) -> None:
    brake.pause(then.engine, then.run_ids[0], "it fails")
    picked = {part.run_id for part in feeding.pick(then.engine, "clips", 10, LIMITS)}
    assert not picked & set(then.run_ids)
    brake.resume(then.engine, then.run_ids[0])
    picked = {part.run_id for part in feeding.pick(then.engine, "clips", 10, LIMITS)}
    assert picked >= set(then.run_ids)


def test_other_labels_to_let_clips_through_are_other_options(then: Then) -> None:
    assert follow(then.engine, "siren", 0.75) == then.run_ids
    with pytest.raises(UsageError, match="another then_min_score"):
        follow(then.engine, "siren", 0.5)


def test_what_was_not_heard_is_no_result_for_a_copy(then: Then) -> None:
    claim = then.claim(then.first)
    heard, unheard = success(then.second[0]), passes.unheard(success(0), then.second[1])
    first = success(then.first[0])
    ledger.finish(then.engine, claim, [first, unheard], labels(then.engine), LIMITS)
    copy = {then.second[2]: first.source}
    assert reuse.known(then.engine, then.run_ids[1], copy) == {}
    ledger.finish(then.engine, claim, [heard], labels(then.engine), LIMITS)
    ledger.settle_model(then.engine, then.run_ids[1], 1)
    assert reuse.known(then.engine, then.run_ids[1], copy) == {then.second[2]: then.second[0]}


def test_a_score_lets_through_as_it_is_shown() -> None:
    options = RunOptions(then_label=("dog", "siren"), then_min_score=0.7)
    shown_as_0_7 = 0.699999988079071
    assert passes.lets_through([("rain", 0.9), ("siren", shown_as_0_7)], options)
    assert not passes.lets_through([("rain", 0.9), ("siren", 0.69999)], options)
    assert not passes.lets_through([], options)
