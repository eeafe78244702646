"""The commands of docs/guides/deciding.md lead from a run to an accepted list."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from db import changes, decisions, reviews
from db.reviews import Review
from db.rows import select
from db.session import connect, fetch, writing
from earmark import thresholds
from earmark.core.errors import UsageError
from earmark.core.settings import Database
from earmark.sampling import Clips
from tests.earmark.test_evaluation import classified
from tests.earmark.verbs import verb
from tests.servers import upgraded
from tests.test_docs import commands_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sqlalchemy as sa

    from db.runs import RunRow

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "deciding.md"
#: They run workers or serve a page.
LONG = ("earmark run birds.csv --name march", "earmark review march")


@pytest.fixture
def march(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[sa.Engine, RunRow, dict[int, str]]]:
    """A run with a truth for each clip; no label of it is reviewed yet."""
    url = upgraded(f"sqlite:///{tmp_path}/e.db")
    monkeypatch.setenv("EARMARK_DATABASE__URL", url)
    monkeypatch.chdir(tmp_path)
    engine = connect(url, Database())
    run, truth, _ = classified(engine)
    with writing(engine) as connection:
        connection.exec_driver_sql("UPDATE runs SET name = 'march'")
    yield engine, run, dict(enumerate(truth, 1))
    engine.dispose()


def heard(engine: sa.Engine, run: RunRow, label: str, count: int, right: Any) -> None:
    """Review the first clips of the random queue of a label."""
    clips = Clips.of(fetch(engine, decisions.SELECT_CLIPS, run_id=run.id, label=label))
    said = []
    for clip_id in clips.ids[clips.drawn((0.0, 2.0))[:count]].tolist():
        verdict = "right" if right(clip_id) else "wrong"
        words = {"clip_id": clip_id, "label": label, "verdict": verdict, "reviewer": "ana"}
        said.append(Review(**words, sample_low=0.0, sample_high=2.0))
    reviews.write(engine, run.id, said)


def test_the_commands_of_the_page_lead_to_the_accepted_list(
    march: tuple[sa.Engine, RunRow, dict[int, str]], tmp_path: Path
) -> None:
    engine, run, truth = march
    heard(engine, run, "dog", 200, lambda clip_id: truth[clip_id] == "dog")
    heard(engine, run, "siren", 5, lambda _: True)
    printed = {}
    for line in commands_of(PAGE.read_text()):
        if line.strip() not in LONG:
            # Its clips are at a host that does not exist.
            more = ["--clips", "0"] if line.startswith("earmark report") else []
            ended = verb(*shlex.split(line)[1:], *more)
            assert ended.status == 0, ended.text
            printed[line.strip()] = ended.text
    assert "siren: needs" in printed["earmark thresholds march --precision 0.95"]
    with (tmp_path / "accepted.csv").open() as file:
        accepted = list(csv.DictReader(file))
    kept = next(select(engine, "SELECT * FROM thresholds WHERE label = 'dog'"))
    assert len(accepted) == kept["clips"] > 0
    assert {row["label"] for row in accepted} == {"dog"}
    assert min(float(row["score"]) for row in accepted) == pytest.approx(kept["min_score"])
    assert kept["confidence"] == pytest.approx(0.95)
    assert "Compared with the truth" in (tmp_path / "march.html").read_text()
    assert len((tmp_path / "clips.csv").read_text().splitlines()) == 301


def test_each_look_that_tests_takes_from_the_confidence(engine: sa.Engine) -> None:
    run, _, _ = classified(engine)

    def look(count: int, **more: Any) -> dict[str, Any]:
        heard(engine, run, "dog", count, lambda _: True)
        return next(thresholds.thresholds(engine, run, 0.95, **more))

    with pytest.raises(UsageError, match="`earmark review birds` does it"):
        next(thresholds.thresholds(engine, run, 0.95))
    assert (look(3)["confidence"], look(3)["min_score"]) == (1.0, None)
    first = look(90)
    assert (first["confidence"], first["more"]) == (pytest.approx(0.95), 0)
    assert look(90)["confidence"] == pytest.approx(0.95)
    assert look(95)["confidence"] == pytest.approx(0.90)
    assert look(97, looks=2)["confidence"] == pytest.approx(0.875)
    assert len(list(select(engine, "SELECT * FROM accepted"))) == first["clips"]
    changes.prune(engine, run.id)
    assert json.dumps(list(select(engine, "SELECT * FROM thresholds"))) == "[]"
