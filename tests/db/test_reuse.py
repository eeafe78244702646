"""Reuse: the same bytes, model and options have one result, which costs one look into an index."""

from __future__ import annotations

import re
from hashlib import sha256

import pytest
import sqlalchemy as sa

from db import changes, ledger
from db import reuse as look_up
from db.models import Clip
from db.session import reading, writing
from earmark.core import clips as words
from earmark.core.settings import Ledger
from tests.db.builders import FACTS, chunk_of, labels, row, submit

SOURCE = words.Source("ab" * 32, 7)
WHOLE = (words.Prediction(1, 0.75), words.Prediction(0, 0.25))
WINDOWS = (words.WindowPredictions(0.0, 1.0, WHOLE), words.WindowPredictions(1.0, 2.0, WHOLE[:1]))


def reuse(
    engine: sa.Engine, run_id: int, clip_id: int, source: words.Source | None
) -> words.Success | None:
    """Look one clip up, and return the result it has."""
    known = look_up.known(engine, run_id, {clip_id: source})
    return look_up.result(engine, known[clip_id], clip_id) if known else None


def classified(engine: sa.Engine) -> tuple[int, ...]:
    """A run with one clip that is done; returns the ids of the model's labels."""
    label_ids = labels(engine)
    run_id, ids = submit(engine, 1)
    ledger.settle_model(engine, run_id, 1)
    finish(engine, words.Success(ids[0], SOURCE, FACTS, WHOLE, WINDOWS), label_ids)
    return label_ids


def finish(engine: sa.Engine, success: words.Success, label_ids: tuple[int, ...]) -> None:
    claim = ledger.claim(engine, chunk_of(engine, [success.clip_id]), worker="w", limits=Ledger())
    assert ledger.finish(engine, claim, [success], label_ids, Ledger())["done"] == 1


def test_the_same_bytes_reuse_their_result(engine: sa.Engine) -> None:
    label_ids = classified(engine)
    run_id, ids = submit(engine, 1)
    ledger.settle_model(engine, run_id, 1)
    reused = reuse(engine, run_id, ids[0], SOURCE)
    assert reused == words.Success(ids[0], SOURCE, FACTS, WHOLE, WINDOWS, reused=True)
    finish(engine, reused, label_ids)
    found = row(engine, ids[0])
    assert (found.state, found.reused, found.score) == ("done", True, 0.75)


def test_several_clips_are_looked_up_at_once_each_by_its_own_bytes(engine: sa.Engine) -> None:
    classified(engine)
    run_id, ids = submit(engine, 4)
    ledger.settle_model(engine, run_id, 1)
    with writing(engine) as connection:
        connection.execute(sa.update(Clip).where(Clip.id == ids[3]).values(member="a.wav"))
    other = words.Source("cd" * 32, 7)
    sources = dict(zip(ids, (SOURCE, other, SOURCE, SOURCE), strict=True))
    known = look_up.known(engine, run_id, sources)
    assert known.keys() == {ids[0], ids[2]}


def test_other_bytes_another_model_and_other_options_are_classified(engine: sa.Engine) -> None:
    classified(engine)
    run_id, ids = submit(engine, 1)
    assert reuse(engine, run_id, ids[0], SOURCE) is None
    ledger.settle_model(engine, run_id, 1)
    assert reuse(engine, run_id, ids[0], words.Source("cd" * 32, 7)) is None
    other, ids = submit(engine, 1, top_k=1)
    ledger.settle_model(engine, other, 1)
    assert reuse(engine, other, ids[0], SOURCE) is None


def test_the_same_url_reuses_the_newest_result_of_another_run(engine: sa.Engine) -> None:
    classified(engine)
    run_id, ids = submit(engine, 2)
    ledger.settle_model(engine, run_id, 1)
    assert reuse(engine, run_id, ids[0], None) == words.Success(
        ids[0], SOURCE, FACTS, WHOLE, WINDOWS, reused=True
    )
    assert reuse(engine, run_id, ids[1], None) is None
    newer = words.Success(ids[0], words.Source("cd" * 32, 8), FACTS, WHOLE[:1])
    finish(engine, newer, labels(engine))
    third, ids = submit(engine, 1)
    ledger.settle_model(engine, third, 1)
    found = reuse(engine, third, ids[0], None)
    assert found is not None
    assert found.source == newer.source
    other, ids = submit(engine, 1, top_k=1)
    ledger.settle_model(engine, other, 1)
    assert reuse(engine, other, ids[0], None) is None


