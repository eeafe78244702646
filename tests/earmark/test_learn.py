"""What is done with embeddings: search, an index, a head of one's own, a run scored by it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars
import pytest
import requests
import sqlalchemy as sa

import earmark
from db import ledger, reviews, runs
from db.models import Clip
from db.reviews import Review
from db.session import reading
from earmark.core import clips as words
from earmark.core.options import RunOptions
from earmark.core.settings import Database, Ledger, Settings
from tests.db.builders import FACTS, add_clips, chunk_of
from tests.earmark.test_page import serving
from tests.earmark.verbs import Ended, verb
from workers.scoring import heads

if TYPE_CHECKING:
    from pathlib import Path

DIMENSIONS = 12
SPECIES = ("owl", "fox", "")
IDENTITY = {
    "name": "m",
    "revision": "",
    "sha256": "5a",
    "sample_rate": 16000,
    "window_s": 5.0,
    "function_to_apply": "softmax",
}


class Heard(NamedTuple):
    """A run whose clips have two windows each: owls, foxes, and what nobody named."""

    engine: sa.Engine
    run_id: int
    ids: list[int]
    db: str

    def verb(self, *words: str) -> Ended:
        return verb(words[0], *words[1:], "--db", self.db)

    def rows(self, *words: str) -> list[dict[str, Any]]:
        ended = self.verb(*words, "--format", "jsonl")
        assert ended.status == 0, ended.text
        return [json.loads(line) for line in ended.text.splitlines() if line.startswith("{")]


def stored(vector: np.ndarray) -> bytes:
    return np.round(vector / np.abs(vector).max() * 127).astype(np.int8).tobytes()


def vector(kind: int, number: int) -> bytes:
    centre = np.zeros(DIMENSIONS)
    centre[kind] = 1.0
    noise = np.random.default_rng(number).normal(size=DIMENSIONS)
    return stored(centre + 0.1 * noise)


def hear(engine: sa.Engine, run_id: int, ids: list[int]) -> None:
    """End clips with labels that are always the same, and embeddings of their species."""
    model_id, label_ids = ledger.register_model(engine, ["dog", "siren"], **IDENTITY)
    ledger.settle_model(engine, run_id, model_id)
    outcomes: list[words.Outcome] = []
    for number, clip_id in enumerate(ids):
        best = (words.Prediction(number % 2, 0.5 + number / 1000),)
        spans = ((0.0, 5.0), (5.0, 10.0))
        other = (words.Prediction(1 - number % 2, 0.4),)
        windows = (
            words.WindowPredictions(*spans[0], best), words.WindowPredictions(*spans[1], other)
        )  # fmt: skip
        kind = number % len(SPECIES)
        embeddings = tuple(
            words.Embedding(*span, vector(kind, 2 * number + half))
            for half, span in enumerate(spans)
        )
        source = words.Source(f"{clip_id:064x}", 7)
        outcomes.append(words.Success(clip_id, source, FACTS, best, windows, embeddings=embeddings))
    claim = ledger.claim(engine, chunk_of(engine, ids), worker="w", limits=Ledger())
    assert ledger.finish(engine, claim, outcomes, label_ids, Ledger())["done"] == len(ids)


def submit(engine: sa.Engine, run_id: int, numbers: range) -> list[int]:
    clips = [
        words.Clip(f"https://a.org/{n}.wav", {"what": SPECIES[n % len(SPECIES)], "odd": n})
        for n in numbers
    ]
    add_clips(engine, run_id, clips)
    with reading(engine) as connection:
        waiting = sa.select(Clip.id).where(Clip.run_id == run_id, Clip.state == "pending")
        return list(connection.scalars(waiting.order_by(Clip.id)))


@pytest.fixture
def heard(
    engine: sa.Engine, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Heard:
    monkeypatch.setenv("EARMARK_DATA_DIR", str(tmp_path / "data"))
    options = RunOptions(embeddings=True, top_k=2)
    run_id = ledger.open_run(engine, "night", options, queue="q", chunk_size=16)
    ids = submit(engine, run_id, range(30))
    hear(engine, run_id, ids)
    return Heard(engine, run_id, ids, database_url)


def test_similar_windows_come_first_and_the_clip_itself_does_not(heard: Heard) -> None:
    owls, foxes = heard.ids[::3], heard.ids[1::3]
    found = heard.rows("similar", "night", "--to", str(owls[0]), "-n", "18")
    assert {row["clip_id"] for row in found} == {*owls[1:]}
    assert [row["rank"] for row in found] == [*range(1, 19)]
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    assert found[0]["score"] > 0.9
    assert {(row["start_s"], row["end_s"]) for row in found} == {(0.0, 5.0), (5.0, 10.0)}
    assert found[0].keys() >= {"uri", "label", "channel", "member"}
    # Each window has its own label, which is not the clip's in the second half.
    for row in found:
        dog = (row["clip_id"] in heard.ids[::2]) == (row["start_s"] == 0.0)
        assert row["label"] == ("dog" if dog else "siren")
    # The run's even clips are dogs.
    dogs = heard.rows("similar", "night", "--to", str(foxes[0]), "-n", "50", "--label", "dog")
    assert {row["clip_id"] for row in dogs} == {*heard.ids[::2]}


def test_the_index_is_written_again_when_the_run_has_changed_and_goes_with_it(
    heard: Heard, tmp_path: Path
) -> None:
    def folders() -> list[Path]:
        return list((tmp_path / "data" / "indexes").glob("*/*"))

    assert "60 windows of night" in heard.verb("index", "night").text
    (first,) = folders()
    heard.verb("index", "night")
    assert folders() == [first]
    hear(heard.engine, heard.run_id, submit(heard.engine, heard.run_id, range(30, 33)))
    assert "66 windows of night" in heard.verb("index", "night").text
    (second,) = folders()
    assert second != first
    assert heard.verb("prune", "night", "--yes").status == 0
    assert folders() == []


def test_the_page_shows_more_like_a_clip(heard: Heard, tmp_path: Path) -> None:
    settings = Settings(database=Database(url=heard.db), data_dir=tmp_path)
    for url in serving(heard.engine, settings, None):
        run = requests.get(f"{url}/runs/{heard.run_id}", timeout=60).text
        assert f'href="/clips/{heard.ids[0]}/similar"' in run
        more = requests.get(f"{url}/clips/{heard.ids[0]}/similar", timeout=60)
    assert more.status_code == 200
    shown = re.findall(r'data-load="/clips/(\d+)"', more.text)
    assert {*map(int, shown[:18])} == {*heard.ids[3::3]}


@pytest.mark.parametrize("wrong", ["999999", "owl hoots", "/no/file.wav"])
def test_what_cannot_be_searched_for_is_a_sentence(heard: Heard, wrong: str) -> None:
    ended = heard.verb("similar", "night", "--to", wrong)
    assert ended.status == 2
    assert "no clip" in ended.text or "needs a CLAP model" in ended.text


def test_a_run_without_embeddings_says_how_to_keep_them(heard: Heard) -> None:
    ledger.open_run(heard.engine, "bare", RunOptions(), queue="q", chunk_size=16)
    for wanted in (["index", "bare"], ["similar", "bare", "--to", "1"]):
        ended = heard.verb(*wanted)
        assert ended.status == 2
        assert "submit its list with --embeddings" in ended.text


def test_embeddings_are_exported_and_are_an_array_in_python(heard: Heard, tmp_path: Path) -> None:
    file = tmp_path / "v.parquet"
    heard.verb("export", "night", "--embeddings", "-o", str(file))
    exported = polars.read_parquet(file)
    frame = earmark.open("night", db=heard.db).embeddings()
    vectors = frame["vector"].to_numpy()
    assert vectors.shape == (60, DIMENSIONS)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=0.02)
    assert np.allclose(np.stack(exported["vector"].to_list()), vectors)
    assert exported.columns == frame.columns
    assert frame["clip_id"].to_list() == sorted(heard.ids * 2)


def test_a_head_learns_a_column_and_scores_the_run_anew(heard: Heard, tmp_path: Path) -> None:
    folder = tmp_path / "head"
    figures = heard.rows("train", "night", "--labels-from", "what", "-o", str(folder))
    assert [(row["label"], row["clips"], row["without"]) for row in figures] == [
        ("fox", 10, 10),
        ("owl", 10, 10),
    ]
    assert all(row["average_precision"] == row["recall"] == 1.0 for row in figures)
    assert {path.name for path in folder.iterdir()} == {
        "head.json",
        "head.safetensors",
        "README.md",
    }
    ended = heard.verb("rescore", "night", "--head", str(folder), "--name", "night-2")
    assert ended.status == 0, ended.text
    check_rescored(heard)
    again = heard.verb("rescore", "night", "--head", str(folder), "--name", "night-2")
    assert again.status == 0, again.text
    check_rescored(heard)
    other = heard.verb("rescore", "night", "--head", str(folder), "--name", "night")
    assert (other.status, "exists with another" in other.text) == (2, True)


def check_rescored(heard: Heard) -> None:
    run = earmark.open("night-2", db=heard.db)
    rows = list(run.results())
    for species in ("owl", "fox"):
        of_species = [row for row in rows if species in json.dumps(row["meta"])]
        assert {row["label"] for row in of_species} == {species}
        assert min(row["score"] for row in of_species) > 0.5
    assert len(rows) == 30
    assert len(list(run.results(windows=True, rank=2))) == 120
    assert run.progress().states == {**dict.fromkeys(words.STATES, 0), "done": 30}
    assert run.progress().audio_s == 30 * FACTS.duration_s
    assert rows[0]["codec"] == FACTS.codec
    assert rows[0]["sha256"]
    assert run.row.options.embeddings is False


def test_a_head_learns_from_reviews_of_spans(heard: Heard, tmp_path: Path) -> None:
    said = []
    for number, clip_id in enumerate(heard.ids):
        right: Any = "wrong" if number % 3 else "right"
        said.append(Review(clip_id=clip_id, label="owl", verdict=right, reviewer="a", end_s=4.0))
    said.append(Review(clip_id=heard.ids[0], label="bat", verdict="right", reviewer="a"))
    reviews.write(heard.engine, heard.run_id, said)
    folder = str(tmp_path / "head")
    figures = heard.rows("train", "night", "--labels-from", "reviews", "-o", folder)
    assert figures[0] == {
        "label": "bat", "clips": 1, "without": 0,
        "precision": None, "recall": None, "average_precision": None,
    }  # fmt: skip
    assert figures[1]["average_precision"] == 1.0
    assert heads.load(folder).labels == ("owl",)


@pytest.mark.parametrize("column", ["odd", "nothing"])
def test_what_cannot_be_learnt_is_refused(heard: Heard, tmp_path: Path, column: str) -> None:
    folder = tmp_path / "head"
    ended = heard.verb("train", "night", "--labels-from", column, "-o", str(folder))
    assert ended.status == 2
    assert f"Nothing can be learnt from {column}" in ended.text
    assert not folder.exists()


def test_a_head_of_another_model_is_refused(heard: Heard, tmp_path: Path) -> None:
    weight = np.ones((1, DIMENSIONS), np.float32)
    heads.save(tmp_path / "h", heads.Head(("x",), weight, weight[:, 0].copy(), "other"), {})
    ended = heard.verb("rescore", "night", "--head", str(tmp_path / "h"), "--name", "new")
    assert ended.status == 3
    assert "for another model than this m" in ended.text
    assert not any(row["run"] == "new" for row in runs.run_progress(heard.engine))
