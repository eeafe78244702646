"""What is known already of a clip's bytes or URL: nothing is classified twice by one model."""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import aliased

from db.models import CONTENT, Clip, Label, Run, WindowPrediction, state_is
from db.session import reading
from earmark import clips as words


def reuse(engine: sa.Engine, run_id: int, clip_id: int, source: words.Source | None) -> words.Success | None:
    """Return the result that the same bytes already have from the run's model with its options, if there is one.

    Without a source: the result that the clip's URL has in another run, the newest.
    """
    values: dict[str, Any] = {"run_id": run_id, "clip_id": clip_id}
    if source:
        content = bytes.fromhex(source.sha256)
        values |= {"content": content, "start": content[:7]}
    with reading(engine) as connection:
        found = connection.execute(_known(by_content=bool(source)), values).first()
        if found is None:
            return None
        each = sa.select(WindowPrediction).where(WindowPrediction.clip_id == found.id)
        windows = connection.execute(each.order_by(WindowPrediction.start_s)).all()
        ids = {label_id for row in (found, *windows) for label_id in row.label_ids}
        places = sa.select(Label.id, Label.position).where(Label.id.in_(ids))
        positions = dict(connection.execute(places).all())

    def predictions(row: sa.Row[Any]) -> tuple[words.Prediction, ...]:
        pairs = zip(row.label_ids, row.scores, strict=True)
        return tuple(words.Prediction(positions[label_id], score) for label_id, score in pairs)

    return words.Success(
        clip_id,
        words.Source(found.sha256.hex(), found.bytes),
        words.AudioFacts(*found[5:]),
        predictions(found),
        tuple(words.WindowPredictions(row.start_s, row.end_s, predictions(row)) for row in windows),
        reused=True,
    )


@cache
def _known(*, by_content: bool) -> sa.Select[*tuple[Any, ...]]:
    # Asked for every clip: to put the statement together anew would cost ten times what it costs to run.
    mine, theirs, asked = aliased(Run), aliased(Run), aliased(Clip)
    same = sa.and_(theirs.model_id == mine.model_id, theirs.options == mine.options)
    facts = [getattr(Clip, name) for name in words.AudioFacts.__slots__]
    known = sa.select(Clip.id, Clip.label_ids, Clip.scores, Clip.sha256, Clip.bytes, *facts)
    known = known.join(theirs, theirs.id == Clip.run_id).join(mine, same)
    known = known.where(mine.id == sa.bindparam("run_id"), state_is("done")).limit(1)
    if by_content:
        start = sa.bindparam("start", type_=sa.LargeBinary)
        return known.where(sa.literal_column(CONTENT.text) == start, Clip.sha256 == sa.bindparam("content"))
    key = sa.select(asked.uri_key).where(asked.id == sa.bindparam("clip_id")).scalar_subquery()
    return known.where(Clip.uri_key == key, theirs.id != sa.bindparam("run_id")).order_by(theirs.id.desc())
