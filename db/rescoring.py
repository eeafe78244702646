"""A run's clips copied into another run, with other results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from db.dialects import dialect_of, spelled
from db.models import Clip
from db.outcomes import INSERT_WINDOWS
from db.session import execute, writing

if TYPE_CHECKING:
    from collections.abc import Sequence

    import sqlalchemy as sa

#: The columns of a result, and those that tell how the old one came about.
OWN = ("label_id", "score", "label_ids", "scores")
NOT_COPIED = (
    *OWN, "id", "run_id", "state", "not_before", "finished_at", "worker", "attempts", "crashes",
    "reused", "fetch_ms", "decode_ms", "classify_ms", "error_code", "error_stage", "error",
    "given_back_by",
)  # fmt: skip
COPIED = ", ".join(set(Clip.__table__.columns.keys()) - {*NOT_COPIED})
#: Clips that the other run does not have yet: a rescoring that was stopped goes on.
SELECT_MISSING = """
SELECT old.id FROM clips old WHERE old.id IN {ids} AND old.state = 'done' AND NOT EXISTS (
  SELECT 1 FROM clips new WHERE new.run_id = :run_id AND new.uri_key = old.uri_key
)
"""
INSERT_CLIPS = f"""
INSERT INTO clips (run_id, state, not_before, finished_at, {", ".join(OWN)}, {COPIED})
SELECT {{value}}run_id, 'done', NULL, {{now}}, {", ".join(f"{{value}}{name}" for name in OWN)},
{", ".join(f"clips.{name}" for name in COPIED.split(", "))}
{{copied_clips}}
"""
SELECT_COPIES = """
SELECT old.id, new.id FROM clips old
JOIN clips new ON new.run_id = :run_id AND new.uri_key = old.uri_key WHERE old.id IN {ids}
"""
ADD_TO_COUNT = """
INSERT INTO run_counts AS n (run_id, state, writer, clips, audio_s, finished_at)
SELECT :run_id, 'done', {writer}, count(*), coalesce(sum(duration_s), 0), {now}
FROM clips WHERE id IN {ids} GROUP BY 1
ON CONFLICT (run_id, state, writer) DO UPDATE
SET clips = n.clips + excluded.clips, audio_s = n.audio_s + excluded.audio_s,
finished_at = excluded.finished_at
"""


def copy(
    engine: sa.Engine,
    run_id: int,
    clips: Sequence[dict[str, Any]],
    windows: Sequence[dict[str, Any]],
) -> int:
    """Copy clips into a run with other results, in one transaction; return how many were new.

    Args:
        clips: the `id` of each, and its label_ids and scores, best first.
        windows: rows of `window_predictions`, with the ids of the clips that are copied.
    """
    with writing(engine) as connection:
        ids = [clip["id"] for clip in clips]
        missing = set(execute(connection, SELECT_MISSING, run_id=run_id, ids=ids).scalars())
        new = [_row(clip, run_id) for clip in clips if clip["id"] in missing]
        _insert(connection, INSERT_CLIPS, new)
        copies = dict(execute(connection, SELECT_COPIES, run_id=run_id, ids=list(missing)).all())
        _insert(connection, INSERT_WINDOWS, _moved(windows, copies))
        execute(connection, ADD_TO_COUNT, run_id=run_id, ids=list(copies.values()))
        return len(new)


def _moved(windows: Sequence[dict[str, Any]], copies: dict[int, int]) -> list[dict[str, Any]]:
    moved = []
    for window in windows:
        if copy_id := copies.get(window["clip_id"]):
            moved.append({**window, "clip_id": copy_id})  # noqa: PERF401 - a line too long
    return moved


def _row(clip: dict[str, Any], run_id: int) -> dict[str, Any]:
    best = {"label_id": None, "score": None}
    if clip["label_ids"]:
        best = {"label_id": clip["label_ids"][0], "score": clip["scores"][0]}
    return {**clip, **best, "run_id": run_id}


def _insert(connection: sa.Connection, statement: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        dialect = dialect_of(connection)
        connection.exec_driver_sql(spelled(statement, dialect), dialect.pack(rows))
