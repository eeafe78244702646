"""Results that a clip's content or URL already has: nothing is classified twice by one model."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from db.models import Clip, Label, WindowPrediction
from db.session import ask, reading
from earmark.core import clips as words

#: The same content, and the same part of it. `{same}` compares NULL as a value.
SELECT_BY_CONTENT = """
SELECT known.id FROM clips known
JOIN runs theirs ON theirs.id = known.run_id
JOIN runs mine ON mine.model_id = theirs.model_id AND mine.options = theirs.options
JOIN clips own ON own.run_id = mine.id
WHERE mine.id = :run_id AND own.id = :clip_id
AND known.state = 'done' AND substr(known.sha256, 1, 7) = :start AND known.sha256 = :content
AND known.start_s {same} own.start_s AND known.end_s {same} own.end_s
AND known.channel {same} own.channel AND known.member {same} own.member
LIMIT 1
"""
#: The key of a clip's URL covers its part.
SELECT_BY_URL = """
SELECT known.id FROM clips known
JOIN runs theirs ON theirs.id = known.run_id
JOIN runs mine ON mine.model_id = theirs.model_id AND mine.options = theirs.options
WHERE mine.id = :run_id AND theirs.id <> :run_id AND known.state = 'done'
AND known.uri_key = (SELECT uri_key FROM clips WHERE id = :clip_id)
ORDER BY theirs.id DESC LIMIT 1
"""


def reuse(
    engine: sa.Engine, run_id: int, clip_id: int, source: words.Source | None
) -> words.Success | None:
    """Return the result that a clip's content has already, from the run's model with its options.

    Without a source: the newest result that the clip's URL has in another run.
    """
    if source:
        digest = bytes.fromhex(source.sha256)
        content = {"start": digest[:7], "content": digest}
        known = ask(engine, SELECT_BY_CONTENT, run_id=run_id, clip_id=clip_id, **content)
    else:
        known = ask(engine, SELECT_BY_URL, run_id=run_id, clip_id=clip_id)
    return None if known is None else _result(engine, known, clip_id)


def _result(engine: sa.Engine, known: int, clip_id: int) -> words.Success | None:
    """Return a clip's result as another's; None if it was deleted a moment ago."""
    facts = [getattr(Clip, name) for name in words.AudioFacts.__slots__]
    columns = Clip.label_ids, Clip.scores, Clip.sha256, Clip.bytes, *facts
    windows_of = sa.select(WindowPrediction).where(WindowPrediction.clip_id == known)
    order = WindowPrediction.channel, WindowPrediction.start_s
    with reading(engine) as connection:
        clip = connection.execute(sa.select(*columns).where(Clip.id == known)).first()
        if clip is None:
            return None
        windows = connection.execute(windows_of.order_by(*order)).all()
        positions = _positions(connection, [clip, *windows])
    return words.Success(
        clip_id,
        words.Source(clip.sha256.hex(), clip.bytes),
        _facts(clip),
        _predictions(clip, positions),
        tuple(_window(row, positions) for row in windows),
        reused=True,
    )


def _facts(clip: sa.Row[Any]) -> words.AudioFacts:
    known = {name: getattr(clip, name) for name in words.AudioFacts.__slots__}
    return words.AudioFacts(**{name: value for name, value in known.items() if value is not None})


def _positions(connection: sa.Connection, rows: list[sa.Row[Any]]) -> dict[int, int]:
    label_ids: set[int] = set()
    for row in rows:
        label_ids.update(row.label_ids)
    places = sa.select(Label.id, Label.position).where(Label.id.in_(label_ids))
    return dict(connection.execute(places).all())


def _predictions(row: sa.Row[Any], positions: dict[int, int]) -> tuple[words.Prediction, ...]:
    pairs = zip(row.label_ids, row.scores, strict=True)
    return tuple(words.Prediction(positions[label_id], score) for label_id, score in pairs)


def _window(row: sa.Row[Any], positions: dict[int, int]) -> words.WindowPredictions:
    predictions = _predictions(row, positions)
    return words.WindowPredictions(row.start_s, row.end_s, predictions, row.channel or None)
