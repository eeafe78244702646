"""Clips in pages that cost the same at any size of a run, an even sample of it, and what its charts are drawn from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from db.models import Clip, Label, Run, state_is
from db.session import reading
from earmark.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Clips on a page.
PAGE = 50
#: A page looks through so many clips for what no index knows: some 50 ms.
LOOKED_THROUGH = 5000

_SHOWN = (
    *(
        Clip.id,
        Clip.display_uri.label("display_uri"),
        Label.name.label("label"),
        Clip.state,
        Clip.score,
    ),
    *(Clip.duration_s, Clip.meta, Clip.error_code, Clip.error_stage, Clip.error, Clip.finished_at),
)
_DETAILS = (
    *(
        Clip.run_id,
        Clip.uri,
        Clip.source_sample_rate,
        Clip.channels,
        Clip.codec,
        Clip.bytes,
        Clip.truncated,
    ),
    *(
        Clip.silent,
        Clip.reused,
        Clip.attempts,
        Clip.worker,
        Clip.fetch_ms,
        Clip.decode_ms,
        Clip.classify_ms,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which clips of a run to show: the best of a label, the failures, or else what ended last."""

    label: str = ""
    #: `failed` for every failure, or one error code.
    error: str = ""
    min_score: float = 0.0
    max_score: float = 1.0
    #: Found in the URI or the meta.
    text: str = ""

    def fits(self, row: sa.Row[Any]) -> bool:
        if row.score is not None and not self.min_score <= row.score <= self.max_score:
            return False
        if self.error and self.error not in ("failed", row.error_code):
            return False
        if row.score is None and (self.min_score > 0 or self.max_score < 1):
            return False
        return (
            not self.text
            or self.text.lower() in f"{row.display_uri} {json.dumps(row.meta)}".lower()
        )


@dataclass(frozen=True, slots=True)
class Page:
    """Some clips, and the key after which the next page begins, if there may be one."""

    clips: list[sa.Row[Any]]
    next: str | None


def page(engine: sa.Engine, run_id: int, wanted: Wanted, after: str = "") -> Page:
    """Return the clips of one page; it may hold fewer than fit the filters although more follow.

    Raises:
        UsageError: `after` is no key of a page.
    """
    statement, order = _in_order(run_id, wanted)
    if after:
        statement = statement.where(sa.tuple_(*order) < sa.tuple_(*_key(after, order)))
    statement = statement.order_by(*(column.desc() for column in order)).limit(LOOKED_THROUGH)
    found, looked_at, last = [], 0, None
    with (
        reading(engine) as connection,
        connection.execution_options(yield_per=PAGE).execute(statement) as rows,
    ):
        for row in rows:
            last, looked_at = row, looked_at + 1
            if wanted.fits(row):
                found.append(row)
            if len(found) == PAGE:
                break
    more = last is not None and (len(found) == PAGE or looked_at == LOOKED_THROUGH)
    return Page(
        found, "~".join(repr(getattr(last, column.key)) for column in order) if more else None
    )


def _in_order(run_id: int, wanted: Wanted) -> tuple[sa.Select[Any], tuple[Any, ...]]:
    statement = (
        sa.select(*_SHOWN).outerjoin(Label, Label.id == Clip.label_id).where(Clip.run_id == run_id)
    )
    if wanted.label:
        model = sa.select(Run.model_id).where(Run.id == run_id).scalar_subquery()
        known = (
            sa.select(Label.id)
            .where(Label.model_id == model, Label.name == wanted.label)
            .scalar_subquery()
        )
        of_label = (state_is("done"), Clip.label_id == known, Clip.score >= wanted.min_score)
        return statement.where(*of_label, Clip.score <= wanted.max_score), (Clip.score, Clip.id)
    if wanted.error:
        return statement.where(state_is("failed")), (Clip.id,)
    return statement.where(Clip.finished_at.is_not(None)), (Clip.finished_at, Clip.id)


def _key(text: str, order: tuple[Any, ...]) -> list[sa.Cast[Any]]:
    # In the column's own type: a REAL of PostgreSQL differs from the double it is read as.
    try:
        *values, clip_id = text.split("~")
        key = [*map(float, values), int(clip_id)]
        return [sa.cast(value, column.type) for value, column in zip(key, order, strict=True)]
    except ValueError as error:
        raise UsageError(reason="There is no such page.") from error


