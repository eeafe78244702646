"""Two runs are compared clip by clip, label by label, on both databases and by two models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import requests

import earmark
from db import compare, ledger, runs
from db.models import Clip
from db.session import reading
from earmark.core import clips as words
from earmark.core.errors import NotFound
from earmark.core.options import RunOptions
from earmark.core.settings import Ledger, Settings
from tests.db.builders import FACTS, add_clips, chunk_of
from tests.earmark.test_page import serving
from tests.earmark.verbs import verb

if TYPE_CHECKING:
    from pathlib import Path

    import sqlalchemy as sa

Best = tuple[str, float] | None


def scored(engine: sa.Engine, run: str, model: str, best: list[Best]) -> None:
    """Make a run with these best labels; None is a clip that failed."""
    channels = "each" if model == "other" else "mix"
    options = RunOptions(model=model, channels=channels)
    run_id = ledger.open_run(engine, run, options, queue="clips", chunk_size=16)
    listed = []
    for number in range(len(best)):
        # Two parts of one file: told apart by their spans.
        part = words.Part(start_s=number, end_s=number + 1)
        listed.append(words.Clip("/a.wav", {"heard": "dog"}, part))
    add_clips(engine, run_id, listed)
    with reading(engine) as connection:
        clips = connection.execute(
            Clip.__table__.select().where(Clip.run_id == run_id).order_by(Clip.start_s)
        )
        ids = [row.id for row in clips]
    # The labels of another model have other ids, and another order.
    names = sorted(("dog", "rain", "siren"), reverse=model == "other")
    identity = {"name": model, "revision": "", "sha256": "0", "sample_rate": 16000, "window_s": 4.0}
    model_id, label_ids = ledger.register_model(
        engine, names, **identity, function_to_apply="sigmoid"
    )
    ledger.settle_model(engine, run_id, model_id)
    outcomes: list[words.Outcome] = []
    for clip_id, label in zip(ids, best, strict=True):
        if label is None:
            outcomes.append(words.Failure(clip_id, NotFound(status=404)))
            continue
        predictions = (words.Prediction(names.index(label[0]), label[1]),)
        source = words.Source("ab", 7)
        outcomes.append(words.Success(clip_id, source, FACTS, predictions))
    claim = ledger.claim(engine, chunk_of(engine, ids), worker="w", limits=Ledger())
    ledger.finish(engine, claim, outcomes, label_ids, Ledger())


BEFORE: list[Best] = [
    ("dog", 0.9),
    ("dog", 0.75),
    ("dog", 0.5),
    ("siren", 0.5),
    None,
    ("rain", 0.5),
]
AFTER: list[Best] = [
    ("dog", 0.7),
    ("siren", 0.5),
    ("siren", 0.25),
    ("siren", 1.0),
    ("dog", 0.9),
    None,
]


def two_scored(engine: sa.Engine) -> compare.Comparison:
    scored(engine, "before", "m", BEFORE)
    scored(engine, "after", "other", AFTER)
    return compare.compare(engine, runs.find_run(engine, "before"), runs.find_run(engine, "after"))


def test_clips_are_matched_by_file_and_span_and_labels_by_name(engine: sa.Engine) -> None:
    found = two_scored(engine)
    assert (found.clips, found.agreement) == (4, 0.5)
    assert found.differences == {"model": ("m", "other"), "channels": ("mix", "each")}
    dog, siren = found.labels()
    assert (dog["label"], dog["clips_a"], dog["clips_b"], dog["both"]) == ("dog", 3, 1, 1)
    assert (siren["label"], siren["lost"], siren["gained"]) == ("siren", 0, 2)
    (change,) = found.changes()
    assert (change["label_a"], change["label_b"], change["clips"]) == ("dog", "siren", 2)
    most, other = found.changed()
    assert (most["start_s"], most["label_a"], most["score_b"]) == (1.0, "dog", 0.5)
    assert other["change"] == 0.75


def test_runs_without_a_clip_in_common_agree_on_nothing_else(engine: sa.Engine) -> None:
    scored(engine, "before", "m", [("dog", 0.9)])
    scored(engine, "after", "m", [None])
    found = compare.compare(engine, runs.find_run(engine, "before"), runs.find_run(engine, "after"))
    assert (found.clips, list(found.labels()), list(found.changed())) == (0, [], [])


def test_the_page_shows_labels_and_the_clips_that_changed_most(engine: sa.Engine) -> None:
    two_scored(engine)
    ledger.open_run(engine, "empty", RunOptions(), queue="clips")
    for url in serving(engine, Settings(), None):
        shown = requests.get(f"{url}/runs/before/comparison?other=after", timeout=9).text
        assert "4 clips are done in both. 50.0% have one best label." in shown
        assert "Their model differs: m in before, other in after." in shown
        assert "dog 0.75, then siren 0.50" in shown
        other = requests.get(f"{url}/runs/before/comparison?other=empty", timeout=9).text
        assert "No clip is done in both." in other
        gone = requests.get(f"{url}/runs/before/comparison?other=never", timeout=9)
        assert gone.status_code == 404


def test_the_verb_and_python_say_what_changed(
    engine: sa.Engine, database_url: str, tmp_path: Path
) -> None:
    two_scored(engine)
    ended = verb("compare", "before", "after", "--db", database_url)
    assert "4 clips done in both before and after; 50.0% have one best label." in ended.text
    assert "1 more clip done in before alone." in ended.text
    assert "Their model differs: m in before, other in after." in ended.text
    assert "\ndog,3,1,1,2,0\n" in ended.text
    ledger.open_run(engine, "empty", RunOptions(), queue="clips")
    ended = verb("compare", "before", "empty", "--db", database_url)
    assert "No clip is done in both before and empty." in ended.text
    verb(
        "compare",
        "before",
        "after",
        "--by",
        "change",
        "-o",
        f"{tmp_path}/c.csv",
        "--db",
        database_url,
    )
    assert (tmp_path / "c.csv").read_text().startswith("label_a,label_b,clips\ndog,siren,2\n")
    ended = verb(
        "compare", "before", "after", "--by", "clip", "--format", "jsonl", "--db", database_url
    )
    assert ended.text.count('"label_b": "siren"') == 2
    found = earmark.compare("before", "after", db=database_url)
    assert found.agreement == 0.5
    found.engine.dispose()
    ended = verb("compare", "before", "after", "--truth", "heard", "--db", database_url)
    dog = next(line for line in ended.text.splitlines() if line.startswith("dog,"))
    # Of five clips that are dogs in each run, three and then two are called so.
    assert [float(each) for each in dog.split(",")[1:4]] == [5, 1, 0.6]
    assert [float(each) for each in dog.split(",")[5:8]] == [5, 1, 0.4]
    band = ("--max-score", "0.8", "--min-score", "0.5", "--by-score", "--format", "jsonl")
    scores = [
        json.loads(line)["score"]
        for line in verb("results", "before", *band, "--db", database_url).text.splitlines()
    ]
    assert scores == [0.75, 0.5, 0.5, 0.5]
    assert verb("compare", "before", "never", "--db", database_url).status == 2
