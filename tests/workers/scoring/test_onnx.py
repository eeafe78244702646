"""ONNX models: which are taken, that they score as the graph does, and what is refused."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import helper, numpy_helper

from earmark.core import settings
from tests.workers.scoring import checkpoints, graphs
from tests.workers.scoring.checkpoints import load, refusal
from workers.scoring import batcher, onnx_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHAPES: dict[str, list[int | str]] = {
    "any windows": ["windows", "samples"],
    "any windows of a fixed length": ["windows", 16_000],
    "any windows with a channel": ["windows", 1, "samples"],
    "one window": [1, "samples"],
    "one window of a fixed length": [1, 16_000],
    "samples alone": ["samples"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return graphs.save(tmp_path / "model")


def test_the_card_is_that_of_the_folder(folder: Path) -> None:
    card = load(folder).card
    assert (card.name, card.revision, card.license) == (str(folder), None, "mit")
    assert (card.sample_rate, card.window_s, card.hop_s) == (16_000, 1.0, None)
    assert (card.labels, card.function_to_apply) == (graphs.LABELS, "softmax")
    assert (card.fixed, card.min_samples) == (False, 4000)


@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_of_each_shape_score_as_by_hand(tmp_path: Path, shape: str) -> None:
    loaded = load(graphs.save(tmp_path, graphs.graph(SHAPES[shape])))
    windows = [checkpoints.clip(seconds, seed=seed) for seed, seconds in enumerate((1, 0.5, 1, 1))]
    heard = windows
    if loaded.card.fixed:
        heard = [np.pad(window, (0, 16_000 - len(window))) for window in windows]
    expected = graphs.logits(heard)
    assert np.abs(checkpoints.logits(loaded, windows) - expected).max() < 1e-4
    assert np.ptp(expected, axis=0).min() > 1e-3, "these clips would not show a difference"
    batch = [windows[place] for place in loaded.choose([len(window) for window in windows])]
    assert len(batch) == (1 if "one" in shape or "alone" in shape else 3 + loaded.card.fixed)
    _, vectors = loaded._model.batch(batch, embeddings=True)
    assert vectors is not None
    assert vectors.shape == (len(batch), 2)
    assert loaded._model.batch(batch)[1] is None


def test_a_clip_longer_than_a_fixed_window_is_cut(tmp_path: Path) -> None:
    graphs.save(tmp_path, graphs.graph(["windows", 8000]))
    scores = graphs.scores(graphs.save_clip(tmp_path)[:8000])
    graphs.describe(tmp_path, window_s=0.5, scores=scores)
    card = load(tmp_path).card
    assert (card.window_s, card.usable_window_s(30), card.min_samples) == (0.5, 0.5, 1)


def test_lanes_share_a_session_and_change_no_score(folder: Path) -> None:
    loaded = load(folder, threads=2)
    logits: dict[Any, Any] = {}

    def scored(batch: list[batcher.QueuedWindow], outcomes: list[Any]) -> None:
        logits.update(zip([window.tag for window in batch], outcomes, strict=True))

    queue = batcher.Batcher(loaded, settings.Worker(), scored)
    windows = [checkpoints.clip(1, seed=seed) for seed in range(40)]
    queue.put(batcher.QueuedWindow(window, "none", tag) for tag, window in enumerate(windows))
    queue.close()
    found = np.stack([logits[tag] for tag in range(40)])
    assert np.abs(found - graphs.logits(windows)).max() < 1e-4


@pytest.mark.slow
def test_an_exported_checkpoint_scores_as_in_transformers(tmp_path: Path) -> None:
    checkpoint = checkpoints.save("wav2vec2", tmp_path / "checkpoint")
    original = load(checkpoint)
    model: Any = original._model
    folder = graphs.save(tmp_path / "exported")
    _export(checkpoint, folder / "model.onnx")
    (folder / "labels.txt").write_text("\n".join(original.card.labels))
    reference = checkpoints.scores(original, [graphs.save_clip(folder)])[0]
    named = dict(zip(original.card.labels, reference.tolist(), strict=True))
    graphs.describe(folder, scores=named)
    exported = load(folder)
    windows = [checkpoints.clip(seconds, seed=seed) for seed, seconds in enumerate((1, 0.3, 1, 5))]
    expected = checkpoints.scores(original, windows)
    assert np.abs(checkpoints.scores(exported, windows) - expected).max() < 1e-4
    with torch.inference_mode():
        wanted = model.batch(windows[:1], embeddings=True)[1]
        torch.testing.assert_close(
            exported._model.batch(windows[:1], embeddings=True)[1], wanted, atol=1e-4, rtol=1e-4
        )


class Exported(torch.nn.Module):
    """A checkpoint that normalises samples itself, as its extractor would."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        variance = audio.var(1, unbiased=False, keepdim=True)
        normal = (audio - audio.mean(1, keepdim=True)) / (variance + 1e-7).sqrt()
        hidden = self.network.base_model(normal).last_hidden_state
        embedding = self.network.projector(hidden).mean(1)
        return self.network.classifier(embedding), embedding


