"""Each audio-classification architecture scores as in transformers, alone and in batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES

from earmark.core import settings
from tests.workers.scoring import checkpoints
from workers.scoring import batcher, classifier, hub, pretrained
from workers.scoring.model import Limits

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values"),
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask"),
]

SECONDS = (0.3, 1, 5, 10)
EXACT_WHEN_PADDED = ("hubert, layer norm", "unispeech, layer norm", "unispeech-sat, layer norm",
                     "wav2vec2, layer norm", "wavlm, layer norm")  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    classifier: classifier.Classifier
    waves: list[np.ndarray]
    #: What the pipeline says of each wave by itself, (waves, labels).
    expected: np.ndarray


@pytest.fixture(scope="module", params=[*checkpoints.MAKERS, "starter"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.set_num_threads(1)
    name = request.param
    folder = (
        name if name == "starter" else str(checkpoints.save(name, tmp_path_factory.mktemp("model")))
    )
    loaded = classifier.load(settings.Model(name=folder, device="cpu", threads=2))
    waves = [checkpoints.clip(seconds, seed=number) for number, seconds in enumerate(SECONDS)]
    return Case(name, loaded, waves, _pipeline_scores(loaded, folder, waves))


def _pipeline_scores(
    loaded: classifier.Classifier, folder: str, waves: list[np.ndarray]
) -> np.ndarray:
    """Ask the pipeline; pad a clip shorter than the receptive field (0.5 s in the starter)."""
    path = str(hub.STARTER) if folder == "starter" else folder
    ask: Any = transformers.pipeline("audio-classification", model=path, device="cpu")
    answers = [
        {each["label"]: each["score"] for each in ask(padded(loaded, wave), top_k=None)}
        for wave in waves
    ]
    return np.array([[answer[label] for label in loaded.card.labels] for answer in answers])


def padded(loaded: classifier.Classifier, wave: np.ndarray) -> np.ndarray:
    return np.pad(wave, (0, max(0, loaded.card.min_samples - len(wave))))


def test_every_architecture_of_transformers_is_covered() -> None:
    covered = {name.partition(",")[0] for name in checkpoints.MAKERS}
    assert covered == set(MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES)


def test_a_clip_alone_scores_as_in_the_pipeline(case: Case) -> None:
    scores = np.concatenate(
        [
            checkpoints.scores(case.classifier, [padded(case.classifier, wave)])
            for wave in case.waves
        ]
    )
    assert np.abs(scores - case.expected).max() < 1e-4
    assert np.ptp(case.expected, axis=0).max() > 1e-3, "these clips would not show a difference"


def test_a_clip_among_fifteen_others_scores_as_in_the_pipeline(case: Case) -> None:
    mixed = [padded(case.classifier, wave) for wave in case.waves * 4]
    assert (
        np.abs(checkpoints.scores(case.classifier, mixed) - np.tile(case.expected, (4, 1))).max()
        < 1e-4
    )


def test_the_queue_and_its_lanes_change_no_score(case: Case) -> None:
    scores: dict[Any, Any] = {}

    def scored(batch: list[batcher.QueuedWindow], outcomes: list[Any]) -> None:
        scores.update(zip([window.tag for window in batch], outcomes, strict=True))

    queue = batcher.Batcher(case.classifier, settings.Worker(), scored)
    function = case.classifier.card.function_to_apply
    queue.put(
        batcher.QueuedWindow(padded(case.classifier, wave), function, tag)
        for tag, wave in enumerate(case.waves * 2)
    )
    queue.close()
    found = np.stack([scores[tag] for tag in range(len(scores))])
    assert np.abs(found - np.tile(case.expected, (2, 1))).max() < 1e-4


def test_the_shortest_window_of_the_card_is_taken(case: Case) -> None:
    least = case.classifier.card.min_samples
    assert np.isfinite(checkpoints.logits(case.classifier, [checkpoints.clip(1)[:least]])).all()


@pytest.mark.parametrize("name", checkpoints.MAKERS)
def test_only_models_that_mask_padding_exactly_are_padded(name: str) -> None:
    model, extractor = checkpoints.MAKERS[name]()
    assert pretrained.masks_exactly(model.config, extractor) == (name in EXACT_WHEN_PADDED)


@pytest.mark.parametrize("name", EXACT_WHEN_PADDED)
def test_padding_changes_no_score_of_models_that_are_padded(name: str, tmp_path: Path) -> None:
    loaded = classifier.load(
        settings.Model(name=str(checkpoints.save(name, tmp_path)), device="cpu")
    )
    waves = [checkpoints.clip(seconds, seed=number) for number, seconds in enumerate(SECONDS)]
    alone = checkpoints.scores(loaded, waves)
    loaded.limits = Limits(windows=16, samples=1e9, padding=100)
    assert loaded.choose([len(wave) for wave in waves]) == [0, 1, 2, 3]
    assert np.abs(checkpoints.scores(loaded, waves) - alone).max() < 1e-4


def test_embeddings_are_the_input_of_the_head(case: Case) -> None:
    model: Any = case.classifier._model
    (window, *_) = [padded(case.classifier, wave) for wave in case.waves]
    with torch.inference_mode():
        logits, embeddings = model.batch([window], embeddings=True)
        head = model._network.get_submodule(model._head)
        torch.testing.assert_close(head(embeddings), logits)
        torch.testing.assert_close(model.batch([window])[0], logits)
        assert model.batch([window])[1] is None


def test_fused_attention_is_used_if_transformers_has_it(case: Case) -> None:
    config = case.classifier._model._network.config
    expected = "eager" if config.model_type in ("sew-d", "wavlm") else "sdpa"
    assert config._attn_implementation == expected


@pytest.mark.parametrize("fusion", [False, True])
def test_zero_shot_scores_equal_the_pipelines(tmp_path: Path, *, fusion: bool) -> None:
    labels = ("dog barking", "piano", "siren")
    folder = str(checkpoints.save_clap(tmp_path, fusion=fusion))
    loaded = classifier.load(settings.Model(name=folder, device="cpu"), labels)
    waves = [
        checkpoints.clip(seconds, rate=48_000, seed=number)
        for number, seconds in enumerate(SECONDS)
    ]
    ask: Any = transformers.pipeline("zero-shot-audio-classification", model=folder, device="cpu")
    answers = [
        {each["label"]: each["score"] for each in ask(wave, candidate_labels=list(labels))}
        for wave in waves
    ]
    expected = np.array([[answer[label] for label in labels] for answer in answers])
    assert (
        np.abs(
            np.concatenate([checkpoints.scores(loaded, [wave]) for wave in waves]) - expected
        ).max()
        < 1e-4
    )
    assert np.abs(checkpoints.scores(loaded, waves * 4) - np.tile(expected, (4, 1))).max() < 1e-4
    assert loaded.card.labels == labels
    assert loaded.card.window_s == 10
