"""Score a run's embeddings with a head: a new run, without any audio."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import sqlalchemy as sa

from db import ledger, rescoring, results, runs
from db.identity import with_queue
from db.runs import RunRow
from earmark import similar
from earmark.core.options import RunOptions
from earmark.core.settings import Settings
from workers.scoring import heads

if TYPE_CHECKING:
    from earmark.vector_index import Index

#: Windows scored and written at once, and the rest of the last one's clip.
AT_ONCE = 5000


def rescore(engine: sa.Engine, run: RunRow, settings: Settings, name: str, folder: str) -> RunRow:
    """Make a run with the results that a head gives; one that was stopped goes on.

    Raises:
        UsageError: the run keeps no embeddings, or another run has the name.
        ServiceError: the head cannot be read, or is another model's.
    """
    index, head = similar.opened(engine, run, settings), heads.load(folder)
    model = results.made_by(engine, run)
    identity = {name: model[name] for name in ("revision", "sample_rate", "window_s")}
    identity |= head.identity(model["model"], model["sha256"], folder)
    options = replace(run.options, head=folder, embeddings=False)
    queue = str(with_queue(settings, engine).broker.queue)
    run_id = ledger.open_run(engine, name, options, queue=queue, chunk_size=0)
    model_id, label_ids = ledger.register_model(engine, head.labels, **identity)
    ledger.settle_model(engine, run_id, model_id)
    scorer = Scorer(index, head, options, np.array(label_ids))
    for clips, windows in scorer.rows():
        rescoring.copy(engine, run_id, clips, windows)
    return runs.get_run(engine, run_id)


RowList = list[dict[str, Any]]
#: Where a window is.
PLACE = ("clip_id", "channel", "start_s", "end_s")


@dataclass(frozen=True, slots=True)
class Scorer:
    """Results of clips as rows: the clips, and the windows of those that have several."""

    index: Index
    head: heads.Head
    options: RunOptions
    label_ids: np.ndarray

    def rows(self) -> Iterator[tuple[RowList, RowList]]:
        """Yield the rows of some clips at a time."""
        clip_ids = self.index.windows["clip_id"]
        starts = np.flatnonzero(np.diff(clip_ids, prepend=-1))
        groups = np.flatnonzero(np.diff(starts // AT_ONCE, prepend=-1))
        ends = [*starts[groups][1:], len(clip_ids)]
        for start, end in zip(starts[groups].tolist(), ends, strict=True):
            yield self._scored(slice(start, int(end)))

    def _scored(self, places: slice) -> tuple[RowList, RowList]:
        windows = self.index.windows[places]
        scores = self.head.scores(self.index.vectors(places))
        ids, firsts, counts = np.unique(windows["clip_id"], return_index=True, return_counts=True)
        if self.options.combine == "max":
            combined = np.maximum.reduceat(scores, firsts)
        else:
            combined = np.add.reduceat(scores.astype(np.float64), firsts) / counts[:, None]
        clips = []
        for clip_id, best in zip(ids.tolist(), self._best(combined), strict=True):
            clips.append({"id": clip_id, **best})
        several = np.repeat(counts > 1, counts)
        parts = []
        for window, best in zip(windows[several], self._best(scores[several]), strict=True):
            parts.append({name: window[name].item() for name in PLACE} | best)
        return clips, parts

    def _best(self, scores: np.ndarray) -> Iterator[dict[str, list[Any]]]:
        """Yield for each row of scores its best labels, best first."""
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self.options.top_k]
        ranked = np.take_along_axis(scores, order, axis=1)
        kept = (ranked >= self.options.min_score).sum(axis=1).tolist()
        # To the digits a float32 has, which SQLite writes out.
        rounded = ranked.astype(np.float64).round(7).tolist()
        for count, ids, best in zip(kept, self.label_ids[order].tolist(), rounded, strict=True):
            yield {"label_ids": ids[:count], "scores": best[:count]}
