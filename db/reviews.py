"""What people said of a run's clips: written, undone, read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from db.dialects import now
from db.models import Clip, ReviewLog
from db.rows import select
from db.session import reading, writing
from earmark.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from db.rows import Rows

SELECT_REVIEWS = "SELECT * FROM reviews WHERE run_id = :run_id ORDER BY clip_id, label, at"
#: Clips looked up by one statement.
AT_ONCE = 500
#: Characters of a label or a reviewer's name.
LONGEST = 200


class Verdict(StrEnum):
    """Whether a label is right for a clip."""

    right = "right"
    wrong = "wrong"
    #: Heard, and nothing decided.
    unsure = "unsure"
    #: Not a verdict: somebody hears it now.
    shown = "shown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """One word on one label of a clip."""

    clip_id: int
    label: str
    verdict: Verdict
    reviewer: str
    #: Seconds since 1970; None: now.
    at: float | None = None
    #: The part of the clip; None for all of it.
    start_s: float | None = None
    end_s: float | None = None
    channel: int | None = None
    #: The scores among which the clip was drawn at random; None if it was chosen.
    sample_low: float | None = None
    sample_high: float | None = None

    def check(self) -> None:
        """Raise UsageError for a text that nobody could read."""
        for name in ("label", "reviewer"):
            text = getattr(self, name)
            if not 0 < len(text) <= LONGEST or not text.isprintable():
                raise UsageError(reason=f"A {name} has 1 to {LONGEST} printable characters.")


def reviews(engine: sa.Engine, run_id: int) -> Rows:
    """Return the newest review of each label in each part of a run's clips."""
    return select(engine, SELECT_REVIEWS, run_id=run_id)


def write(engine: sa.Engine, run_id: int, said: Sequence[Review]) -> int:
    """Add reviews of a run's clips in one transaction; return how many are new.

    What is there already, to the second, is left out, so that a file can be imported twice.

    Raises:
        UsageError: a clip is not the run's, or a text cannot be read.
    """
    for review in said:
        review.check()
    with writing(engine) as connection:
        _check_clips(connection, run_id, {review.clip_id for review in said})
        known = _known(connection, run_id) if any(review.at for review in said) else set()
        rows = [asdict(review) | {"run_id": run_id} for review in said]
        return insert(connection, [row for row in rows if _key(row) not in known])


def insert(connection: sa.Connection, rows: list[dict[str, Any]]) -> int:
    """Insert rows of the log; those without a time were said now."""
    time = connection.scalar(sa.select(now()))
    for row in rows:
        if row["at"] is None:
            row["at"] = time
    if rows:
        connection.execute(sa.insert(ReviewLog), rows)
    return len(rows)


def undo(engine: sa.Engine, run_id: int, reviewer: str) -> int | None:
    """Delete what a person said last of a run, and return its clip; None if there is nothing."""
    theirs = sa.and_(
        ReviewLog.run_id == run_id,
        ReviewLog.reviewer == reviewer,
        ReviewLog.verdict != Verdict.shown,
    )
    last = sa.select(ReviewLog.clip_id, ReviewLog.at).where(theirs)
    with writing(engine) as connection:
        row = connection.execute(last.order_by(ReviewLog.id.desc()).limit(1)).first()
        if row is None:
            return None
        # A typed label is two rows of one time.
        same = sa.and_(theirs, ReviewLog.clip_id == row.clip_id, ReviewLog.at == row.at)
        connection.execute(sa.delete(ReviewLog).where(same))
        return int(row.clip_id)


def _check_clips(connection: sa.Connection, run_id: int, ids: set[int]) -> None:
    for group in _groups(sorted(ids)):
        of_run = sa.select(Clip.id).where(Clip.id.in_(group), Clip.run_id == run_id)
        missing = set(group) - set(connection.scalars(of_run))
        if missing:
            raise UsageError(reason=f"This run has no clip {min(missing)}.")


def _groups(ids: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(ids), AT_ONCE):
        yield ids[start : start + AT_ONCE]


def _known(connection: sa.Connection, run_id: int) -> set[tuple[object, ...]]:
    log = sa.select(ReviewLog.__table__).where(ReviewLog.run_id == run_id)
    return {_key(row) for row in connection.execute(log).mappings()}


def _key(row: Mapping[Any, Any]) -> tuple[Any, ...]:
    at = None if row["at"] is None else int(row["at"])
    return at, *(row[name] for name in ("clip_id", "label", "reviewer", "start_s", "channel"))


def ids_by_uri(engine: sa.Engine, run_id: int) -> dict[str, list[int]]:
    """Return a run's clips by the URI that views show, and by their true one."""
    found: dict[str, list[int]] = {}
    with reading(engine) as connection:
        clips = sa.select(Clip.id, Clip.uri, Clip.display_uri).where(Clip.run_id == run_id)
        for clip_id, *uris in connection.execute(clips):
            for uri in set(uris):
                found.setdefault(uri, []).append(clip_id)
    return found
