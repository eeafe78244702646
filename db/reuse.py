"""What is known already of a clip's bytes or URL: nothing is classified twice by one model."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from db.models import CONTENT, Clip, Label, WindowPrediction
from db.session import ask, reading
from earmark.core import clips as words

_SAME = (
    "SELECT clips.id FROM clips JOIN runs theirs ON theirs.id = clips.run_id"
    " JOIN runs mine ON mine.model_id = theirs.model_id AND mine.options = theirs.options"
    " WHERE clips.state = 'done' AND mine.id = {run_id}"
)
_BY_CONTENT = f"{_SAME} AND {CONTENT.text} = {{start}} AND sha256 = {{content}} LIMIT 1"
_BY_URL = (
    f"{_SAME} AND theirs.id <> {{run_id}} AND uri_key = (SELECT uri_key FROM clips WHERE id = {{clip_id}})"  # noqa: S608 - our own words
    " ORDER BY theirs.id DESC LIMIT 1"
)


def reuse(
    engine: sa.Engine, run_id: int, clip_id: int, source: words.Source | None
) -> words.Success | None:
    """Return the result that the same bytes already have from the run's model with its options, if there is one.

    Without a source: the result that the clip's URL has in another run, the newest.
    """
    if source:
        content = bytes.fromhex(source.sha256)
        known = ask(engine, _BY_CONTENT, run_id=run_id, start=content[:7], content=content)
    else:
        known = ask(engine, _BY_URL, run_id=run_id, clip_id=clip_id)
    return None if known is None else _result(engine, known, clip_id)


def _result(engine: sa.Engine, known: int, clip_id: int) -> words.Success | None:
    """Return a clip's result as another's; None if it was deleted a moment ago."""
    facts = [getattr(Clip, name) for name in words.AudioFacts.__slots__]
    heard = sa.select(Clip.label_ids, Clip.scores, Clip.sha256, Clip.bytes, *facts).where(
        Clip.id == known
    )
    each = (
        sa.select(WindowPrediction)
        .where(WindowPrediction.clip_id == known)
        .order_by(WindowPrediction.start_s)
    )
    with reading(engine) as connection:
        found = connection.execute(heard).first()
        if found is None:
            return None
        windows = connection.execute(each).all()
        ids = {label_id for row in (found, *windows) for label_id in row.label_ids}
        places = sa.select(Label.id, Label.position).where(Label.id.in_(ids))
        positions = dict(connection.execute(places).all())

    def predictions(row: sa.Row[Any]) -> tuple[words.Prediction, ...]:
        pairs = zip(row.label_ids, row.scores, strict=True)
        return tuple(words.Prediction(positions[label_id], score) for label_id, score in pairs)

    return words.Success(
        clip_id,
        words.Source(found.sha256.hex(), found.bytes),
        words.AudioFacts(*found[4:]),
        predictions(found),
        tuple(words.WindowPredictions(row.start_s, row.end_s, predictions(row)) for row in windows),
        reused=True,
    )
