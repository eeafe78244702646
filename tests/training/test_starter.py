"""Training: the trained model is the shipped one, and a stopped training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
import torch

from training import augment, card, clips, frontend, network, starter, synthesis

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

LABELS = ("silence", "siren", "speech")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [",".join(clips.COLUMNS)]
    rng = np.random.default_rng(3)
    for number, label in enumerate((*LABELS, "other", "_background") * 3):
        split = "valid" if number >= 10 else "train"
        soundfile.write(tmp_path / f"{number}.flac", rng.normal(0, 0.1, 30_000), clips.RATE)
        rows.append(f"{number}.flac,{label},{split},somebody,{number},CC0,1.9")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_the_shipped_model_computes_what_was_trained() -> None:
    torch.manual_seed(1)
    trained = network.trainable(LABELS).eval()
    for norm in trained.wav2vec2.feature_extractor.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    waves = torch.randn(2, 40_000) * 0.1
    with torch.inference_mode():
        expected = trained(frontend.loudness(waves, frontend.weights())).logits
        assert (network.shipped(trained)(waves).logits - expected).abs().max() < 1e-4


def test_a_steady_tone_is_louder_where_it_sounds() -> None:
    time = torch.arange(clips.SAMPLES) / clips.RATE
    tones = torch.stack([torch.sin(2 * torch.pi * hertz * time) for hertz in (200, 1000, 4000)])
    bands = frontend.loudness(tones, frontend.weights()).mean(1).argmax(1)
    assert bands.tolist() == sorted(bands.tolist())
    assert len(set(bands.tolist())) == 3


def test_augmented_batches_stay_finite_and_share_one_label() -> None:
    change = augment.Augment(seed=5)
    nobody = torch.zeros(6, dtype=torch.bool)
    batch = augment.Batch(torch.rand(6, 489, 48) * 6, torch.eye(6), nobody, nobody)
    for _ in range(10):
        loud, shares = change(batch, torch.rand(6, 489, 48))
        assert loud.min() >= 0
        assert loud.max() <= frontend.CEILING
        assert shares.sum(1).tolist() == pytest.approx([1] * 6)


def test_a_resumed_run_equals_one_that_was_not_stopped(folder: Path) -> None:
    plan = starter.Plan((folder,), folder / "work", folder / "out", steps=4, batch=4)
    starter.prepare(plan)
    features = starter._features(plan)
    whole, first, second = (starter.Trainer(plan, features, held_out=True) for _ in range(3))
    torch.manual_seed(0)
    expected = [whole._advance() for _ in range(4)]
    torch.manual_seed(0)
    losses = [first._advance(), first._advance()]
    first._save()
    torch.manual_seed(7)
    second._resume()
    assert [*losses, second._advance(), second._advance()] == pytest.approx(expected)


def test_a_run_of_a_few_steps_writes_a_model_that_loads(folder: Path) -> None:
    plan = starter.Plan((folder,), folder / "work", folder / "out", steps=1, batch=4)
    starter.prepare(plan)
    starter.fit(plan, held_out=False)
    heard = card.listen(plan.work / "whole/model", clips.read_manifest(folder))
    assert {each.label for each in heard} <= set(LABELS)


def test_what_is_held_out_is_not_trained_on_and_what_has_no_label_is_every_label_alike(
    folder: Path,
) -> None:
    plan = starter.Plan((folder,), folder / "work", folder / "out", steps=1, batch=400)
    starter.prepare(plan)
    features = starter._features(plan)
    held_out, whole = (
        starter.Trainer(plan, features, held_out=held_out) for held_out in (True, False)
    )
    splits = [{features.splits[place] for place in trainer._train} for trainer in (held_out, whole)]
    assert splits == [{"train"}, {"train", "valid"}]
    shares = sorted({tuple(share) for share in whole._draw()[0].shares.tolist()})
    assert shares == [(0, 0, 1), (0, 1, 0), pytest.approx((1 / 3,) * 3), (1, 0, 0)]


def test_what_is_kept_for_evaluation_cannot_be_trained_on(folder: Path) -> None:
    (folder / "manifest.csv").write_text(
        f"{','.join(clips.COLUMNS)}\n0.flac,music,train,sonic-pi-samples,loop_amen,CC0,1.9\n"
    )
    with pytest.raises(ValueError, match="kept for evaluation"):
        clips.read_manifests([folder])


def test_an_original_cannot_be_in_two_splits(folder: Path) -> None:
    (folder / "manifest.csv").write_text(
        f"{','.join(clips.COLUMNS)}\n0.flac,dog,train,somebody,rex,CC0,1.9\n1.flac,dog,valid,somebody,rex,CC0,1.9\n"
    )
    with pytest.raises(ValueError, match="two splits"):
        clips.read_manifests([folder])


def test_every_original_is_attributed_by_its_folder_or_its_manifest(folder: Path) -> None:
    listed = card.attribution(folder)
    assert [f"- somebody, {number}: CC0" in listed for number in range(15)] == [True] * 15
    (folder / "pack").mkdir()
    (folder / "pack/ATTRIBUTION.md").write_text("rex by nobody, CC0\n")
    assert card.attribution(folder) == "rex by nobody, CC0\n"


def test_synthesised_sounds_are_audible_and_not_clipped() -> None:
    rng = np.random.default_rng(11)
    for number in range(22):
        _, wave = synthesis.other(number, rng)
        assert wave.shape == (clips.SAMPLES,)
        assert 0.05 < np.abs(wave).max() < 1


def test_the_card_names_the_labels_that_fall_short(folder: Path) -> None:
    clip = clips.read_manifest(folder)[2]
    heard = [card.Heard(clip, label, 0.9, (label,)) for label in ("speech", "speech", "silence")]
    assert [*card._short(heard)] == ["speech 0.67"]


def test_the_wilson_interval_is_the_textbook_s() -> None:
    assert card.wilson(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert card.wilson(8, 8)[1] == 1
