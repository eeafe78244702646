"""Which models are taken, how they load, how they fail."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors

from earmark.core import errors, vectors
from tests.workers.scoring import checkpoints
from tests.workers.scoring.checkpoints import load, refusal
from workers.scoring import best_labels, classifier, devices, hub
from workers.scoring.model import Limits

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoints.save("wav2vec2", tmp_path / "model")


def test_the_starters_card_identifies_the_model() -> None:
    card = load("starter").card
    weights = (hub.STARTER / "model.safetensors").read_bytes()
    assert (card.name, card.revision, card.sample_rate, card.function_to_apply) == (
        "starter",
        None,
        16_000,
        "softmax",
    )
    assert card.sha256 == hashlib.sha256(hashlib.sha256(weights).digest()).hexdigest()
    assert card.labels[:2] == ("baby_cry", "chainsaw")
    assert card.min_samples == 8144


def test_windows_are_never_longer_than_a_fixed_models_own(tmp_path: Path) -> None:
    spectrogram = load(checkpoints.save("audio-spectrogram-transformer", tmp_path)).card
    assert [spectrogram.usable_window_s(asked) for asked in (None, 5, 30)] == [10.24, 5, 10.24]
    assert load("starter").card.usable_window_s(30) == 30


@pytest.mark.parametrize(
    ("problem_type", "expected"),
    [
        (None, "softmax"),
        ("single_label_classification", "softmax"),
        ("multi_label_classification", "sigmoid"),
        ("regression", "none"),
    ],
)
def test_the_problem_type_decides_the_function(
    tmp_path: Path, problem_type: str | None, expected: str
) -> None:
    loaded = load(checkpoints.save("wav2vec2", tmp_path, problem_type=problem_type))
    logits = checkpoints.logits(loaded, [checkpoints.clip(1)])
    assert loaded.card.function_to_apply == expected
    assert checkpoints.scores(loaded, [checkpoints.clip(1)]) == pytest.approx(
        classifier.apply(torch.from_numpy(logits), expected).numpy()
    )


def test_the_runs_function_overrides_the_problem_type(model: Path) -> None:
    loaded = load(model)
    logits = checkpoints.logits(loaded, [checkpoints.clip(1)])
    assert checkpoints.scores(loaded, [checkpoints.clip(1)], "none") == pytest.approx(logits)
    assert checkpoints.scores(loaded, [checkpoints.clip(1)], "sigmoid") == pytest.approx(
        1 / (1 + np.exp(-logits))
    )


def test_large_logits_neither_overflow_nor_warn() -> None:
    logits = torch.tensor([[1000.0, -1000.0]])
    assert classifier.apply(logits, "softmax").tolist() == [[1.0, 0.0]]
    assert classifier.apply(logits, "sigmoid").tolist() == [[1.0, 0.0]]


def test_a_speech_recogniser_is_refused_and_its_missing_weights_named(tmp_path: Path) -> None:
    sentence = refusal(checkpoints.save_ctc(tmp_path))
    assert "no audio classifier" in sentence
    assert "classifier.weight" in sentence
    assert "fine-tuned for audio classification" in sentence


def test_a_text_model_is_refused(model: Path) -> None:
    checkpoints.edit_json(
        model / "config.json", model_type="bert", architectures=["BertForSequenceClassification"]
    )
    assert "is a bert model" in refusal(model)


def test_a_missing_model_folder_is_named() -> None:
    assert "There is no folder /nowhere/model" in refusal("/nowhere/model")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "cannot be read as a model" in refusal(tmp_path)


def test_truncated_weights_are_refused(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "cannot be read" in refusal(model)


def test_missing_weights_are_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "cannot be read" in refusal(model)


def test_labels_that_do_not_fit_the_weights_are_refused(model: Path) -> None:
    checkpoints.edit_json(
        model / "config.json", id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1}
    )
    sentence = refusal(model)
    assert "do not fit its config.json" in sentence
    assert "classifier" in sentence


def test_labels_that_are_not_numbered_from_zero_are_refused(model: Path) -> None:
    names = {"0": "a", "1": "b", "2": "c", "3": "d", "7": "e"}
    checkpoints.edit_json(model / "config.json", id2label=names, label2id={})
    assert "not numbered 0 to 4" in refusal(model)


def test_weights_that_only_training_uses_may_be_missing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = checkpoints.save("wav2vec2", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["wav2vec2.masked_spec_embed"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).card.labels


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('a pickle ran code')",))


def _as_pickle(folder: Path, **extra: Any) -> None:
    from safetensors.torch import load_file

    torch.save({**load_file(folder / "model.safetensors"), **extra}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_a_pickle_of_tensors_is_loaded(model: Path) -> None:
    expected = checkpoints.scores(load(model), [checkpoints.clip(1)])
    _as_pickle(model)
    assert checkpoints.scores(load(model), [checkpoints.clip(1)]) == pytest.approx(expected)


def test_a_pickle_that_would_run_code_is_refused(model: Path) -> None:
    _as_pickle(model, evil=Evil())
    assert "cannot be read" in refusal(model)


def test_safetensors_are_preferred_to_a_pickle_beside_them(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    assert load(model).card.labels


def test_a_checkpoints_own_code_never_runs(model: Path) -> None:
    (model / "evil.py").write_text("raise SystemExit('remote code ran')")
    remote = {"AutoConfig": "evil.Config", "AutoModelForAudioClassification": "evil.Model"}
    checkpoints.edit_json(model / "config.json", model_type="evil", auto_map=remote)
    assert "cannot be read as a model" in refusal(model)


def test_a_zero_shot_model_asks_for_labels_and_others_refuse_them(tmp_path: Path) -> None:
    assert "say what to listen for with --labels" in refusal(checkpoints.save_clap(tmp_path))
    assert "--labels is for zero-shot models" in refusal("starter", ("dog",))


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (hub_errors.LocalEntryNotFoundError("offline"), "connect once to download it"),
        (ConnectionError("down"), "connect once to download it"),
        (hub_errors.HFValidationError("bad id"), "a hub id such as owner/model"),
    ],
)
def test_an_unavailable_hub_model_is_explained(
    monkeypatch: pytest.MonkeyPatch, error: Exception, cure: str
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert cure in refusal("owner/model")


def test_a_hub_models_revision_is_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = checkpoints.save("wav2vec2", tmp_path / "snapshots" / commit)
    asked: list[Any] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, [pattern for pattern in allow_patterns if "bin" in pattern]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load("owner/model", revision="main").card.revision == commit
    assert asked == [("owner/model", "main", [])]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_missing_device_is_an_error_and_never_replaced(device: str) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is an MPS device")
    assert "which PyTorch does not find here" in refusal("starter", device=device)


def test_an_unknown_device_or_dtype_is_an_error() -> None:
    assert "it may be auto, cpu, cuda" in refusal("starter", device="gpu")
    assert "it may be auto, float32" in refusal("starter", dtype="int3")


def test_auto_device_prefers_cuda_to_mps_to_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.pick_device("auto").type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.pick_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.pick_device("auto").type == "cuda"


def test_auto_dtype_is_bfloat16_only_on_cuda_that_supports_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert devices.pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert devices.pick_dtype("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert devices.pick_dtype("auto", torch.device("cuda")) == torch.float32


def test_a_half_precision_model_gives_float32_scores_near_the_full_ones(tmp_path: Path) -> None:
    folder = checkpoints.save("audio-spectrogram-transformer", tmp_path)
    full, half = (
        checkpoints.scores(load(folder, dtype=dtype), [checkpoints.clip(1)])
        for dtype in ("float32", "bfloat16")
    )
    assert half.dtype == np.float32
    assert np.abs(full - half).max() < 0.1


class Bounded:
    """A model with room for so many samples; NaN samples give NaN scores, negative ones raise."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.batches: list[int] = []

    def batch(self, samples: list[np.ndarray], **_: Any) -> tuple[torch.Tensor, None]:
        input_values = torch.tensor(np.stack(samples))
        self.batches.append(len(input_values))
        if input_values.numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if (input_values < 0).any():
            raise ValueError("a negative sample")
        return input_values.sum(dim=1, keepdim=True), None

    def twin(self) -> Bounded:
        return self


