"""What people said of a run's clips: written, undone, read, and whom a clip is shown to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from pydantic import BaseModel, BeforeValidator, FiniteFloat, StringConstraints

from db.models import ReviewLog
from db.rows import Rows, select
from db.session import execute, fetch, writing
from earmark.core.errors import UsageError

#: A clip that is shown to one person is not shown to another for so long.
HELD_S = 600
SELECT_REVIEWS = "SELECT * FROM reviews WHERE run_id = :run_id ORDER BY clip_id, label, at"
COUNT_CLIPS = "SELECT count(*) FROM clips WHERE run_id = :run_id AND id IN {ids}"
COUNT_VERDICTS = """
SELECT label, verdict, count(*) AS clips FROM reviews WHERE run_id = :run_id GROUP BY label, verdict
"""
SELECT_TAKEN = """
SELECT clip_id FROM review_log WHERE run_id = :run_id AND label = :label
AND (verdict <> 'shown' OR (reviewer <> :reviewer AND at > {now} - :held_s))
"""
SELECT_BAND = """
SELECT sample_low, sample_high FROM review_log
WHERE clip_id = :clip_id AND label = :label AND sample_low IS NOT NULL
"""
#: A typed label is two rows of one time.
DELETE_LAST = """
DELETE FROM review_log WHERE run_id = :run_id AND reviewer = :reviewer AND verdict <> 'shown'
AND (clip_id, at) = (
  SELECT clip_id, at FROM review_log
  WHERE run_id = :run_id AND reviewer = :reviewer AND verdict <> 'shown' ORDER BY id DESC LIMIT 1
)
RETURNING clip_id
"""

PRINTABLE = r"^[^\x00-\x1f]+$"
Text = Annotated[str, StringConstraints(strip_whitespace=True, max_length=200, pattern=PRINTABLE)]


def _in_utc(value: str | datetime | None) -> datetime | None:
    if not value:
        return None
    time = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


class Review(BaseModel):
    """One word on one label of a clip, or of a part of it."""

    clip_id: int
    label: Text
    verdict: Literal["right", "wrong", "unsure"]
    reviewer: Text
    at: Annotated[datetime | None, BeforeValidator(_in_utc)] = None
    start_s: FiniteFloat | None = None
    end_s: FiniteFloat | None = None
    channel: int | None = None
    #: The scores among which the clip was drawn at random; None if it was chosen.
    sample_low: FiniteFloat | None = None
    sample_high: FiniteFloat | None = None


def reviews(engine: sa.Engine, run_id: int) -> Rows:
    """Return the newest review of each label in each part of a run's clips."""
    return select(engine, SELECT_REVIEWS, run_id=run_id)


def counts(engine: sa.Engine, run_id: int) -> dict[str, dict[str, int]]:
    """Return how many clips of each label have each verdict."""
    found: dict[str, dict[str, int]] = {}
    for row in select(engine, COUNT_VERDICTS, run_id=run_id):
        found.setdefault(row["label"], {})[row["verdict"]] = row["clips"]
    return found


def write(engine: sa.Engine, run_id: int, said: Sequence[Review]) -> None:
    """Add reviews of a run's clips, all or none; raise UsageError if a clip is not the run's."""
    ids = [*{review.clip_id for review in said}]
    with writing(engine) as connection:
        known = execute(connection, COUNT_CLIPS, run_id=run_id, ids=ids).scalar_one()
        if known < len(ids):
            raise UsageError(reason=f"{len(ids) - known} of these clips are not in this run.")
        _insert(connection, run_id, said)


def _insert(connection: sa.Connection, run_id: int, said: Sequence[Review]) -> None:
    now = execute(connection, "SELECT {now}").scalar()
    rows = []
    for review in said:
        at = review.at.timestamp() if review.at else now
        rows.append({**review.model_dump(), "run_id": run_id, "at": at})
    if rows:
        connection.execute(sa.insert(ReviewLog), rows)


def say(engine: sa.Engine, run_id: int, review: Review, true_label: str = "") -> None:
    """Add what a person said of a clip that was shown, and the label that they typed."""
    key = {"clip_id": review.clip_id, "label": review.label}
    low, high = next(iter(fetch(engine, SELECT_BAND, **key)), (None, None))
    said = [review.model_copy(update={"sample_low": low, "sample_high": high})]
    if true_label not in ("", review.label):
        said.append(Review(**{**review.model_dump(), "label": true_label, "verdict": "right"}))
    write(engine, run_id, said)


def undo(engine: sa.Engine, run_id: int, reviewer: str) -> int | None:
    """Delete what a person said last of a run, and return its clip; None if there is nothing."""
    with writing(engine) as connection:
        deleted = execute(connection, DELETE_LAST, run_id=run_id, reviewer=reviewer).scalars().all()
    return next(iter(deleted), None)


def hand_out(
    engine: sa.Engine,
    run_id: int,
    label: str,
    reviewer: str,
    queue: Iterable[tuple[int, Sequence[float]]],
    holding: Iterable[int],
) -> int | None:
    """Give a person the first clip of a queue that nobody has reviewed or hears now.

    Args:
        queue: clips, each with the lowest and highest score of its draw, empty if it was chosen.
        holding: clips that this person has already.
    """
    key: dict[str, Any] = {"run_id": run_id, "label": label, "reviewer": reviewer}
    with writing(engine) as connection:
        execute(connection, "SELECT id FROM runs WHERE id = :run_id {lock}", run_id=run_id)
        gone = execute(connection, SELECT_TAKEN, **key, held_s=HELD_S).scalars()
        taken = {*gone, *holding}
        clip_id, band = next((each for each in queue if each[0] not in taken), (None, ()))
        if clip_id is not None:
            shown = {**key, "clip_id": clip_id, "verdict": "unsure"}
            shown.update(zip(("sample_low", "sample_high"), band, strict=False))
            review = Review(**shown).model_copy(update={"verdict": "shown"})
            _insert(connection, run_id, [review])
    return clip_id
