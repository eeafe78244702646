"""A chunk that ends in any way leaves no lease behind; an outage never counts as a clip's crash."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import sqlalchemy as sa

from db import feeding, ledger, worker_registry
from db.models import Clip, Lease
from db.session import connect, reading, writing
from earmark.core.errors import DatabaseError
from earmark.core.options import RunOptions
from earmark.core.settings import Database, Ledger, Settings
from tests.db.builders import chunk_of, expire_leases, labels, row, submit, success
from workers import tasks
from workers.models import LoadedModel, RunPlan
from workers.tasks import WorkerState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from earmark.core.clips import Outcome
    from workers.clip import ClipInWork
    from workers.loading.process import Job


class BrokenModels:
    """A model whose loading fails in a way nobody foresaw."""

    def take(self, _run_id: int) -> Any:
        raise RuntimeError("something of the model's own")


def test_after_an_unexpected_error_the_leases_of_a_chunk_end(engine: sa.Engine) -> None:
    ids = submit(engine, 2)[1]
    state = WorkerState(
        engine, Settings(), BrokenModels(), SimpleNamespace(offline=False), "worker"
    )  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        state.work(chunk_of(engine, ids))
    expire_leases(engine)
    state.renew()
    assert feeding.take_back(engine, "clips") == 2


class OneModel:
    """A model that knows two labels."""

    def __init__(self, label_ids: tuple[int, ...]) -> None:
        self._model = LoadedModel(Card(), None, model_id=1, label_ids=label_ids)  # type: ignore[arg-type]

    def take(self, _run_id: int) -> RunPlan:
        return RunPlan(RunOptions(), self._model)

    def give_back(self, _plan: RunPlan) -> None:
        pass

    def close(self) -> None:
        pass


class Server:
    """What an administrator does to the test's database."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._name = url.rpartition("/")[2]

    def fail_over(self) -> None:
        """Leave a server that is read-only, as a standby is."""
        self._do(f"ALTER DATABASE {self._name} SET default_transaction_read_only = on")
        self._do(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            f" WHERE datname = '{self._name}'"
        )

    def promote(self) -> None:
        """Let new connections write; those that were made meanwhile stay read-only."""
        self._do(f"ALTER DATABASE {self._name} RESET default_transaction_read_only")

    def _do(self, statement: str) -> None:
        with psycopg.connect(
            f"{self._url.rpartition('/')[0]}/postgres", autocommit=True
        ) as connection:
            connection.execute(statement)  # type: ignore[call-overload]


@pytest.fixture
def server(postgres_url: str) -> Server:
    return Server(postgres_url)


@pytest.fixture
def postgres_engine(postgres_url: str) -> Iterator[sa.Engine]:
    engine = connect(postgres_url, Database())
    yield engine
    engine.dispose()


class Card:
    """A card of a model that takes any window."""

    sample_rate = 8000
    min_samples = 1
    hop_s = None

    def usable_window_s(self, _wanted: float | None) -> float:
        return 1.0


class OneLoader:
    """Ends each clip at once, with an outcome of the test's."""

    offline = False

    def __init__(self, classify: Callable[[int], Outcome]) -> None:
        self._classify = classify

    def deal(self, clips: Iterable[tuple[ClipInWork, Job]]) -> None:
        for clip, _ in clips:
            clip.end(clip, self._classify(clip.clip_id))

    def forget(self, _clips: list[ClipInWork]) -> None:
        pass


def worker_with(
    engine: sa.Engine, classify: Callable[[int], Outcome], **limits: float
) -> WorkerState:
    settings = Settings(ledger=Ledger(**limits))  # type: ignore[arg-type]
    models, loader = OneModel(labels(engine)), OneLoader(classify)
    return WorkerState(engine, settings, models, loader, "worker")  # type: ignore[arg-type]


def leases(engine: sa.Engine) -> int:
    with reading(engine) as connection:
        return int(connection.scalar(sa.select(sa.func.count()).select_from(Lease)) or 0)


