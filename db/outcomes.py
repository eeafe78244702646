"""Outcomes in; the rows of a chunk out to the database, in one statement a table."""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

from db.session import NOW_POSTGRESQL, NOW_SQLITE, execute
from earmark.core.clips import Success

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import sqlalchemy as sa

    from earmark.core import clips as words
    from earmark.core.clips import AudioFacts, Outcome, Source, Timings
    from earmark.core.errors import ClipError
    from earmark.core.settings import Ledger

#: What an outcome says of a clip; what it leaves out becomes null.
SAID = (
    "state", "attempts", "worker", "label_id", "score", "sha256", "bytes", "duration_s", "source_sample_rate",
    "channels", "codec", "truncated", "silent", "reused", "fetch_ms", "decode_ms", "classify_ms", "error_code",
    "error_stage", "error", "label_ids", "scores",
)  # fmt: skip
HELD = (
    "SELECT l.clip_id, l.worker FROM leases l JOIN clips c ON c.id = l.clip_id"
    " WHERE l.token = :token AND l.clip_id IN {ids} AND c.not_before IS NOT NULL ORDER BY l.clip_id {lock}"
)
LET_GO = "DELETE FROM leases WHERE token = :token AND clip_id IN {ids}"
#: Until it is in the database, `not_before` is the pause in seconds that a clip to be tried again gets.
NOTHING_SAID = dict.fromkeys((*SAID, "not_before"))


def write(
    connection: sa.Connection,
    token: int,
    outcomes: Sequence[Outcome],
    tries: Mapping[int, int],
    label_ids: Sequence[int],
    limits: Ledger,
) -> Counter[str]:
    """Write final or next states and windows of the clips a claim still holds; return how many came to which state."""
    workers = held(connection, token, [outcome.clip_id for outcome in outcomes])
    mine = [outcome for outcome in outcomes if outcome.clip_id in workers]
    states = [
        _state(outcome, tries[outcome.clip_id], label_ids, limits)
        | {"worker": workers[outcome.clip_id]}
        for outcome in mine
    ]
    windows = [
        {
            "clip_id": clip.clip_id,
            "start_s": window.start_s,
            "end_s": window.end_s,
            "channel": window.channel or 0,
            **_top(window, label_ids),
        }
        for clip in mine
        if isinstance(clip, Success)
        for window in clip.windows
    ]
    for statement, rows in zip(
        _statements(connection.dialect.name), (states, windows), strict=True
    ):
        if rows:
            sent: Any = (
                rows if connection.dialect.name == "sqlite" else (json.dumps(rows, default=_hex),)
            )
            connection.exec_driver_sql(statement, sent)
    let_go(connection, token, workers)
    return Counter(state["state"] for state in states)


def held(connection: sa.Connection, token: int, clip_ids: Iterable[int]) -> dict[int, str]:
    """Return which of these clips a token still holds, by whom; they stay so until the transaction's end."""
    return dict(execute(connection, HELD, token=token, ids=list(clip_ids)).all())


def let_go(connection: sa.Connection, token: int, clip_ids: Iterable[int]) -> None:
    """End a token's leases of these clips."""
    execute(connection, LET_GO, token=token, ids=list(clip_ids))


def error_values(error: ClipError) -> dict[str, Any]:
    """Return the columns of `clips` that tell why there is no result."""
    return {"error_code": error.code, "error_stage": error.stage, "error": str(error)}


def _state(
    outcome: Outcome, tries: int, label_ids: Sequence[int], limits: Ledger
) -> dict[str, Any]:
    clip = {
        **NOTHING_SAID,
        "id": outcome.clip_id,
        "attempts": tries,
        "reused": False,
        **_values(outcome.timings),
    }
    if outcome.source:
        clip |= {"bytes": outcome.source.bytes, "sha256": bytes.fromhex(outcome.source.sha256)}
    if isinstance(outcome, Success):
        top = _top(outcome, label_ids)
        best = (
            {"label_id": top["label_ids"][0], "score": top["scores"][0]}
            if outcome.predictions
            else {}
        )
        return {
            **clip,
            "state": "done",
            "reused": outcome.reused,
            **_values(outcome.facts),
            **top,
            **best,
        }
    failed = {**clip, "state": "failed", **error_values(outcome.error)}
    if outcome.error.transient and tries < limits.max_attempts:
        return {**failed, "state": "pending", "not_before": _pause_s(outcome.error, tries, limits)}
    return failed


def _values(record: AudioFacts | Source | Timings) -> dict[str, Any]:
    # `dataclasses.asdict` copies deeply and took a third of the time.
    return {name: getattr(record, name) for name in record.__slots__}


def _top(heard: Success | words.WindowPredictions, label_ids: Sequence[int]) -> dict[str, Any]:
    return {
        "label_ids": [label_ids[prediction.label] for prediction in heard.predictions],
        # To the digits a float32 has, which SQLite writes out.
        "scores": [float(f"{prediction.score:.7g}") for prediction in heard.predictions],
    }


def _pause_s(error: ClipError, tries: int, limits: Ledger) -> float:
    # Half the pause is chance, so that clips that failed together do not come back together.
    backoff = limits.retry_base_s * 2 ** (tries - 1) * random.uniform(0.5, 1.5)  # noqa: S311 - not a secret
    return float(min(limits.retry_cap_s, max(backoff, error.facts.get("retry_after_s") or 0.0)))


def _hex(digest: bytes) -> str:
    return rf"\x{digest.hex()}"


@cache
def _statements(dialect: str) -> tuple[str, str]:
    """Return what sets states and what adds windows: plain SQL, for SQLAlchemy would look at every value of every row.

    SQLite is fastest at one statement a row. To PostgreSQL a chunk's rows travel as one JSON document: several times as
    fast as a statement a row, and its triggers run once.
    """
    update = "UPDATE clips SET {said}, not_before = {now} + {pause}, finished_at = CASE WHEN {pause} IS NULL THEN {now} END"
    if dialect == "sqlite":
        said = ", ".join(f"{name} = :{name}" for name in SAID)
        return (
            update.format(said=said, now=NOW_SQLITE, pause=":not_before") + " WHERE id = :id",
            "INSERT INTO window_predictions VALUES (:clip_id, :start_s, :end_s, :label_ids, :scores, :channel)",
        )
    said = ", ".join(f"{name} = said.{name}" for name in SAID)
    return (
        update.format(said=said, now=NOW_POSTGRESQL, pause="said.not_before")
        + " FROM json_populate_recordset(NULL::clips, %s) AS said WHERE clips.id = said.id",
        "INSERT INTO window_predictions SELECT * FROM json_populate_recordset(NULL::window_predictions, %s)",
    )
