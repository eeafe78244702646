"""Reuse: the same bytes, model and options have one result, which costs one look into an index."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

import sqlalchemy as sa

from db import ledger
from db.models import Clip
from db.session import reading, writing
from earmark import clips as words
from earmark.settings import Ledger
from tests.db.test_ledger import FACTS, labels, row, submit

if TYPE_CHECKING:
    import pytest

SOURCE = words.Source("ab" * 32, 7)
WHOLE = (words.Prediction(1, 0.75), words.Prediction(0, 0.25))
WINDOWS = (words.WindowPredictions(0.0, 1.0, WHOLE), words.WindowPredictions(1.0, 2.0, WHOLE[:1]))


def classified(engine: sa.Engine) -> tuple[int, ...]:
    """A run with one clip that is done; returns the ids of the model's labels."""
    label_ids = labels(engine)
    run_id, ids = submit(engine, 1)
    ledger.settle_model(engine, run_id, 1)
    finish(engine, words.Success(ids[0], SOURCE, FACTS, WHOLE, WINDOWS), label_ids)
    return label_ids


def finish(engine: sa.Engine, success: words.Success, label_ids: tuple[int, ...]) -> None:
    claim = ledger.claim(engine, [success.clip_id], worker="w", limits=Ledger())
    assert ledger.finish(engine, claim, [success], label_ids, Ledger())["done"] == 1


def test_the_same_bytes_get_the_result_they_have_already(engine: sa.Engine) -> None:
    label_ids = classified(engine)
    run_id, ids = submit(engine, 1)
    ledger.settle_model(engine, run_id, 1)
    reused = ledger.reuse(engine, run_id, ids[0], SOURCE)
    assert reused == words.Success(ids[0], SOURCE, FACTS, WHOLE, WINDOWS, reused=True)
    finish(engine, reused, label_ids)
    found = row(engine, ids[0])
    assert (found.state, found.reused, found.score) == ("done", True, 0.75)


def test_other_bytes_another_model_and_other_options_are_classified(engine: sa.Engine) -> None:
    classified(engine)
    run_id, ids = submit(engine, 1)
    assert ledger.reuse(engine, run_id, ids[0], SOURCE) is None
    ledger.settle_model(engine, run_id, 1)
    assert ledger.reuse(engine, run_id, ids[0], words.Source("cd" * 32, 7)) is None
    other, ids = submit(engine, 1, top_k=1)
    ledger.settle_model(engine, other, 1)
    assert ledger.reuse(engine, other, ids[0], SOURCE) is None


def test_looking_is_one_statement_and_uses_the_index(engine: sa.Engine, caplog: pytest.LogCaptureFixture) -> None:
    run_id, ids = submit(engine, 500)
    with writing(engine) as connection:
        done = (
            sa.update(Clip).where(Clip.id == sa.bindparam("clip")).values(state="done", sha256=sa.bindparam("digest"))
        )
        connection.execute(done, [{"clip": clip, "digest": sha256(b"%d" % clip).digest()} for clip in ids])
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("ANALYZE clips")
    seen: list[tuple[str, object]] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *event: seen.append((event[2], event[3])))
    ledger.reuse(engine, run_id, ids[0], SOURCE)
    statements = [some for some in seen if some[0].startswith("SELECT")]
    assert len(statements) == 1
    explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
    with reading(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        plan = connection.exec_driver_sql(explain + statements[0][0], statements[0][1])  # type: ignore[arg-type]
        assert "clips_sha256" in "\n".join(str(line) for line in plan)
