"""Runs, clips and outcomes made through the ledger, for other tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from db import bulk_insert, ledger
from db.identity import ledger_id
from db.models import Clip, Lease
from db.session import reading, writing
from earmark.core import clips as words
from earmark.core.errors import NotFound
from earmark.core.options import RunOptions
from earmark.core.settings import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from db.claims import Claim

LABELS = ("dog", "siren", "rain")
FACTS = words.AudioFacts(duration_s=5.0, source_sample_rate=44100, channels=2, codec="vorbis")
SIREN_THEN_DOG = ((1, 0.7), (1, 0.9), (0, 0.6), (1, 0.8))


def two_runs(engine: sa.Engine) -> None:
    """Fill a database with two runs.

    `march` has a long siren in Rome, a close call, a copy and a failure; `april` has a dog.
    """
    march, claim = _claimed(engine, "march")
    long = _success(claim.clips[0].id, [(1, 0.8), (0, 0.3)], "aa", windows=SIREN_THEN_DOG)
    close = _success(claim.clips[1].id, [(2, 0.45), (0, 0.40)], "bb")
    copy = _success(claim.clips[2].id, [(2, 0.95)], "bb", truncated=True)
    missing = words.Failure(claim.clips[3].id, NotFound(status=404))
    ledger.finish(engine, claim, [long, close, copy, missing], _model(engine, march, "m"), Ledger())
    april, claim = _claimed(engine, "april")
    ledger.finish(
        engine,
        claim,
        [_success(claim.clips[0].id, [(0, 0.9)], "aa")],
        _model(engine, april, "n"),
        Ledger(),
    )


def _claimed(engine: sa.Engine, name: str) -> tuple[int, Claim]:
    run_id = ledger.open_run(engine, name, RunOptions(), queue="clips", chunk_size=16)
    cities = ("Rome", "Oslo", "Rome", "Oslo")
    clips = [
        words.Clip(f"https://h{n % 2}.org/{n}.wav", {"city": city}) for n, city in enumerate(cities)
    ]
    add_clips(engine, run_id, clips)
    with reading(engine) as connection:
        ids = list(
            connection.scalars(sa.select(Clip.id).where(Clip.run_id == run_id).order_by(Clip.id))
        )
    return run_id, ledger.claim(engine, chunk_of(engine, ids), worker="w", limits=Ledger())


def chunk_of(engine: sa.Engine, ids: Sequence[int]) -> words.Chunk:
    """Return the chunk that the feeder would make of some clips of one run."""
    with reading(engine) as connection:
        run_id = connection.scalars(sa.select(Clip.run_id).where(Clip.id.in_(ids))).first()
    return words.Chunk(ledger_id(engine), run_id or 0, tuple((clip_id, "") for clip_id in ids))


def _model(engine: sa.Engine, run_id: int, name: str) -> tuple[int, ...]:
    identity = {"name": name, "revision": "", "sha256": "0", "sample_rate": 16000, "window_s": 4.0}
    model_id, label_ids = ledger.register_model(
        engine, LABELS, **identity, function_to_apply="sigmoid"
    )
    ledger.settle_model(engine, run_id, model_id)
    return label_ids


def _success(
    clip_id: int,
    scores: list[tuple[int, float]],
    sha256: str,
    *,
    windows: tuple[tuple[int, float], ...] = (),
    truncated: bool = False,
) -> words.Success:
    facts = words.AudioFacts(4.0 * max(1, len(windows)), 44100, 1, "vorbis", truncated)
    parts = [
        words.WindowPredictions(
            4.0 * n, 4.0 * (n + 1), (words.Prediction(*best), words.Prediction(2, 0.1))
        )
        for n, best in enumerate(windows)
    ]
    predictions = tuple(words.Prediction(*score) for score in scores)
    return words.Success(
        clip_id, words.Source(sha256, 7), facts, predictions, tuple(parts), words.Timings(1, 2, 3)
    )


def add_clips(engine: sa.Engine, run_id: int, clips: Iterable[words.Clip]) -> int:
    """Add clips to a run; return how many were new."""
    return bulk_insert.add(engine, {run_id: list(map(bulk_insert.listed, clips))})[run_id]


def submit(engine: sa.Engine, count: int = 3, **options: Any) -> tuple[int, list[int]]:
    """Make a run of so many clips; return its id and theirs."""
    run_id = ledger.open_run(engine, None, RunOptions(**options), queue="clips", chunk_size=16)
    add_clips(engine, run_id, [words.Clip(f"https://h/{n}.wav") for n in range(count)])
    with reading(engine) as connection:
        return run_id, list(
            connection.scalars(sa.select(Clip.id).where(Clip.run_id == run_id).order_by(Clip.id))
        )


def labels(engine: sa.Engine) -> tuple[int, ...]:
    """Register a model; return the ids of its labels."""
    identity = {"name": "m", "revision": "", "sha256": "0", "sample_rate": 16000}
    return ledger.register_model(
        engine, ["dog", "siren"], **identity, function_to_apply="softmax", window_s=10.0
    )[1]


def success(clip_id: int) -> words.Success:
    """Return an outcome: a siren."""
    predictions = (words.Prediction(1, 0.75), words.Prediction(0, 0.25))
    return words.Success(clip_id, words.Source("ab", 7), FACTS, predictions)


def row(engine: sa.Engine, clip_id: int) -> Any:
    """Return a clip as the table has it, with its state as of now."""
    with reading(engine) as connection:
        return connection.execute(
            sa.select(Clip.__table__, Clip.state_now).where(Clip.id == clip_id)
        ).one()


def expire_leases(engine: sa.Engine) -> None:
    """End every lease, as if its time were over."""
    with writing(engine) as connection:
        connection.execute(sa.update(Lease).values(until=1.0))
