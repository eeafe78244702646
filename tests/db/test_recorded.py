from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from db import ledger, results
from db.session import reading
from earmark.core import clips as words
from earmark.core.errors import UsageError
from earmark.core.options import RunOptions
from earmark.core.settings import Ledger
from tests.db import builders

if TYPE_CHECKING:
    from typing import Any

NAMES = ("a_20260501_040000.wav", "b_20260501_230000.wav", "c_20260602_050000.wav", "d.wav")


@pytest.fixture
def run_id(engine: sa.Engine) -> int:
    """A run of four clips, whose names tell a time but for the last, which has a tag."""
    run_id = ledger.open_run(engine, "dawn", RunOptions(), queue="clips", chunk_size=16)
    builders.add_clips(engine, run_id, [words.Clip(f"/cards/{name}") for name in NAMES])
    with reading(engine) as connection:
        ids = connection.scalars(sa.text("SELECT id FROM clips ORDER BY id")).all()
    claim = ledger.claim(engine, builders.chunk_of(engine, list(ids)), worker="w", limits=Ledger())
    outcomes = []
    for clip in claim.clips:
        audio = words.AudioFacts(1.0, 8000, 1, "pcm", recorded_at="", tags="")
        if clip.uri.endswith("d.wav"):
            tags = '{"guano.Make": "X"}'
            audio = words.AudioFacts(
                1.0, 8000, 1, "pcm", True, False, True, True, tags, "2026-05-01T04:30:00Z", "guano"
            )
        source = words.Source("ab", 1)
        outcomes.append(words.Success(clip.id, source, audio, (words.Prediction(0, 1.0),)))
    ledger.finish(engine, claim, outcomes, builders.labels(engine), Ledger())
    return run_id


def test_results_tell_what_the_file_or_its_name_says(engine: sa.Engine, run_id: int) -> None:
    first, *_, last = results.results(engine, run_id)
    assert (first["recorded_at"], first["recorded_from"]) == ("2026-05-01T04:00:00", "name")
    assert not first["tags"]
    assert (last["recorded_at"], last["recorded_from"]) == ("2026-05-01T04:30:00Z", "guano")
    assert "guano.Make" in str(last["tags"])
    assert last["over_scale"]
    assert last["cancelling"]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"day": "2026-05-01"}, "abd"),
        ({"day": "2026-06"}, "c"),
        ({"hours": "4-5"}, "acd"),
        ({"hours": "22-4"}, "abd"),
        ({"day": "2026-05-01", "hours": "4", "windows": True}, "ad"),
    ],
)
def test_results_of_a_day_and_of_hours(
    engine: sa.Engine, run_id: int, conditions: dict[str, Any], expected: str
) -> None:
    found = [row["uri"][7] for row in results.results(engine, run_id, **conditions)]
    assert "".join(found) == expected


def test_what_are_no_hours_is_said(engine: sa.Engine, run_id: int) -> None:
    with pytest.raises(UsageError, match="4-6 means"):
        results.results(engine, run_id, hours="dawn")