def _export(checkpoint: Path, path: Path) -> None:
    kind: Any = transformers.AutoModelForAudioClassification
    # This exporter writes other scores for scaled_dot_product_attention.
    network = kind.from_pretrained(checkpoint, attn_implementation="eager").eval()
    axes = {"audio": {0: "windows", 1: "samples"}}
    names = {"input_names": ["audio"], "output_names": ["logits", "embedding"]}
    # The new exporter needs a further package; a user may export with either.
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            Exported(network), (torch.randn(2, 16_000),), path, dynamo=False, dynamic_axes=axes,
            **names,
        )  # fmt: skip


def test_the_digest_covers_all_that_decides_scores(folder: Path) -> None:
    digests = {load(folder).card.sha256, load(folder).card.sha256}
    assert len(digests) == 1
    (folder / "labels.txt").write_text("\n".join(graphs.LABELS) + "\n")
    digests.add(load(folder).card.sha256)
    graphs.describe(folder, min_s=0.5)
    digests.add(load(folder).card.sha256)
    graphs.save_external(folder)
    digests.add(load(folder).card.sha256)
    with (folder / "model.onnx_data").open("ab") as file:
        file.write(b"0")
    digests.add(load(folder).card.sha256)
    assert len(digests) == 5


def test_a_hub_model_is_loaded_out_of_the_links_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = graphs.save_external(tmp_path / "models--owner--model" / "snapshots" / "c0ffee")
    blobs = tmp_path / "models--owner--model" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    asked: list[list[str]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    card = load("owner/model").card
    assert (card.name, card.revision) == ("owner/model", "c0ffee")
    assert "earmark.json" in asked[0]
    assert asked[1][-3:] == ["model.onnx*", "labels.txt", "reference.wav"]


def _append(path: Path, content: bytes) -> None:
    path.write_bytes(path.read_bytes() + content)


def _link_out(folder: Path, name: str) -> None:
    outside = folder.parent / f"outside {name}"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)


