"""Clips of a run copied into another run, with other results."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from db.models import Clip
from db.outcomes import INSERT_WINDOWS, write_rows
from db.session import execute, writing

#: The columns that are given, and those that tell how the old result came about.
GIVEN = ("run_id", "label_id", "score", "label_ids", "scores")
NOT_COPIED = {
    *GIVEN, "id", "state", "not_before", "finished_at", "worker", "attempts", "crashes", "reused",
    "unheard", "fetch_ms", "decode_ms", "classify_ms", "given_back_by",
}  # fmt: skip
COPIED = sorted({*Clip.__table__.columns.keys()} - NOT_COPIED)
#: What is there already was written by a rescoring that was stopped.
INSERT_CLIPS = f"""
INSERT INTO clips (state, not_before, finished_at, {", ".join([*GIVEN, *COPIED])})
SELECT 'done', NULL, {{now}}, {", ".join(f"{{value}}{name}" for name in GIVEN)},
{", ".join(f"clips.{name}" for name in COPIED)} {{copied_clips}}
ON CONFLICT (run_id, uri_key) DO NOTHING
"""
SELECT_COPIES = """
SELECT old.id, new.id FROM clips old
JOIN clips new ON new.run_id = :run_id AND new.uri_key = old.uri_key WHERE old.id IN {ids}
"""


def copy(
    engine: sa.Engine, run_id: int, clips: list[dict[str, Any]], windows: list[dict[str, Any]]
) -> None:
    """Copy clips into a run with other results, in one transaction.

    Args:
        clips: the `id` of each, and its label_ids and scores, best first.
        windows: rows of `window_predictions`, with the ids of clips that are copied.
    """
    with writing(engine) as connection:
        write_rows(connection, INSERT_CLIPS, [_row(clip, run_id) for clip in clips])
        ids = sorted({window["clip_id"] for window in windows})
        copies = dict(execute(connection, SELECT_COPIES, run_id=run_id, ids=ids).all())
        moved = [{**window, "clip_id": copies[window["clip_id"]]} for window in windows]
        write_rows(connection, f"{INSERT_WINDOWS} ON CONFLICT DO NOTHING", moved)


def _row(clip: dict[str, Any], run_id: int) -> dict[str, Any]:
    label_id, score = next(zip(clip["label_ids"], clip["scores"], strict=True), (None, None))
    return {**clip, "run_id": run_id, "label_id": label_id, "score": score}