def sample(engine: sa.Engine, run_id: int, count: int) -> list[int]:
    """Return the ids of all final clips of a run or, of a larger one, of `count` spread evenly over its list."""
    ended = sa.select(Clip.id).where(Clip.run_id == run_id, Clip.finished_at.is_not(None))
    with reading(engine) as connection:
        few = list(connection.scalars(ended.limit(count + 1)))
        if len(few) <= count:
            return sorted(few)
        ends = sa.select(sa.func.min(Clip.id), sa.func.max(Clip.id)).where(Clip.run_id == run_id)
        first, last = connection.execute(ends).one()
        at = [first + (last - first) * number // count for number in range(count)]
        # Whether it has ended is asked of each, not of the database: that would go through all that have.
        listed = (
            sa.select(Clip.id, Clip.finished_at)
            .where(Clip.run_id == run_id)
            .order_by(Clip.id)
            .limit(1)
        )
        found = [connection.execute(listed.where(Clip.id >= start)).one() for start in at]
    return sorted({clip_id for clip_id, finished_at in found if finished_at is not None})


def details(engine: sa.Engine, ids: list[int]) -> Iterator[dict[str, Any]]:
    """Yield all that is known of some clips: row, `top` (label, score), `windows` (start_s, end_s, label, score)."""
    clips = (
        sa.select(*_SHOWN, *_DETAILS)
        .outerjoin(Label, Label.id == Clip.label_id)
        .where(Clip.id.in_(ids))
    )
    of_these = "WHERE clip_id IN :ids"
    bound: sa.BindParameter[list[int]] = sa.bindparam("ids", ids, expanding=True)
    top = sa.text(f"SELECT clip_id, label, score FROM top_k {of_these} ORDER BY rank").bindparams(
        bound
    )
    columns = "clip_id, start_s, end_s, label, score"
    best = f"SELECT {columns} FROM windows {of_these} AND rank = 1 ORDER BY start_s"  # noqa: S608
    with reading(engine) as connection:
        heard, parts = (
            _by_clip(connection.execute(query)) for query in (top, sa.text(best).bindparams(bound))
        )
        for row in connection.execute(clips.order_by(Clip.id)).mappings():
            yield {**row, "top": heard.get(row["id"], []), "windows": parts.get(row["id"], [])}


def _by_clip(rows: sa.CursorResult[Any]) -> dict[int, list[tuple[Any, ...]]]:
    found: dict[int, list[tuple[Any, ...]]] = {}
    for row in rows:
        found.setdefault(row[0], []).append(tuple(row[1:]))
    return found


def score_histogram(engine: sa.Engine, run_id: int, bins: int) -> list[int]:
    """Return how many clips have their best score in each of `bins` equal parts of 0 to 1."""
    done = sa.and_(Clip.run_id == run_id, state_is("done"), Clip.label_id.is_not(None))
    return _counted(engine, Clip.score * bins - 0.5, done, bins)


def throughput(engine: sa.Engine, run_id: int, bins: int) -> tuple[float, list[int]]:
    """Return how many seconds lie between the first and the last final clip, and the clips in each part of them."""
    ended = sa.and_(Clip.run_id == run_id, Clip.finished_at.is_not(None))
    with reading(engine) as connection:
        span = sa.select(sa.func.min(Clip.finished_at), sa.func.max(Clip.finished_at)).where(ended)
        first, last = connection.execute(span).one()
    if first is None or last is None or last == first:
        return 0.0, []
    at = (Clip.finished_at - first) / (last - first) * bins - 0.5
    return last - first, _counted(engine, at, ended, bins)


def _counted(engine: sa.Engine, at: Any, where: sa.ColumnElement[bool], bins: int) -> list[int]:
    # Rounded, since a cast to integer rounds on PostgreSQL and cuts on SQLite.
    part = sa.cast(sa.func.round(sa.cast(at, sa.Double)), sa.Integer)
    counts = [0] * bins
    with reading(engine) as connection:
        for number, clips in connection.execute(
            sa.select(part, sa.func.count()).where(where).group_by(part)
        ):
            counts[min(max(number, 0), bins - 1)] += clips
    return counts


def labels(engine: sa.Engine, model_id: int | None) -> list[str]:
    """Return the labels of a run's model in alphabetical order, none before a worker has loaded it."""
    with reading(engine) as connection:
        return list(
            connection.scalars(
                sa.select(Label.name).where(Label.model_id == model_id).order_by(Label.name)
            )
        )
