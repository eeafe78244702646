"""Outcomes of a chunk written to the database: one statement for its clips, one for its windows."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from more_itertools import chunked

from db.claims import Claimed
from db.dialects import dialect_of, spelled
from db.session import execute
from earmark.core import recorded
from earmark.core.clips import (
    AudioFacts,
    Failure,
    Outcome,
    State,
    Success,
    Timings,
    WindowPredictions,
)
from earmark.core.errors import Cause, ClipError
from earmark.core.settings import Ledger

#: Columns that an outcome sets. Missing ones become NULL.
OUTCOME_COLUMNS = (
    "state", "attempts", "worker", "reused", "unheard", "sha256", "bytes", "channel",
    "label_id", "score", "label_ids", "scores",
    "error_code", "error_stage", "error", "given_back_by",
    *AudioFacts.__slots__, *Timings.__slots__,
)  # fmt: skip
#: Of windows: a day has 17,000.
ROWS_AT_ONCE = 2000
#: By then a worker that fails every clip has paused, and another one takes the clip.
GIVEN_BACK_PAUSE_S = 1.0
#: In a row to write, `not_before` is the pause in seconds before a clip is tried again.
EMPTY_OUTCOME = dict.fromkeys((*OUTCOME_COLUMNS, "not_before"))
#: Clips that a token still holds, locked until the transaction ends.
SELECT_HELD = """
SELECT l.clip_id, l.worker, coalesce(c.display_uri, c.uri)
FROM leases l JOIN clips c ON c.id = l.clip_id
WHERE l.token = :token AND l.clip_id IN {ids} AND c.not_before IS NOT NULL
ORDER BY l.clip_id {lock}
"""
DELETE_HELD = "DELETE FROM leases WHERE token = :token AND clip_id IN {ids}"
UPDATE_CLIPS = f"""
UPDATE clips SET {", ".join(f"{name} = {{value}}{name}" for name in OUTCOME_COLUMNS)},
not_before = {{now}} + {{value}}not_before,
finished_at = CASE WHEN {{value}}not_before IS NULL THEN {{now}} END
{{matching_clips}}
"""  # noqa: S608 - our own column names
INSERT_WINDOWS = "INSERT INTO window_predictions {window_rows}"
INSERT_EMBEDDINGS = "INSERT INTO window_embeddings {embedding_rows}"


def write(
    connection: sa.Connection,
    token: int,
    outcomes: Sequence[Outcome],
    claimed: Mapping[int, Claimed],
    label_ids: Sequence[int],
    limits: Ledger,
) -> Counter[str]:
    """Write next states and windows of the clips a claim still holds.

    Return the clips by state, and those that were `given_back`.
    """
    ours = held(connection, token, [outcome.clip_id for outcome in outcomes])
    clips, successes = [], []
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        if outcome.clip_id not in ours:
            continue
        worker, uri = ours[outcome.clip_id]
        clip = _clip_row(outcome, claimed[outcome.clip_id], worker, label_ids, limits)
        if isinstance(outcome, Success):
            clip.update(_recorded(outcome.facts, uri))
            successes.append(outcome)
        clips.append(clip)
        given_back = not isinstance(outcome, Success) and outcome.given_back
        counts["given_back" if given_back else clip["state"]] += 1
    write_rows(connection, UPDATE_CLIPS, clips)
    for rows in chunked(_window_rows(successes, label_ids), ROWS_AT_ONCE):
        write_rows(connection, INSERT_WINDOWS, rows)
    for rows in chunked(_embedding_rows(successes), ROWS_AT_ONCE):
        write_rows(connection, INSERT_EMBEDDINGS, rows)
    release(connection, token, ours)
    return counts


def held(
    connection: sa.Connection, token: int, clip_ids: Iterable[int]
) -> dict[int, tuple[str, str]]:
    """Return the workers and URIs of the clips that a token still holds, and lock them."""
    rows = execute(connection, SELECT_HELD, token=token, ids=list(clip_ids))
    return {clip_id: (worker, uri) for clip_id, worker, uri in rows}


def release(connection: sa.Connection, token: int, clip_ids: Iterable[int]) -> None:
    """End a token's leases of these clips."""
    execute(connection, DELETE_HELD, token=token, ids=list(clip_ids))


def error_values(error: ClipError) -> dict[str, Any]:
    """Return the columns of `clips` that tell why there is no result."""
    return {"error_code": error.code, "error_stage": error.stage, "error": str(error)}