@pytest.mark.parametrize(
    ("source", "index"), [(SOURCE, "clips_sha256"), (None, "run_id_uri_key|autoindex_clips")]
)
def test_a_reuse_look_up_is_one_statement_with_an_index(
    engine: sa.Engine, source: words.Source | None, index: str
) -> None:
    for count in (2000, 2000, 2001):
        run_id, ids = submit(engine, count)
        ledger.settle_model(engine, run_id, labels(engine) and 1)
    done = (
        sa.update(Clip)
        .where(Clip.id == sa.bindparam("clip"))
        .values(state="done", sha256=sa.bindparam("digest"))
    )
    with writing(engine) as connection:
        every = connection.scalars(sa.select(Clip.id))
        connection.execute(
            done, [{"clip": clip, "digest": sha256(b"%d" % clip).digest()} for clip in every.all()]
        )
    with writing(engine) as connection:
        connection.exec_driver_sql("SELECT 1" if engine.dialect.name == "sqlite" else "ANALYZE")
    seen: list[tuple[str, object]] = []
    sa.event.listen(
        engine, "before_cursor_execute", lambda *event: seen.append((event[2], event[3]))
    )
    reuse(engine, run_id, ids[-1], source)
    statements = [some for some in seen if some[0].lstrip().startswith(("SELECT", "WITH"))]
    assert len(statements) == 1
    explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
    with reading(engine) as connection:
        plan = connection.exec_driver_sql(explain + statements[0][0], statements[0][1])  # type: ignore[arg-type]
        assert re.search(index, "\n".join(str(line) for line in plan))


PARTS = (
    {},
    {"start_s": 2.0, "end_s": 4.0},
    {"start_s": 2.0, "end_s": 5.0},
    {"start_s": 2.0},
    {"member": "a.wav"},
)


def test_only_the_same_part_of_the_same_bytes_reuses_a_result(engine: sa.Engine) -> None:
    label_ids = classified(engine)
    run_id, ids = submit(engine, len(PARTS))
    ledger.settle_model(engine, run_id, 1)
    with writing(engine) as connection:
        for clip_id, part in zip(ids, PARTS, strict=True):
            if part:
                connection.execute(sa.update(Clip).where(Clip.id == clip_id).values(**part))
    whole, *parts = ids
    assert reuse(engine, run_id, whole, SOURCE) is not None
    for known, clip_id in enumerate(parts):
        assert reuse(engine, run_id, clip_id, SOURCE) is None, PARTS[known + 1]
        finish(engine, words.Success(clip_id, SOURCE, FACTS, WHOLE), label_ids)
        assert reuse(engine, run_id, clip_id, SOURCE) is not None


def test_the_windows_of_each_channel_are_reused(engine: sa.Engine) -> None:
    label_ids = labels(engine)
    run_id, ids = submit(engine, 2)
    ledger.settle_model(engine, run_id, 1)
    windows = tuple(
        words.WindowPredictions(start_s, start_s + 1, WHOLE, channel)
        for channel in (None, 1, 2)
        for start_s in (0.0, 1.0)
    )
    finish(engine, words.Success(ids[0], SOURCE, FACTS, WHOLE, windows, channel=2), label_ids)
    reused = reuse(engine, run_id, ids[1], SOURCE)
    assert reused is not None
    assert (reused.windows, reused.channel) == (windows, 2)


def test_embeddings_are_reused_and_a_result_without_them_is_not_enough(engine: sa.Engine) -> None:
    label_ids = classified(engine)
    first, second = (submit(engine, 1, embeddings=True) for _ in range(2))
    for run_id, _ in (first, second):
        ledger.settle_model(engine, run_id, 1)
    (run_id, ids), (later, others) = first, second
    assert reuse(engine, run_id, ids[0], SOURCE) is None
    vectors = (
        words.Embedding(0.0, 1.0, b"\1\2", channel=1),
        words.Embedding(1.0, 2.0, b"\5\6", channel=1),
        words.Embedding(0.0, 1.0, b"\3\4", channel=2),
    )
    windows = tuple(
        words.WindowPredictions(each.start_s, each.end_s, WHOLE, each.channel) for each in vectors
    )
    # As windows end, not as they are stored.
    unsorted = vectors[1], vectors[2], vectors[0]
    heard = words.Success(ids[0], SOURCE, FACTS, WHOLE, windows, channel=1, embeddings=unsorted)
    finish(engine, heard, label_ids)
    reused = reuse(engine, later, others[0], SOURCE)
    assert reused is not None
    assert sorted(reused.embeddings, key=lambda each: each.vector) == sorted(
        vectors, key=lambda each: each.vector
    )
    finish(engine, reused, label_ids)
    assert vectors_of(engine) == {ids[0]: 3, others[0]: 3}
    changes.redo(engine, ids)
    assert vectors_of(engine) == {others[0]: 3}
    changes.prune(engine, later)
    assert vectors_of(engine) == {}


def vectors_of(engine: sa.Engine) -> dict[int, int]:
    with reading(engine) as connection:
        rows = connection.execute(
            sa.text("SELECT clip_id, count(*) FROM embeddings GROUP BY clip_id")
        )
        return dict(rows.all())
