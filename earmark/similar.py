"""The windows of a run that are most like a clip, a file, a URL or words."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from more_itertools import chunked

from db import results
from db.identity import ledger_id
from db.runs import RunRow
from db.session import fetch, fetch_column
from earmark import files, folders, vector_index
from earmark.core import vectors
from earmark.core.errors import UsageError
from earmark.core.settings import Settings

SELECT_ENDED = """
SELECT coalesce(sum(clips), 0) AS clips, coalesce(max(finished_at), 0) AS finished_at
FROM run_counts WHERE run_id = :run_id AND state = 'done'
"""
SELECT_OF_CLIP = "SELECT vector FROM embeddings WHERE clip_id = :clip_id"
#: A window's clip, and the window's best label.
SELECT_SHOWN = """
SELECT r.clip_id, r.uri, r.member, (
  SELECT label FROM windows w WHERE w.clip_id = r.clip_id AND w.start_s = :start_s
  AND coalesce(w.channel, 0) = :channel AND w.rank = 1
) AS label
FROM results r WHERE r.clip_id = :clip_id
"""


def similar(
    engine: sa.Engine, run: RunRow, settings: Settings, to: str, count: int, **conditions: Any
) -> Iterator[dict[str, Any]]:
    """Yield the windows most like `to`, best first; conditions choose clips as `results` does.

    Args:
        to: a clip's id, a file, a URL, or words for a CLAP model.

    Raises:
        UsageError: the run keeps no embeddings, or `to` is none of these.
        ClipError: the file or URL cannot be heard.
    """
    index = opened(engine, run, settings)
    clip_id = None
    if to.isascii() and to.isdigit():
        clip_id = int(to)
        query = of_clip(engine, clip_id)
    else:
        query = vector_of(run, settings, to)
    _check_width(index, query)
    allowed = index.windows["clip_id"] != clip_id
    if any(value is not None for value in conditions.values()):
        rows = results.results(engine, run.id, **conditions)
        allowed &= np.isin(index.windows["clip_id"], [row["clip_id"] for row in rows])
    places, cosines = index.nearest(query, count, allowed)
    windows = index.windows[places].tolist()
    # Stored vectors are rounded, so a product may pass 1.
    scores = np.minimum(cosines, 1.0).tolist()
    for rank, (window, cosine) in enumerate(zip(windows, scores, strict=True), 1):
        clip, channel, start_s, end_s = window
        where = {"channel": channel or None, "start_s": start_s, "end_s": end_s}
        shown = fetch(engine, SELECT_SHOWN, clip_id=clip, channel=channel, start_s=start_s)
        for row in shown:
            yield {"rank": rank, "score": round(cosine, 4), **where, **row._asdict()}


def opened(engine: sa.Engine, run: RunRow, settings: Settings) -> vector_index.Index:
    """Return a run's index, written now if it is missing or the run has changed."""
    results.check_embeddings(run)
    (ended,) = fetch(engine, SELECT_ENDED, run_id=run.id)
    folder = _folder(engine, run, settings) / f"{ended.clips}-{ended.finished_at:.6f}"
    if not folder.is_dir():
        _write(engine, run, folder)
    return vector_index.Index.mapped(folder)


def _folder(engine: sa.Engine, run: RunRow, settings: Settings) -> Path:
    return settings.data_dir / "indexes" / f"{ledger_id(engine)}-{run.id}"


def _write(engine: sa.Engine, run: RunRow, folder: Path) -> None:
    with files.whole(folder) as part:
        # One that was stopped may have left it.
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        vector_index.write(part, _blocks(engine, run))
    for old in folder.parent.iterdir():
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


def _blocks(engine: sa.Engine, run: RunRow) -> Iterator[vector_index.Block]:
    for rows in chunked(results.embeddings(engine, run), vector_index.BLOCK):
        windows = []
        for row in rows:
            place = row["clip_id"], row["channel"] or 0, row["start_s"], row["end_s"]
            windows.append(place)
        scales, levels = vectors.parts([row["vector"] for row in rows])
        yield np.array(windows, vector_index.WINDOW), scales[:, 0], levels


def remove(engine: sa.Engine, run: RunRow, settings: Settings) -> None:
    """Delete a run's index, if it has one."""
    shutil.rmtree(_folder(engine, run, settings), ignore_errors=True)


def of_clip(engine: sa.Engine, clip_id: int) -> np.ndarray:
    """Return the mean vector of a clip's windows."""
    stored = fetch_column(engine, SELECT_OF_CLIP, clip_id=clip_id)
    if not stored:
        raise UsageError(reason=f"There is no clip {clip_id} with embeddings.")
    return _mean(stored)


def vector_of(run: RunRow, settings: Settings, to: str) -> np.ndarray:
    """Return the vector of a file, a URL or words, by the run's model."""
    if "://" in to or Path(to).expanduser().is_file():
        return _heard(run, settings, to)
    if not run.options.labels:
        raise UsageError(
            reason=f"There is no file {to}; to search with words, the run needs a CLAP model."
        )
    # Imported here because it loads torch.
    from workers.scoring.checkpoint import text_vector

    return text_vector(run.options.model, run.options.revision, to)


def _heard(run: RunRow, settings: Settings, to: str) -> np.ndarray:
    # Imported here because it loads what a worker loads.
    from earmark.in_process import classified

    with classified(folders.uri_of(to), settings, run.options) as ended:
        return _mean([each.vector for each in ended.success.embeddings])


def _mean(stored: list[bytes]) -> np.ndarray:
    mean = vectors.unpack(stored).mean(axis=0)
    unit: np.ndarray = mean / np.linalg.norm(mean)
    return unit


def _check_width(index: vector_index.Index, query: np.ndarray) -> None:
    if len(index.windows) and len(query) != index.levels.shape[1]:
        raise UsageError(reason="This is the vector of another model than the run's.")
