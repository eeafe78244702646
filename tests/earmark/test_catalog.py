"""`earmark models`: what is on this machine, what it hears, and which of two is cheaper."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import huggingface_hub
import pytest

import earmark
from earmark import catalog, machine_speed
from earmark.core.errors import ServiceError
from earmark.core.settings import Settings
from tests.earmark.verbs import verb
from tests.workers.scoring import checkpoints, graphs

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with a model of sound, a broken one, CLAP, and one of text."""
    cache = tmp_path / "hub"
    for name in ("large", "small", "broken", "clap", "text"):
        folder = cache / f"models--owner--{name}"
        snapshot = folder / "snapshots" / "c0ffee"
        if name == "clap":
            checkpoints.save_clap(snapshot)
        elif name == "text":
            snapshot.mkdir(parents=True)
            (snapshot / "config.json").write_text('{"model_type": "bert"}')
        else:
            graphs.save(snapshot)
        if name == "broken":
            (snapshot / "model.onnx").unlink()
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        return str(cache / f"models--{name.replace('/', '--')}" / "snapshots" / "c0ffee")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setenv("EARMARK_MODEL__DEVICE", "cpu")
    return cache


def test_the_models_on_this_machine_are_measured_and_compared(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {"starter": 9.0, "owner/clap": 100.0, "owner/large": 40.0, "owner/small": 8.0}
    monkeypatch.setattr(machine_speed, "scoring_ms", lambda model: costs[model.card.name])
    rows = {row["model"]: row for row in json.loads(verb("models", "--format", "json").text)}
    assert set(rows) == {*costs, "owner/broken"}
    assert (rows["starter"]["labels"], rows["starter"]["hears"]) == (
        17, "baby_cry, chainsaw, clock_tick",
    )  # fmt: skip
    small, large = rows["owner/small"], rows["owner/large"]
    assert (small["sample_rate"], small["window_s"], small["license"]) == (16_000, 1.0, "mit")
    assert (small["ms"], small["device"], small["cheaper"]) == (8.0, "cpu", None)
    assert rows["starter"]["mb"] > 5
    assert large["cheaper"] == "owner/small: 8 ms"
    assert (rows["owner/clap"]["labels"], rows["owner/clap"]["problem"]) == (0, None)
    assert "it has no file model.onnx" in rows["owner/broken"]["problem"]
    settings = Settings()
    assert catalog.cheaper("owner/small", None, settings) is None
    assert catalog.cheaper("starter", None, settings) is None
    sentence = "owner/large takes 40 ms for 5 s of sound; with the same labels owner/small: 8 ms"
    assert catalog.cheaper("owner/large", None, settings) == sentence


def test_named_models_are_measured_on_this_device(tmp_path: Path) -> None:
    folder = str(graphs.save(tmp_path / "model"))
    (entry,) = catalog.models([folder], Settings())
    assert (entry.model, entry.problem) == (folder, None)
    assert entry.ms is not None
    assert entry.ms > 0
    with pytest.raises(ServiceError, match="There is no folder"):
        catalog.models(["./missing"], Settings())


def test_a_clip_is_classified_by_an_onnx_model(tmp_path: Path) -> None:
    folder = graphs.save(tmp_path / "model")
    clip = folder / "reference.wav"
    heard = earmark.classify(str(clip), model=str(folder))
    scores = graphs.scores(graphs.save_clip(folder))
    assert [label for label, _ in sorted(scores.items(), key=lambda each: -each[1])] == [
        each.label for each in heard
    ]
    assert heard[0].score == pytest.approx(max(scores.values()), abs=1e-4)