def bounded(room: int) -> tuple[classifier.Classifier, Bounded]:
    loaded, small = load("starter", batch_windows=8, batch_s=80), Bounded(room)
    loaded._model = small
    loaded.card = SimpleNamespace(
        **{name: getattr(loaded.card, name) for name in loaded.card.__slots__}
    )
    loaded.card.labels = ("sum",)
    return loaded, small


class Given:
    """A model whose logits are its inputs; its embeddings are random, but the same each time."""

    def __init__(self, dimensions: int = 4) -> None:
        self.dimensions = dimensions

    def batch(self, samples: list[np.ndarray], **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        vectors = [self.embedding(row, self.dimensions) for row in samples]
        return torch.tensor(np.stack(samples)), torch.tensor(np.stack(vectors))

    @staticmethod
    def embedding(row: np.ndarray, dimensions: int) -> np.ndarray:
        seed = int.from_bytes(row.tobytes()[:8], "little")
        return np.random.default_rng(seed).normal(size=dimensions).astype(np.float32)


def _tied_logits(labels: int) -> list[np.ndarray]:
    generator = np.random.default_rng(labels)
    coarse = generator.integers(-2, 3, (12, labels)).astype(np.float32)
    extremes = [
        np.zeros(labels),
        np.resize([0.0, -0.0], labels),
        # Softmax and sigmoid make these equal.
        np.linspace(-2000, -1000, labels),
        np.linspace(200, 100, labels),
        np.resize([1.0, np.nextafter(np.float32(1), np.float32(2))], labels),
        np.resize([3e38, -3e38, 1e-45, -1e-45], labels),
    ]
    return [row.astype(np.float32) for row in [*coarse, *extremes]]


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("labels", [1, 2, 17, 527])
def test_the_best_labels_of_a_batch_are_those_of_each_window_with_ties_in_label_order(
    function: str, labels: int
) -> None:
    loaded, _ = bounded(room=0)
    loaded._model = Given()
    logits = _tied_logits(labels)
    scores = loaded.outcomes(logits, function)
    for k in (1, 5, labels):
        best = loaded.outcomes(logits, function, k)
        for window_scores, window_best in zip(scores, best, strict=True):
            assert isinstance(window_scores, np.ndarray)
            assert isinstance(window_best, np.ndarray)
            expected = best_labels.top_k(window_scores, k, 0.0)
            assert best_labels.predictions(window_best, 0.0) == expected


@pytest.mark.parametrize("dimensions", [1, 7, 160, 768])
def test_embeddings_leave_with_the_scores_as_unit_vectors(dimensions: int) -> None:
    loaded, _ = bounded(room=0)
    loaded._model = Given(dimensions)
    logits = _tied_logits(3)
    plain = loaded.outcomes(logits, "none", 2)
    both = loaded.outcomes(logits, "none", 2, embedded=True)
    outcomes = list(zip(plain, both, strict=True))
    assert all(np.array_equal(best, heard.scores) for best, heard in outcomes)
    stored = [heard.vector for heard in both]
    assert {len(vector) for vector in stored} == {dimensions}
    expected = np.array([Given.embedding(row, dimensions) for row in logits])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(vectors.unpack(stored) - expected).max() <= 0.5 / 127 + 1e-6


def test_a_model_without_embeddings_says_so() -> None:
    loaded, _ = bounded(room=1000)
    assert "gives no embeddings" in str(loaded.outcomes([np.ones(9, np.float32)], embedded=True))


def test_best_labels_and_errors_share_a_batch() -> None:
    loaded, _ = bounded(room=0)
    loaded._model = Given()
    first, not_a_number = loaded.outcomes(
        [np.array([0, 1], np.float32), np.array([np.inf, 1], np.float32)], "sigmoid", 1
    )
    assert isinstance(first, np.ndarray)
    assert first["label"].tolist() == [1]
    assert "not numbers" in str(not_a_number)


def test_out_of_memory_halves_this_batch_and_later_ones() -> None:
    loaded, small = bounded(room=300)
    clips = [np.full(100, number, np.float32) for number in range(8)]
    assert checkpoints.logits(loaded, clips)[:, 0].tolist() == [
        100.0 * number for number in range(8)
    ]
    assert small.batches == [8, 4, 2, 2, 4, 2, 2]
    small.batches.clear()
    checkpoints.logits(loaded, clips)
    assert small.batches == [2, 2, 2, 2]


def test_out_of_memory_on_cuda_frees_what_pytorch_keeps_and_counts_for_all_lanes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    loaded, small = bounded(room=300)
    loaded.device = "cuda:0"
    other_lane = loaded.twin()
    clips = [np.ones(100, np.float32)] * 8
    assert checkpoints.logits(loaded, clips).tolist() == [[100.0]] * 8
    assert len(freed) == len([batch for batch in small.batches if batch > 3])
    assert other_lane.choose([100] * 8) == [0, 1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate"
                     " memory"),
        MemoryError(),
    ],
)  # fmt: skip
def test_each_way_of_having_no_memory_is_known(error: Exception) -> None:
    loaded, _ = bounded(room=0)

    def fail(_: Any, **__: Any) -> Any:
        raise error

    loaded._model.batch = fail  # type: ignore[method-assign]
    assert isinstance(loaded.outcomes([np.ones(10, np.float32)])[0], errors.OutOfMemory)
    assert loaded.healthy()


