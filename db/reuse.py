"""Results that a clip's content or URL already has: nothing is classified twice by one model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import sqlalchemy as sa

from db.models import Clip, Label, WindowPrediction
from db.session import ask, execute, reading
from earmark.core.clips import (
    AudioFacts,
    Embedding,
    Prediction,
    Source,
    State,
    Success,
    WindowPredictions,
)

#: For each clip: the same content, and the same part of it. `{same}` compares NULL as a value.
SELECT_BY_CONTENT = """
WITH wanted(id, start, content) AS (VALUES ROWS)
SELECT wanted.id, (
    SELECT known.id FROM clips known JOIN runs theirs ON theirs.id = known.run_id
    WHERE theirs.model_id = mine.model_id AND theirs.options = mine.options
    AND known.state = 'done' AND NOT known.unheard AND substr(known.sha256, 1, 7) = wanted.start
    AND known.sha256 = wanted.content
    AND known.start_s {same} own.start_s AND known.end_s {same} own.end_s
    AND known.member {same} own.member
    LIMIT 1
) FROM wanted JOIN clips own ON own.id = wanted.id JOIN runs mine ON mine.id = :run_id
"""
#: The key of a clip's URL covers its part.
SELECT_BY_URL = """
SELECT own.id, (
    SELECT known.id FROM clips known JOIN runs theirs ON theirs.id = known.run_id
    WHERE theirs.model_id = mine.model_id AND theirs.options = mine.options
    AND theirs.id <> mine.id AND known.state = 'done' AND NOT known.unheard
    AND known.uri_key = own.uri_key
    ORDER BY theirs.id DESC LIMIT 1
) FROM clips own JOIN runs mine ON mine.id = :run_id WHERE own.id IN (ROWS)
"""

SELECT_EMBEDDINGS = "SELECT start_s, end_s, vector, channel FROM embeddings WHERE clip_id = :known"


def known(engine: sa.Engine, run_id: int, sources: Mapping[int, Source | None]) -> dict[int, int]:
    """Return the clips whose content has a result already, from the run's model with its options.

    The values are the ids of the clips that have the results. Of a clip without a source: the
    newest result that its URL has in another run. One call looks up one kind.
    """
    values: dict[str, Any] = {"run_id": run_id}
    by_url = None in sources.values()
    for place, (clip_id, source) in enumerate(sources.items()):
        values[f"id{place}"] = clip_id
        if source:
            digest = bytes.fromhex(source.sha256)
            values[f"start{place}"], values[f"content{place}"] = digest[:7], digest
    rows = ask(engine, _statement(len(sources), by_url=by_url), values)
    return {clip_id: found for clip_id, found in rows if found is not None}


@cache
def _statement(count: int, *, by_url: bool) -> str:
    form = ":id{0}" if by_url else "(:id{0}, :start{0}, :content{0})"
    rows = ", ".join(form.format(place) for place in range(count))
    statement = SELECT_BY_URL if by_url else SELECT_BY_CONTENT
    return statement.replace("ROWS", rows)


def result(engine: sa.Engine, known: int, clip_id: int) -> Success | None:
    """Return a clip's result as another's; None if it has none any more, or not yet."""
    facts = [getattr(Clip, name) for name in AudioFacts.__slots__]
    columns = Clip.label_ids, Clip.scores, Clip.channel, Clip.sha256, Clip.bytes, *facts
    is_known = (Clip.id == known) & (Clip.state == State.done)
    windows_of = sa.select(WindowPrediction).where(WindowPrediction.clip_id == known)
    order = WindowPrediction.channel, WindowPrediction.start_s
    with reading(engine) as connection:
        clip = connection.execute(sa.select(*columns).where(is_known)).first()
        if clip is None:
            return None
        windows = connection.execute(windows_of.order_by(*order)).all()
        vectors = execute(connection, SELECT_EMBEDDINGS, known=known)
        embeddings = tuple(Embedding(*row) for row in vectors)
        positions = _positions(connection, [clip, *windows])
    return Success(
        clip_id,
        Source(clip.sha256.hex(), clip.bytes),
        _facts(clip),
        _predictions(clip, positions),
        tuple(_window(row, positions) for row in windows),
        channel=clip.channel,
        reused=True,
        embeddings=embeddings,
    )


def _facts(clip: sa.Row[Any]) -> AudioFacts:
    known = {name: getattr(clip, name) for name in AudioFacts.__slots__}
    return AudioFacts(**{name: value for name, value in known.items() if value is not None})


def _positions(connection: sa.Connection, rows: list[sa.Row[Any]]) -> dict[int, int]:
    label_ids: set[int] = set()
    for row in rows:
        label_ids.update(row.label_ids)
    places = sa.select(Label.id, Label.position).where(Label.id.in_(label_ids))
    return dict(connection.execute(places).all())


def _predictions(row: sa.Row[Any], positions: dict[int, int]) -> tuple[Prediction, ...]:
    pairs = zip(row.label_ids, row.scores, strict=True)
    return tuple(Prediction(positions[label_id], score) for label_id, score in pairs)


def _window(row: sa.Row[Any], positions: dict[int, int]) -> WindowPredictions:
    predictions = _predictions(row, positions)
    return WindowPredictions(row.start_s, row.end_s, predictions, row.channel or None)
