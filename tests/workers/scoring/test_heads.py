"""A head's folder is as untrusted as a model's: what does not fit is refused with a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from earmark.core import errors, settings, vectors
from tests.workers.scoring import checkpoints
from workers.scoring import classifier, heads
from workers.scoring.best_labels import Embedded

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)
BIAS = np.array([0.5, -0.5], np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    heads.save(tmp_path, heads.Head(("owl", "fox"), WEIGHT, BIAS, "5a"), {"more": 1})
    return tmp_path


def facts(folder: Path, **changes: Any) -> None:
    checkpoints.edit_json(folder / heads.FACTS, **changes)


def arrays(folder: Path, **changes: Any) -> None:
    save_file({"weight": WEIGHT, "bias": BIAS, **changes}, folder / heads.WEIGHTS)


def test_a_head_is_read_as_it_was_written(folder: Path) -> None:
    head = heads.load(str(folder))
    assert (head.labels, head.model_sha256) == (("owl", "fox"), "5a")
    assert head.scores(np.array([[1, 0, 0]], np.float32)) == pytest.approx(
        1 / (1 + np.exp([[-0.5, -2.5]]))
    )


@pytest.mark.parametrize(
    "tamper",
    [
        lambda folder: (folder / heads.FACTS).unlink(),
        lambda folder: (folder / heads.WEIGHTS).unlink(),
        lambda folder: (folder / heads.FACTS).write_text("["),
        lambda folder: (folder / heads.FACTS).write_text("[]"),
        lambda folder: (folder / heads.WEIGHTS).write_bytes(b"\x80\x04."),
        lambda folder: (folder / heads.FACTS).write_bytes(bytes(heads.MOST_BYTES[heads.FACTS] + 1)),
        lambda folder: facts(folder, labels=["owl"]),
        lambda folder: facts(folder, labels=["owl", "owl"]),
        lambda folder: facts(folder, labels=["owl", "x" * 201]),
        lambda folder: facts(folder, labels=["owl", "\x1b[31m"]),
        lambda folder: facts(folder, labels=["owl", 1]),
        lambda folder: facts(folder, labels=None),
        lambda folder: arrays(folder, weight=WEIGHT.astype(np.float64)),
        lambda folder: arrays(folder, weight=WEIGHT[0]),
        lambda folder: arrays(folder, weight=WEIGHT * np.float32(np.nan)),
        lambda folder: arrays(folder, bias=BIAS[:1]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(folder: Path, tamper: Callable[[Path], Any]) -> None:
    tamper(folder)
    with pytest.raises(errors.ServiceError, match="is no head that `earmark train` wrote"):
        heads.load(str(folder))


def test_a_model_with_a_head_gives_the_scores_of_its_stored_embeddings(tmp_path: Path) -> None:
    base = classifier.load(settings.Model(name="starter", device="cpu"))
    clips = [checkpoints.clip(seconds, seed=seed) for seed, seconds in enumerate((1, 3, 5))]
    stored = []
    for clip in clips:
        (outcome,) = base.outcomes([clip], embedded=True)
        assert isinstance(outcome, Embedded)
        stored.append(outcome.vector)
    weight = np.random.default_rng(0).normal(size=(4, 160)).astype(np.float32)
    head = heads.Head(tuple("abcd"), weight, weight[:, 0].copy(), base.card.sha256)
    heads.save(tmp_path / "mine", head, {})
    name = str(tmp_path / "mine")
    loaded = classifier.load(settings.Model(name="starter", device="cpu"), (), name)
    assert (loaded.card.name, loaded.card.labels) == ("starter+mine", tuple("abcd"))
    assert loaded.card.sha256 != base.card.sha256
    expected = head.scores(vectors.unpack(stored))
    for lane in (loaded, loaded.twin()):
        found = []
        for clip in clips:
            (scores,) = lane.outcomes([clip], "sigmoid")
            assert isinstance(scores, np.ndarray)
            found.append(scores)
        assert np.abs(np.stack(found) - expected).max() < 1e-5


def test_a_head_for_other_weights_is_refused(folder: Path) -> None:
    with pytest.raises(errors.ServiceError, match="for another model than this starter"):
        classifier.load(settings.Model(name="starter", device="cpu"), (), str(folder))
    digest = classifier.load(settings.Model(name="starter", device="cpu")).card.sha256
    facts(folder, model_sha256=digest)
    with pytest.raises(errors.ServiceError, match="cannot score a window of silence"):
        classifier.load(settings.Model(name="starter", device="cpu"), (), str(folder))


def test_words_are_compared_with_the_embeddings_of_a_clap_model(tmp_path: Path) -> None:
    from workers.scoring.checkpoint import text_vector

    labels = ("dog barking", "piano")
    folder = str(checkpoints.save_clap(tmp_path))
    loaded = classifier.load(settings.Model(name=folder, device="cpu"), labels)
    clip = checkpoints.clip(2, rate=48_000)
    (heard,) = loaded.outcomes([clip], embedded=True)
    texts = np.stack([text_vector(folder, None, label) for label in labels])
    cosines = texts @ vectors.unpack([heard.vector])[0]  # type: ignore[union-attr]
    scale = float(loaded._model._network.head.scale.exp())  # type: ignore[attr-defined]
    logits = heard.scores / scale  # type: ignore[union-attr]
    assert np.abs(cosines - logits).max() < 0.02