def test_a_lost_device_fails_even_on_silence() -> None:
    loaded, _ = bounded(room=0)

    def lost(_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    loaded._model.batch = lost  # type: ignore[method-assign]
    outcomes = loaded.outcomes([np.ones(10, np.float32)] * 3)
    assert all("illegal memory access" in str(outcome) for outcome in outcomes)
    assert not loaded.healthy()


def test_a_device_without_room_for_the_model_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nSee docs")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    sentence = refusal("starter")
    assert "cannot be put on cpu: end what else uses the device" in sentence
    assert "See docs" not in sentence


def test_a_window_that_does_not_fit_fails_alone() -> None:
    loaded, _ = bounded(room=150)
    first, second = loaded.outcomes([np.zeros(100, np.float32)] * 2)
    assert not isinstance(first, errors.ClipError)
    assert not isinstance(second, errors.ClipError)
    assert isinstance(loaded.outcomes([np.zeros(200, np.float32)])[0], errors.OutOfMemory)
    with pytest.raises(errors.OutOfMemory):
        checkpoints.logits(loaded, [np.zeros(200, np.float32)])


def test_a_window_the_model_fails_on_leaves_its_neighbours_alone() -> None:
    loaded, _ = bounded(room=10_000)
    clips = [np.full(10, value, np.float32) for value in (1, -1, 2, np.nan)]
    good, fault, also_good, not_a_number = loaded.outcomes(clips)
    assert (good, also_good) == ([10.0], [20.0])
    assert "a negative sample" in str(fault)
    assert "not numbers" in str(not_a_number)


def test_windows_share_a_batch_only_at_equal_lengths_within_the_limits() -> None:
    loaded = load("starter", batch_windows=3, batch_s=10)
    assert loaded.choose([16_000, 32_000, 16_000, 16_000, 16_000]) == [0, 2, 3]
    assert loaded.choose([80_000, 80_000, 80_000]) == [0, 1]
    assert loaded.choose([900_000, 900_000]) == [0]


def test_windows_of_a_fixed_model_share_a_batch_at_any_length(tmp_path: Path) -> None:
    loaded = load(
        checkpoints.save("audio-spectrogram-transformer", tmp_path), batch_windows=4, batch_s=40
    )
    assert loaded.choose([16_000, 32_000, 8_000, 100]) == [0, 1, 2]


def test_like_lengths_share_a_batch_where_padding_is_exact() -> None:
    loaded = load("starter")
    loaded.limits = Limits(windows=8, samples=1e9, padding=1.15)
    assert loaded.choose([100, 114, 50, 99, 116]) == [0, 1]
    assert loaded.choose([100, 105, 50, 95]) == [0, 1, 3]


def test_twins_share_their_weights() -> None:
    loaded = load("starter")
    network, twins = loaded._model._network, loaded.twin()._model._network
    assert twins is not network
    pairs = zip(twins.parameters(), network.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)


def test_the_windows_module_needs_no_torch() -> None:
    code = "import workers.scoring.best_labels, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
