"""After any order of claims, ends, deaths and losses, states and results are consistent."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from db import changes, feeding, ledger, runs
from db.models import Clip, Lease
from db.session import reading, writing
from earmark.core import clips as words
from earmark.core.clips import FINAL_STATES
from earmark.core.errors import NotFound, ServerError
from earmark.core.options import RunOptions
from earmark.core.settings import Ledger
from tests.db.builders import add_clips, chunk_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from earmark.core.clips import Outcome

LIMITS = Ledger(max_attempts=3, retry_base_s=0.0)
FACTS = words.AudioFacts(duration_s=5.0, source_sample_rate=44100, channels=2, codec="vorbis")
MODEL = {"name": "m", "revision": "", "sha256": "0", "sample_rate": 16000}
ENDS: dict[str, Callable[[int], Outcome]] = {
    "result": lambda clip_id: words.Success(
        clip_id, words.Source("ab", 7), FACTS, (words.Prediction(1, 0.75),)
    ),
    "failure": lambda clip_id: words.Failure(clip_id, NotFound(status=404)),
    "passing failure": lambda clip_id: words.Failure(clip_id, ServerError(status=503)),
}
NAMES = itertools.count()

some = st.randoms(use_true_random=False)


class LedgerStates(RuleBasedStateMachine):
    """One run, a queue that loses and doubles messages, and workers that die or come back late."""

    engine: sa.Engine

    @initialize(count=st.integers(1, 6))
    def submit(self, count: int) -> None:
        self.queue = f"queue-{next(NAMES)}"
        self.run_id = ledger.open_run(
            self.engine, None, RunOptions(), queue=self.queue, chunk_size=2
        )
        add_clips(self.engine, self.run_id, [words.Clip(f"https://h/{n}") for n in range(count)])
        self.labels = ledger.register_model(
            self.engine, ["a", "b"], **MODEL, function_to_apply="none", window_s=1.0
        )[1]
        self.count = count
        self.messages: list[list[int]] = []
        self.claims: list[ledger.Claim] = []
        self.final: dict[int, str] = {}

    @rule()
    def feed(self) -> None:
        for part in feeding.pick(self.engine, self.queue, 2, LIMITS):
            self.messages.append([clip.id for clip in part.clips])

    @rule(some=some)
    def lose_a_message(self, some: Any) -> None:
        if self.messages:
            self.messages.remove(some.choice(self.messages))

    @rule(some=some, keep=st.booleans())
    def claim(self, some: Any, keep: bool) -> None:
        if self.messages:
            message = some.choice(self.messages)
            if not keep:
                self.messages.remove(message)
            self.claims.append(
                ledger.claim(self.engine, chunk_of(self.engine, message), worker="w", limits=LIMITS)
            )

    @rule(some=some, end=st.sampled_from(sorted(ENDS)))
    def finish(self, some: Any, end: str) -> None:
        if self.claims:
            claim = some.choice(self.claims)
            held = self._held_by(claim)
            outcomes = [ENDS[end](clip.id) for clip in claim.clips]
            counts = ledger.finish(self.engine, claim, outcomes, self.labels, LIMITS)
            assert counts["lost"] == len(claim.clips) - len(held)

    @rule(some=some)
    def release(self, some: Any) -> None:
        if self.claims:
            claim = some.choice(self.claims)
            ledger.release(self.engine, claim.token, {clip.id: 0.0 for clip in claim.clips})

    @rule(some=some)
    def renew(self, some: Any) -> None:
        if self.claims:
            ledger.renew(self.engine, [some.choice(self.claims).token], LIMITS)

    @rule()
    def leases_end(self) -> None:
        statement = sa.update(Lease).where(Lease.run_id == self.run_id)
        with writing(self.engine) as connection:
            connection.execute(statement.values(until=1.0))

    @rule()
    def take_back(self) -> None:
        feeding.take_back(self.engine, self.queue)

    @rule()
    def queue_is_wiped(self) -> None:
        self.messages = []
        feeding.take_back_queued(self.engine, self.queue, LIMITS.queue_lease_s + 1)

    @rule()
    def cancel(self) -> None:
        changes.cancel(self.engine, self.run_id)

    @rule()
    def retry(self) -> None:
        self.final = {clip_id: state for clip_id, state in self.final.items() if state != "failed"}
        changes.retry_failed(self.engine, self.run_id)

    @invariant()
    def final_states_stay(self) -> None:
        states = self._states()
        assert len(states) == self.count
        assert {clip_id: states[clip_id] for clip_id in self.final} == self.final
        self.final = {clip_id: state for clip_id, state in states.items() if state in FINAL_STATES}

    @invariant()
    def results_belong_to_done_clips(self) -> None:
        view = sa.text("SELECT clip_id FROM top_k WHERE run_id = :run_id").bindparams(
            run_id=self.run_id
        )
        with reading(self.engine) as connection:
            found = list(connection.scalars(view))
        assert sorted(found) == sorted(
            clip_id for clip_id, state in self.final.items() if state == "done"
        )

    @invariant()
    def counts_equal_rows(self) -> None:
        told = runs.progress(self.engine, self.run_id).states
        states = list(self._states().values())
        assert {state: count for state, count in told.items() if count} == {
            each: states.count(each) for each in states
        }

    @invariant()
    def only_running_clips_are_held(self) -> None:
        leased = {lease.clip_id: lease.token for lease in self._rows(Lease.clip_id, Lease.token)}
        for clip in self._rows(Clip.id, Clip.state, Clip.attempts, Clip.crashes):
            assert clip.state == "pending" or clip.id not in leased
            assert 0 <= clip.attempts <= LIMITS.max_attempts
            assert clip.crashes >= 0

    def teardown(self) -> None:
        """Bring every clip to an end, as a sound worker would."""
        for _ in range(2 * self.count):
            self.leases_end()
            self.take_back()
            self.feed()
            for message in self.messages:
                claim = ledger.claim(
                    self.engine, chunk_of(self.engine, message), worker="w", limits=LIMITS
                )
                done = [ENDS["result"](clip.id) for clip in claim.clips]
                ledger.finish(self.engine, claim, done, self.labels, LIMITS)
        assert set(self._states().values()) <= set(FINAL_STATES)

    def _held_by(self, claim: ledger.Claim) -> list[Any]:
        return [lease for lease in self._rows(Lease.token) if lease.token == claim.token]

    def _states(self) -> dict[int, str]:
        return {row.id: row.state_now for row in self._rows(Clip.id, Clip.state_now)}

    def _rows(self, *columns: Any) -> list[Any]:
        with reading(self.engine) as connection:
            return list(
                connection.execute(
                    sa.select(*columns).where(columns[0].class_.run_id == self.run_id)
                ).all()
            )


@pytest.mark.slow
def test_the_ledger_is_consistent_after_any_order_of_events(engine: sa.Engine) -> None:
    bound = type("BoundLedgerStates", (LedgerStates,), {"engine": engine})
    examples = 40 if engine.dialect.name == "sqlite" else 15
    plan = settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(bound, settings=plan)
