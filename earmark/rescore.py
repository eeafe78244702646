"""Score a run's embeddings with a head: a new run, without any audio."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from db import ledger, rescoring, results, runs
from db.identity import with_queue
from earmark.core import vectors
from earmark.core.errors import UsageError
from workers.scoring import heads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import sqlalchemy as sa

    from db.runs import RunRow
    from earmark.core.options import RunOptions
    from earmark.core.settings import Settings

#: A clip's rows and scores.
Rows = list[dict[str, Any]]


def rescore(
    engine: sa.Engine, run: RunRow, settings: Settings, name: str, head_name: str
) -> tuple[RunRow, int]:
    """Make a run with the results that a head gives; return it, and its new clips.

    A rescoring that was stopped goes on under the same name.

    Raises:
        UsageError: the run keeps no embeddings, or the name is another run's.
        ServiceError: the head cannot be read, or is another model's.
    """
    results.embeddings(engine, run)
    if name == run.name:
        raise UsageError(reason=f"{name} is this run's own name; choose another --name.")
    head = heads.load(head_name)
    model = SimpleNamespace(**results.made_by(engine, run))
    head.require(model.sha256, model.model)
    options = replace(run.options, head=head_name, embeddings=False)
    queue = str(with_queue(settings, engine).broker.queue)
    run_id = ledger.open_run(engine, name, options, queue=queue, chunk_size=0)
    facts = SimpleNamespace(name=model.model)
    model_id, label_ids = ledger.register_model(
        engine,
        head.labels,
        revision=model.revision,
        sample_rate=model.sample_rate,
        window_s=model.window_s,
        **head.identity(facts, head_name),
    )
    ledger.settle_model(engine, run_id, model_id)
    copied = 0
    for rows in whole_clips(results.vectors(engine, run_id=run.id)):
        clips, windows = scored(rows, head, options, np.array(label_ids))
        copied += rescoring.copy(engine, run_id, clips, windows)
    return runs.get_run(engine, run_id), copied


def whole_clips(partitions: Iterator[Sequence[Any]]) -> Iterator[list[Any]]:
    """Yield the rows of some clips at a time: never a part of a clip."""
    held: list[Any] = []
    for rows in partitions:
        held += rows
        last = held[-1].clip_id
        end = next(place for place, row in enumerate(held) if row.clip_id == last)
        if end:
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def scored(
    rows: Sequence[Any], head: heads.Head, options: RunOptions, label_ids: np.ndarray
) -> tuple[Rows, Rows]:
    """Return the results of clips, and those of their windows where they have several."""
    scores = head.scores(vectors.unpack([row.vector for row in rows]))
    ids = np.array([row.clip_id for row in rows])
    clip_ids, firsts, counts = np.unique(ids, return_index=True, return_counts=True)
    combine = np.maximum if options.combine == "max" else np.add
    combined = combine.reduceat(scores.astype(np.float64), firsts)
    if options.combine == "mean":
        combined /= counts[:, None]
    clips = [
        {"id": clip_id, **best}
        for clip_id, best in zip(
            clip_ids.tolist(), _best(combined, options, label_ids), strict=True
        )
    ]
    several = np.flatnonzero(np.repeat(counts > 1, counts)).tolist()
    windows = []
    for place, best in zip(several, _best(scores[several], options, label_ids), strict=True):
        clip_id, channel, start_s, end_s, _ = rows[place]
        where = {"clip_id": clip_id, "channel": channel, "start_s": start_s, "end_s": end_s}
        windows.append({**where, **best})
    return clips, windows


def _best(
    scores: np.ndarray, options: RunOptions, label_ids: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Yield for each row of scores its best labels and their scores, best first."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, : options.top_k]
    ranked = np.take_along_axis(scores, order, axis=1).astype(np.float32)
    counts = (ranked >= options.min_score).sum(axis=1).tolist()
    # To the digits a float32 has, which SQLite writes out.
    rounded = ranked.astype(np.float64).round(7).tolist()
    for count, ids, best in zip(counts, label_ids[order].tolist(), rounded, strict=True):
        yield {"label_ids": ids[:count], "scores": best[:count]}
