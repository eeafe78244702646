"""Outcomes in; the rows of a chunk out to the database, in one statement a table."""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from db.models import Base, Clip, Prediction, WindowPrediction
from db.session import now
from earmark.clips import Success

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from earmark import clips as words
    from earmark.clips import AudioFacts, Outcome, Source, Timings
    from earmark.errors import ClipError
    from earmark.settings import Ledger

#: What an outcome says of a clip; what it leaves out becomes null.
SAID = (
    "state", "label_id", "score", "sha256", "bytes", "duration_s", "source_sample_rate", "channels", "codec",
    "truncated", "silent", "reused", "fetch_ms", "decode_ms", "classify_ms", "error_code", "error_stage", "error",
)  # fmt: skip


def write(
    connection: sa.Connection,
    outcomes: Sequence[Outcome],
    tries: Mapping[int, int],
    label_ids: Sequence[int],
    limits: Ledger,
) -> Counter[str]:
    """Write final or next states, predictions and windows; return how many clips came to which state."""
    states = [_state(outcome, tries[outcome.clip_id], label_ids, limits) for outcome in outcomes]
    done = [outcome for outcome in outcomes if isinstance(outcome, Success)]
    whole = [{"clip_id": clip.clip_id, **row} for clip in done for row in _ranked(clip.predictions, label_ids)]
    windows = [
        {"clip_id": clip.clip_id, "start_s": window.start_s, "end_s": window.end_s, **row}
        for clip in done
        for window in clip.windows
        for row in _ranked(window.predictions, label_ids)
    ]
    dialect = connection.dialect.name
    for statement, rows in (
        (_set_states(dialect), states),
        (_insert(Prediction, dialect), whole),
        (_insert(WindowPrediction, dialect), windows),
    ):
        if rows:
            connection.execute(statement, {"rows": json.dumps(rows)})
    return Counter(state["state"] for state in states)


def held(connection: sa.Connection, token: int, clip_ids: Sequence[int]) -> set[int]:
    """Return which of the clips a claim still holds, and keep others from taking them until the transaction's end."""
    values = {"token": token, "rows": json.dumps(list(clip_ids))}
    return set(connection.scalars(_held(connection.dialect.name), values))


def error_values(error: ClipError) -> dict[str, Any]:
    """Return the columns of `clips` that tell why there is no result."""
    return {"error_code": error.code, "error_stage": error.stage, "error": str(error)}


def _state(outcome: Outcome, tries: int, label_ids: Sequence[int], limits: Ledger) -> dict[str, Any]:
    reused = isinstance(outcome, Success) and outcome.reused
    clip = {"clip_id": outcome.clip_id, "reused": reused, **_values(outcome.timings)}
    if isinstance(outcome, Success):
        best = _ranked(outcome.predictions[:1], label_ids)
        heard = {"label_id": best[0]["label_id"], "score": best[0]["score"]} if best else {}
        return {**clip, "state": "done", **heard, **_values(outcome.source), **_values(outcome.facts)}
    source = _values(outcome.source) if outcome.source else {}
    failed = {**clip, "state": "failed", **source, **error_values(outcome.error)}
    if outcome.error.transient and tries < limits.max_attempts:
        return {**failed, "state": "pending", "pause_s": _pause_s(outcome.error, tries, limits)}
    return failed


def _values(record: AudioFacts | Source | Timings) -> dict[str, Any]:
    # `dataclasses.asdict` copies deeply and took a third of the time.
    return {name: getattr(record, name) for name in record.__slots__}


def _pause_s(error: ClipError, tries: int, limits: Ledger) -> float:
    # Half the pause is chance, so that clips that failed together do not come back together.
    backoff = limits.retry_base_s * 2 ** (tries - 1) * random.uniform(0.5, 1.5)  # noqa: S311 - not a secret
    return float(min(limits.retry_cap_s, max(backoff, error.facts.get("retry_after_s") or 0.0)))


def _ranked(predictions: Iterable[words.Prediction], label_ids: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {"rank": rank, "label_id": label_ids[prediction.label], "score": prediction.score}
        for rank, prediction in enumerate(predictions, 1)
    ]


# A chunk's rows travel as one JSON parameter: several times as fast as a statement a row or a parameter a value.


@cache
def _held(dialect: str) -> sa.Select[int]:
    clips, ids = Clip.__table__.c, _rows(dialect)
    named = sa.select(sa.cast(sa.cast(ids.c.value, sa.Text()), clips.id.type)).select_from(ids)
    # Only a running clip has a token. To ask for the state as well would lead PostgreSQL to an index by state, which it
    # takes for almost empty.
    mine = clips.lease_token == sa.bindparam("token")
    return sa.select(clips.id).where(clips.id.in_(named), mine).order_by(clips.id).with_for_update()


@cache
def _set_states(dialect: str) -> sa.Update:
    clips, rows = Clip.__table__, _rows(dialect)
    pause_s = _field(rows, "pause_s", sa.Double())
    said = {name: _field(rows, name, clips.c[name].type) for name in SAID}
    return (
        sa.update(clips)  # type: ignore[arg-type]
        .where(clips.c.id == _field(rows, "clip_id", clips.c.id.type))
        .values(
            **said,
            lease_until=None,
            lease_token=None,
            not_before=sa.func.coalesce(now() + pause_s, clips.c.not_before),
            finished_at=sa.case((pause_s.is_(None), now())),
        )
    )


@cache
def _insert(table: type[Base], dialect: str) -> sa.Insert:
    columns, rows = table.__table__.columns, _rows(dialect)
    fields = sa.select(*(_field(rows, column.name, column.type) for column in columns)).select_from(rows)
    return sa.insert(table.__table__).from_select(columns.keys(), fields)  # type: ignore[arg-type]


def _rows(dialect: str) -> sa.TableValuedAlias:
    rows = sa.bindparam("rows", type_=sa.Text())
    if dialect == "sqlite":
        return sa.func.json_each(rows).table_valued("value")
    return sa.func.json_array_elements(sa.cast(rows, sa.JSON())).table_valued("value")


def _field(rows: sa.TableValuedAlias, name: str, kind: sa.types.TypeEngine[Any]) -> sa.ColumnElement[Any]:
    return sa.cast(rows.c.value.op("->>")(sa.literal_column(f"'{name}'")), kind)