def write_rows(connection: sa.Connection, statement: str, rows: list[dict[str, Any]]) -> None:
    """Execute a statement with rows as `Dialect.pack` makes them."""
    # The driver itself: SQLAlchemy would look at every value of every row.
    if rows:
        dialect = dialect_of(connection)
        connection.exec_driver_sql(spelled(statement, dialect), dialect.pack(rows))


def _clip_row(
    outcome: Outcome, clip: Claimed, worker: str, label_ids: Sequence[int], limits: Ledger
) -> dict[str, Any]:
    row: dict[str, Any] = {**EMPTY_OUTCOME, "id": clip.id, "attempts": clip.attempts}
    row["worker"] = worker
    row.update(_values(outcome.timings))
    if outcome.source:
        row["bytes"] = outcome.source.bytes
        row["sha256"] = bytes.fromhex(outcome.source.sha256)
    if isinstance(outcome, Success):
        row.update(_success_values(outcome, label_ids))
    else:
        row.update(_failure_values(outcome, clip, worker, limits))
    return row


def _success_values(success: Success, label_ids: Sequence[int]) -> dict[str, Any]:
    values = {
        "state": State.done,
        "reused": success.reused,
        "unheard": success.unheard,
        "channel": success.channel,
        **_values(success.facts),
        **_top_k(success, label_ids),
    }
    if success.predictions:
        values["label_id"] = values["label_ids"][0]
        values["score"] = values["scores"][0]
    return values


def _recorded(facts: AudioFacts, uri: str) -> dict[str, str | None]:
    """Return what is known of a recording. A name's time is its own, also with a reused result."""
    time, source = facts.recorded_at, facts.recorded_from
    if source in ("", recorded.NAME):
        time = recorded.by_name(uri)
        source = recorded.NAME
    if not time:
        return {"tags": facts.tags or None, "recorded_at": None, "recorded_from": None}
    return {"tags": facts.tags or None, "recorded_at": time, "recorded_from": source}


def _failure_values(failure: Failure, clip: Claimed, worker: str, limits: Ledger) -> dict[str, Any]:
    error = failure.error
    values = {
        "state": State.failed,
        "reused": False,
        "unheard": False,
        **error_values(error),
    }
    if error.cause is not Cause.clip and not failure.own:
        values["given_back_by"] = clip.given_back_by
    if failure.given_back:
        values["state"] = State.pending
        values["not_before"] = GIVEN_BACK_PAUSE_S
        values["attempts"] = clip.attempts - 1
        values["given_back_by"] = " ".join([*clip.workers_before, worker])
    elif error.transient and clip.attempts < limits.max_attempts:
        values["state"] = State.pending
        values["not_before"] = _pause_s(error, clip.attempts, limits)
    return values


def _window_rows(successes: list[Success], label_ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    for success in successes:
        for each in success.windows:
            yield {**_place(success, each), **_top_k(each, label_ids)}


def _embedding_rows(successes: list[Success]) -> Iterator[dict[str, Any]]:
    for success in successes:
        ordered = sorted(success.embeddings, key=lambda each: (each.channel or 0, each.start_s))
        for number, each in enumerate(ordered):
            yield {"clip_id": success.clip_id, "number": number, "vector": each.vector}


def _place(success: Success, window: WindowPredictions) -> dict[str, Any]:
    span = {"start_s": window.start_s, "end_s": window.end_s}
    return {"clip_id": success.clip_id, "channel": window.channel or 0, **span}


def _values(record: AudioFacts | Timings) -> dict[str, Any]:
    # `dataclasses.asdict` copies deeply and took a third of the time.
    return {name: getattr(record, name) for name in record.__slots__}


def _top_k(heard: Success | WindowPredictions, label_ids: Sequence[int]) -> dict[str, Any]:
    return {
        "label_ids": [label_ids[prediction.label] for prediction in heard.predictions],
        "scores": [stored_score(prediction.score) for prediction in heard.predictions],
    }


def stored_score(score: float) -> float:
    """Return a score to the digits that a float32 has, as it is stored."""
    return float(f"{score:.7g}")


def _pause_s(error: ClipError, tries: int, limits: Ledger) -> float:
    # Half the pause is chance, so that clips that failed together do not come back together.
    chance = random.uniform(0.5, 1.5)  # noqa: S311 - not a secret
    backoff = limits.retry_base_s * 2 ** (tries - 1) * chance
    return float(min(limits.retry_cap_s, max(backoff, error.facts.get("retry_after_s") or 0.0)))