def test_results_wait_while_the_database_is_read_only(
    postgres_engine: sa.Engine, server: Server
) -> None:
    ids = submit(postgres_engine, 2)[1]
    promoted = threading.Timer(2.5, server.promote)

    def classify(clip_id: int) -> Outcome:
        if clip_id == ids[0]:
            server.fail_over()
            promoted.start()
        return success(clip_id)

    counts = worker_with(postgres_engine, classify).work(chunk_of(postgres_engine, ids))
    assert counts["done"] == 2
    for clip_id in ids:
        clip = row(postgres_engine, clip_id)
        assert (clip.state, clip.crashes) == ("done", 0)


def test_clips_given_up_in_an_outage_are_given_back_without_a_crash(
    postgres_engine: sa.Engine, server: Server
) -> None:
    ids = submit(postgres_engine, 1)[1]

    def classify(clip_id: int) -> Outcome:
        server.fail_over()
        return success(clip_id)

    state = worker_with(postgres_engine, classify, outage_s=0.0)
    with pytest.raises(DatabaseError):
        state.work(chunk_of(postgres_engine, ids))
    with pytest.raises(DatabaseError):
        state.give_back()
    server.promote()
    expire_leases(postgres_engine)
    state.renew()
    assert feeding.take_back(postgres_engine, "clips") == 0
    state.give_back()
    assert leases(postgres_engine) == 0
    again = row(postgres_engine, ids[0])
    assert (again.state, again.crashes, again.attempts) == ("pending", 0, 0)


def test_a_claim_whose_answer_was_lost_is_repeated_without_a_second_lease(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = submit(engine, 2)[1]
    claim, lost = ledger.claim, []

    def claim_and_lose(*arguments: Any, **named: Any) -> Any:
        claimed = claim(*arguments, **named)
        if not lost:
            lost.append(claimed)
            raise DatabaseError(reason="The connection was lost after COMMIT.")
        return claimed

    monkeypatch.setattr(ledger, "claim", claim_and_lose)
    assert worker_with(engine, success).work(chunk_of(engine, ids))["done"] == 2
    assert leases(engine) == 0


def test_a_clip_given_back_is_left_to_others_but_not_for_ever(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = submit(engine, 1)[1]
    with writing(engine) as connection:
        connection.execute(sa.update(Clip).values(given_back_by="worker"))
    state = worker_with(engine, success)
    worker_registry.beat(
        engine, "a worker that hears nothing", str(state.settings.broker.queue), [], None
    )
    assert not state.work(chunk_of(engine, ids))["done"]
    assert row(engine, ids[0]).state == "pending"
    assert leases(engine) == 0
    with writing(engine) as connection:
        connection.execute(sa.update(Clip).values(not_before=0))
    monkeypatch.setattr(tasks, "LEFT_S", 0.0)
    assert state.work(chunk_of(engine, ids))["done"] == 1


def test_a_clip_whose_values_the_database_refuses_costs_no_other_clip(
    postgres_engine: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    ids = submit(postgres_engine, 3)[1]

    def classify(clip_id: int) -> Outcome:
        result = success(clip_id)
        return (
            replace(result, facts=replace(result.facts, codec="\0"))
            if clip_id == ids[1]
            else result
        )

    state = worker_with(postgres_engine, classify)
    with pytest.raises(DatabaseError, match="bug in Earmark"):
        state.work(chunk_of(postgres_engine, ids))
    state.give_back()
    assert [row(postgres_engine, clip_id).state for clip_id in ids] == ["done", "pending", "done"]
    assert row(postgres_engine, ids[1]).crashes == 0
    assert leases(postgres_engine) == 0
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert errors[0].exc_info


def test_a_table_that_lacks_a_column_pauses_the_worker_with_the_databases_words(
    postgres_engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "OUTAGE_PAUSE_S", 0.0)
    run_id, ids = submit(postgres_engine, 3)
    with writing(postgres_engine) as connection:
        connection.execute(sa.text("ALTER TABLE clips RENAME COLUMN crashes TO accidents"))
    state = worker_with(postgres_engine, success)
    for clip_id in ids:
        assert state.pause is None
        with pytest.raises(DatabaseError):
            state.work(chunk_of(postgres_engine, [clip_id]))
    assert state.pause
    assert state.pause.run_id == run_id
    assert "crashes does not exist" in state.pause.reason
