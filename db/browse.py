"""Clips for people to look at: pages, an even sample, and the details of some."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from db.models import Clip, Label, Run, state_is
from db.rows import ROWS_AT_ONCE, Rows
from db.session import fetch_column, reading
from earmark.core.clips import State
from earmark.core.errors import UsageError

#: Clips on a page.
PAGE = 50
#: Clips that a page reads for a condition without an index: some 50 ms.
READ_FOR_PAGE = 5000
#: By score, the lowest or the highest first.
ORDERS = ("score", "-score")
#: Clips that are read to count those of each host, day, hour and value of a column: some seconds.
READ_FOR_FACETS = 100_000
#: Values that are shown of each.
VALUES = 8

_SHOWN = (
    Clip.id, Clip.display_uri.label("display_uri"), Label.name.label("label"), Clip.state,
    Clip.score, Clip.unheard, Clip.duration_s, Clip.meta, Clip.recorded_at,
    Clip.error_code, Clip.error_stage, Clip.error, Clip.finished_at,
)  # fmt: skip
_LEFT_OUT = {
    *(column.key for column in _SHOWN), "uri_key", "sha256", "tags", "label_id", "label_ids",
    "scores", "not_before", "given_back_by",
}  # fmt: skip
_DETAILS = [column for column in Clip.__table__.c if column.key not in _LEFT_OUT]
SELECT_TOP_K = "SELECT clip_id, label, score FROM top_k WHERE clip_id IN :ids ORDER BY rank"
SELECT_BEST_OF_WINDOWS = """
SELECT clip_id, channel, start_s, end_s, label, score FROM windows
WHERE clip_id IN :ids AND rank = 1 ORDER BY channel, start_s
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which clips of a run to show: of a label by score, failures, or those that ended last."""

    label: str = ""
    #: `failed` for every failure, or one error code.
    error: str = ""
    min_score: float = 0.0
    max_score: float = 1.0
    #: Part of the URI or the meta.
    text: str = ""
    #: One of `ORDERS`; empty: a label's highest score first, else what ended last.
    order: str = ""
    #: What `facets_of` has to give, such as ("host", "example.org").
    facets: tuple[tuple[str, str], ...] = ()

    def fits(self, row: sa.Row[Any]) -> bool:
        fits = self._fits_score(row.score) and self._fits_error(row) and self._fits_text(row)
        return fits and (not self.facets or set(self.facets) <= set(facets_of(row)))

    def _fits_score(self, score: float | None) -> bool:
        if score is None:
            return self.min_score <= 0 and self.max_score >= 1
        return self.min_score <= score <= self.max_score

    def _fits_error(self, row: sa.Row[Any]) -> bool:
        return not self.error or self.error in ("failed", row.error_code)

    def _fits_text(self, row: sa.Row[Any]) -> bool:
        if not self.text:
            return True
        return self.text.lower() in f"{row.display_uri} {json.dumps(row.meta)}".lower()


@dataclass(frozen=True, slots=True)
class Page:
    """Some clips, and the key after which the next page begins, if there may be one."""

    clips: list[sa.Row[Any]]
    next: str | None


def page(engine: sa.Engine, run_id: int, wanted: Wanted, after: str = "") -> Page:
    """Return the clips of one page; at any size of a run it costs the same.

    A page may hold fewer clips than fit the filters although more follow.

    Raises:
        UsageError: `after` is no key of a page.
    """
    statement, order = _in_order(run_id, wanted)
    statement = statement.limit(READ_FOR_PAGE)
    if after:
        ours, last = sa.tuple_(*order), sa.tuple_(*_key(after, order))
        statement = statement.where(ours > last if wanted.order == "score" else ours < last)
    clips: list[sa.Row[Any]] = []
    count = 0
    with (
        reading(engine) as connection,
        connection.execution_options(yield_per=PAGE).execute(statement) as rows,
    ):
        for row in rows:
            count += 1
            if wanted.fits(row):
                clips.append(row)
            if len(clips) == PAGE:
                break
    if len(clips) < PAGE and count < READ_FOR_PAGE:
        return Page(clips, None)
    return Page(clips, "~".join(repr(getattr(row, column.key)) for column in order))


def _in_order(run_id: int, wanted: Wanted) -> tuple[sa.Select[Any], tuple[Any, ...]]:
    statement = sa.select(*_SHOWN).outerjoin(Label, Label.id == Clip.label_id)
    statement = statement.where(Clip.run_id == run_id)
    order: tuple[Any, ...] = (Clip.finished_at, Clip.id)
    if wanted.label:
        statement = statement.where(Clip.label_id == _label_id(run_id, wanted.label))
    if wanted.label or (wanted.order and not wanted.error):
        order = (Clip.score, Clip.id)
        band = Clip.score.between(wanted.min_score, wanted.max_score)
        statement = statement.where(state_is(State.done), band)
    elif wanted.error:
        order = (Clip.id,)
        statement = statement.where(state_is(State.failed))
    else:
        statement = statement.where(Clip.finished_at.is_not(None))
    if wanted.order == "score":
        return statement.order_by(*order), order
    return statement.order_by(*(column.desc() for column in order)), order


def every(engine: sa.Engine, run_id: int, wanted: Wanted) -> Rows:
    """Return the clips of all pages."""
    return Rows(_lines(engine, run_id, wanted))


def _lines(engine: sa.Engine, run_id: int, wanted: Wanted) -> Iterator[Sequence[Any]]:
    statement, _ = _in_order(run_id, wanted)
    with reading(engine) as connection:
        rows = connection.execution_options(yield_per=ROWS_AT_ONCE).execute(statement)
        yield "clip_id", "uri", *tuple(rows.keys())[2:]
        yield from filter(wanted.fits, rows)


def facets_of(row: sa.Row[Any]) -> Iterator[tuple[str, str]]:
    """Yield the host, the day and hour of recording, and the columns of a clip."""
    _, is_url, rest = row.display_uri.partition("://")
    if is_url:
        yield "host", rest.partition("/")[0]
    if row.recorded_at:
        day, _, time = row.recorded_at.partition("T")
        yield "day", day
        yield "hour", time[:2]
    for name, value in (row.meta or {}).items():
        yield f"meta.{name}", str(value)


def facets(engine: sa.Engine, run_id: int, wanted: Wanted) -> dict[str, list[tuple[str, int]]]:
    """Return the most frequent values of `facets_of` among the first clips, with their counts."""
    statement, _ = _in_order(run_id, wanted)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    with reading(engine) as connection:
        for row in connection.execute(statement.limit(READ_FOR_FACETS)):
            if wanted.fits(row):
                for name, value in facets_of(row):
                    counts[name][value] += 1
    return {name: count.most_common(VALUES) for name, count in sorted(counts.items())}


def _label_id(run_id: int, label: str) -> sa.ScalarSelect[int]:
    model = sa.select(Run.model_id).where(Run.id == run_id).scalar_subquery()
    of_model = sa.and_(Label.model_id == model, Label.name == label)
    return sa.select(Label.id).where(of_model).scalar_subquery()


def _key(text: str, order: tuple[Any, ...]) -> list[sa.Cast[Any]]:
    # In the column's own type: a REAL of PostgreSQL differs from the double it is read as.
    try:
        *values, clip_id = text.split("~")
        key = [*map(float, values), int(clip_id)]
        return [sa.cast(value, column.type) for value, column in zip(key, order, strict=True)]
    except ValueError as error:
        raise UsageError(reason="There is no such page.") from error


def sample(engine: sa.Engine, run_id: int, count: int) -> list[int]:
    """Return the ids of all final clips of a run, or of `count` spread evenly over a larger one."""
    final = sa.select(Clip.id).where(Clip.run_id == run_id, Clip.finished_at.is_not(None))
    with reading(engine) as connection:
        ids = list(connection.scalars(final.limit(count + 1)))
        if len(ids) > count:
            ids = _spread(connection, run_id, count)
    return sorted(ids)


def _spread(connection: sa.Connection, run_id: int, count: int) -> list[int]:
    ends = sa.select(sa.func.min(Clip.id), sa.func.max(Clip.id)).where(Clip.run_id == run_id)
    first, last = connection.execute(ends).one()
    # Whether a clip is final is no condition: the database would pass over all that are not.
    clips = sa.select(Clip.id, Clip.finished_at).where(Clip.run_id == run_id)
    clips = clips.order_by(Clip.id).limit(1)
    ids = set()
    for number in range(count):
        start = first + (last - first) * number // count
        clip = connection.execute(clips.where(Clip.id >= start)).one()
        if clip.finished_at is not None:
            ids.add(clip.id)
    return list(ids)


def details(engine: sa.Engine, ids: list[int]) -> Iterator[dict[str, Any]]:
    """Yield some clips: the row, its `top` (label, score) and `windows`.

    A window is channel, start_s, end_s, label and score.
    """
    clips = sa.select(*_SHOWN, *_DETAILS).outerjoin(Label, Label.id == Clip.label_id)
    clips = clips.where(Clip.id.in_(ids)).order_by(Clip.id)
    with reading(engine) as connection:
        top = _by_clip(connection, SELECT_TOP_K, ids)
        windows = _by_clip(connection, SELECT_BEST_OF_WINDOWS, ids)
        for row in connection.execute(clips).mappings():
            clip_id = row["id"]
            yield {**row, "top": top.get(clip_id, []), "windows": windows.get(clip_id, [])}


def _by_clip(
    connection: sa.Connection, statement: str, ids: list[int]
) -> dict[int, list[tuple[Any, ...]]]:
    bound: sa.BindParameter[list[int]] = sa.bindparam("ids", ids, expanding=True)
    rows: dict[int, list[tuple[Any, ...]]] = {}
    for clip_id, *values in connection.execute(sa.text(statement).bindparams(bound)):
        rows.setdefault(clip_id, []).append(tuple(values))
    return rows


def label_choices(engine: sa.Engine, model_id: int | None) -> list[str]:
    """Return the labels of a run's model by name; none before a worker has loaded the model."""
    labels = sa.select(Label.name).where(Label.model_id == model_id).order_by(Label.name)
    return fetch_column(engine, labels)