def _custom(folder: Path) -> None:
    model = graphs.graph()
    model.graph.node.append(helper.make_node("Run", ["audio"], ["x"], domain="evil.example"))
    model.opset_import.append(helper.make_opsetid("evil.example", 1))
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def _second_input(folder: Path) -> None:
    model = graphs.graph()
    model.graph.input.append(helper.make_tensor_value_info("state", 1, ["windows", 2]))
    onnx.save_model(model, folder / "model.onnx")


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other scores": (
        lambda folder: graphs.describe(folder, scores={"loud": 0.5}),
        "it scores loud with 0.",
    ),
    "labels in another order": (
        lambda folder: (folder / "labels.txt").write_text("loud\nquiet\nlow"),
        "and not 0.",
    ),
    "a reference label that is none": (
        lambda folder: graphs.describe(folder, scores={"dog": 1}),
        "names dog, which is none of its labels",
    ),
    "a reference of another rate": (
        lambda folder: graphs.save_clip(folder, rate=8000),
        "reference.wav is not mono, of 16 bits and 16000 Hz",
    ),
    "a reference that is no WAV": (
        lambda folder: (folder / "reference.wav").write_bytes(b"ID3"),
        "reference.wav is no WAV file",
    ),
    "no reference": (
        lambda folder: graphs.describe(folder, reference=None),
        "earmark.json, reference: Field required",
    ),
    "an unknown field": (
        lambda folder: graphs.describe(folder, rate=1),
        "earmark.json, rate: Extra inputs are not permitted",
    ),
    "no JSON": (
        lambda folder: (folder / "earmark.json").write_text("{"),
        "earmark.json, as a whole: Invalid JSON",
    ),
    "a file above the folder": (
        lambda folder: graphs.describe(folder, labels="../labels.txt"),
        "earmark.json, labels: String should match pattern",
    ),
    "an absolute file": (
        lambda folder: graphs.describe(folder, model="/etc/passwd"),
        "earmark.json, model: String should match pattern",
    ),
    "a missing file": (
        lambda folder: (folder / "model.onnx").unlink(),
        "it has no file model.onnx",
    ),
    "a link out of the folder": (
        lambda folder: _link_out(folder, "labels.txt"),
        "labels.txt leads out of its folder",
    ),
    "a description that is a link out": (
        lambda folder: _link_out(folder, "earmark.json"),
        "earmark.json leads out of its folder",
    ),
    "a description that is too large": (
        lambda folder: _append(folder / "earmark.json", b" " * 2**16),
        "earmark.json is larger than 65536 bytes",
    ),
    "a label twice": (
        lambda folder: (folder / "labels.txt").write_text("loud\nloud\nlow"),
        "labels.txt has an empty line, or a label twice",
    ),
    "too few labels": (
        lambda folder: (folder / "labels.txt").write_text("quiet\nloud"),
        "it gives 3 scores, not 2",
    ),
    "external data above the folder": (
        lambda folder: graphs.save_external(folder, "../model.onnx_data"),
        "model.onnx names an external file outside of its folder",
    ),
    "absolute external data": (
        lambda folder: graphs.save_external(folder, "/etc/passwd"),
        "model.onnx names an external file outside of its folder",
    ),
    "an address as external data": (
        lambda folder: graphs.save_external(folder, "*/_ORT_MEM_ADDR_/*"),
        "model.onnx names an external file outside of its folder",
    ),
    "missing external data": (
        lambda folder: graphs.save_external(folder, "weights"),
        "it has no file weights",
    ),
    "external data behind a link": (
        lambda folder: _link_out(graphs.save_external(folder), "model.onnx_data"),
        "model.onnx_data leads out of its folder",
    ),
    "custom operators": (_custom, "model.onnx needs custom operators (evil.example)"),
    "a damaged graph": (
        lambda folder: _append(folder / "model.onnx", b"\x3a\xff\xff\x7f"),
        "model.onnx cannot be read: it ends too early",
    ),
    "no graph": (
        lambda folder: (folder / "model.onnx").write_bytes(b"\x80\x04pickle"),
        "model.onnx cannot be read: it ",
    ),
    "an empty graph": (
        lambda folder: (folder / "model.onnx").write_bytes(b""),
        "model.onnx cannot be read",
    ),
    "an invalid graph": (
        lambda folder: (folder / "model.onnx").write_bytes(b"\x08\x08"),
        "ONNX Runtime says: ",
    ),
    "a second input": (_second_input, "its inputs are audio, state, not audio alone"),
    "an unknown output": (
        lambda folder: graphs.describe(folder, embeddings="vectors"),
        "its outputs are logits, embedding, without vectors",
    ),
    "no window": (
        lambda folder: graphs.describe(folder, window_s=None),
        "earmark.json, window_s: Field required",
    ),
    "another window": (
        lambda folder: onnx.save_model(graphs.graph(["n", 8000]), folder / "model.onnx"),
        "its windows have 8000 samples, not 1 s",
    ),
    "a batch of four": (
        lambda folder: onnx.save_model(graphs.graph([4, "n"]), folder / "model.onnx"),
        "not float samples of one window or of any number",
    ),
    "spectrograms": (
        lambda folder: onnx.save_model(graphs.graph(["n", 64, 100]), folder / "model.onnx"),
        "not float samples of one window or of any number",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_that_is_not_as_it_says_is_refused(folder: Path, wrong: str) -> None:
    spoil, reason = WRONG[wrong]
    spoil(folder)
    sentence = refusal(folder)
    assert reason in sentence
    assert sentence.startswith(str(folder))
    assert "\n" not in sentence


def test_labels_of_the_run_and_a_missing_runtime_are_explained(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "has its own labels" in refusal(folder, ["dog"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'earmark[onnx]'" in refusal(folder)


def test_a_gpu_without_its_provider_is_an_error_unless_it_is_auto(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert load(folder, device="auto").device == "cpu"
    assert "ONNX Runtime has no cuda here; install onnxruntime-gpu" in refusal(
        folder, device="cuda"
    )


def test_names_are_found_in_branches_and_functions(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(graphs.BIAS, "inner")
    onnx.external_data_helper.set_external_data(tensor, "inner.bin")
    tensor.ClearField("raw_data")
    output = helper.make_tensor_value_info("y", 1, None)
    branch = helper.make_graph([], "branch", [], [output], [tensor])
    choice = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    body = helper.make_function("own", "F", [], ["c"], [constant], [helper.make_opsetid("deep", 1)])
    model = helper.make_model(
        helper.make_graph([choice], "g", [], [output]), functions=[body],
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("own", 1)],
    )  # fmt: skip
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    operators, files = onnx_file.read(tmp_path / "model.onnx")
    assert files == {"inner.bin"}
    assert operators == {"", "deep"}
