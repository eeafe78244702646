"""Trains the starter model: folders of audio in, workers/scoring/starter out (see README.md)."""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from training import augment, card, clips, frontend, network

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STARTER = Path(__file__).parents[1] / "workers" / "starter"
#: How often a label is drawn, against once: those that hold many different sounds more, those of
#: one sound less.
DRAWN = {"silence": 0.4, "music": 2.2, "guitar": 1.5, "piano": 1.2, "speech": 1.2, "rain": 1.2}
#: Clips of a label with few of them are kept in more varied copies.
FEW, MANY_COPIES = 80, 8
STEPS = 6000
SPEED, DECAY, MEMORY, SMOOTHING, SAVED_EVERY = 2e-3, 0.03, 0.998, 0.03, 250
#: The learning rate is level until here, so that a run can be resumed with more steps, and then
#: falls to nothing.
LEVEL_UNTIL = 0.6
#: Two models by one recipe: one shows what it is worth, the other is shipped.
HELD_OUT, WHOLE = "held-out", "whole"


@dataclass(frozen=True, slots=True)
class Plan:
    audio: tuple[Path, ...]
    work: Path
    out: Path
    steps: int = STEPS
    batch: int = 48
    seed: int = 2026
    #: At most so many clips of each label and split.
    clips: int | None = None


@dataclass(slots=True)
class Features:
    """What the front end makes of the clips and their varied copies."""

    loud: torch.Tensor  # (clips, frames, bands) float16
    labels: list[str]
    splits: list[str]
    sources: list[str]
    #: The clip itself, not a varied copy.
    plain: list[bool]

    def where(self, split: str, *, plain: bool = False) -> list[int]:
        places = range(len(self.labels))
        return [
            place
            for place in places
            if self.splits[place] == split and (self.plain[place] or not plain)
        ]

    def label_set(self) -> list[str]:
        return sorted({*self.labels} - {clips.OTHER, clips.BACKGROUND})


def prepare(plan: Plan) -> None:
    """Write the features into the work folder."""
    torch.set_num_threads(1)
    plan.work.mkdir(parents=True, exist_ok=True)
    clips.read_manifests(plan.audio)
    _features(plan)


def fit(plan: Plan, *, held_out: bool) -> None:
    """Write checkpoints and the model into a folder of the work folder, going on where it was left.

    Args:
        held_out: keep the validation split out, to be heard at every save; else train on it as
        well.
    """
    torch.set_num_threads(1)
    trainer = Trainer(plan, _features(plan), held_out=held_out)
    trainer.run()
    network.save(network.shipped(trainer.averaged()), trainer.folder / "model")


def publish(plan: Plan) -> None:
    """Evaluate the model on the clips kept for it, write its card and put it in its place."""
    made = plan.work / WHOLE / "model"
    heard = card.listen(made, clips.read_manifest(plan.audio[0], "test/labels.csv"))
    training = clips.read_manifests(plan.audio)
    valid = card.listen(
        plan.work / HELD_OUT / "model", [clip for clip in training if clip.split == "valid"]
    )
    card.write(made, heard, valid, training)
    originals = "\n".join(card.attribution(folder) for folder in plan.audio)
    (made / "ATTRIBUTION.md").write_text(originals, encoding="utf-8")
    plan.out.mkdir(parents=True, exist_ok=True)
    for path in made.iterdir():
        shutil.copy(path, plan.out / f".{path.name}")
    for path in made.iterdir():
        (plan.out / f".{path.name}").replace(plan.out / path.name)


def _features(plan: Plan) -> Features:
    """Return the features of all folders, each made once, as they take minutes."""
    parts = [_folder_features(plan, number, folder) for number, folder in enumerate(plan.audio)]
    return Features(
        torch.cat([part.loud for part in parts]),
        *(
            list(chain.from_iterable(getattr(part, field.name) for part in parts))
            for field in fields(Features)[1:]
        ),
    )


def _folder_features(plan: Plan, number: int, folder: Path) -> Features:
    kept = plan.work / f"features-{number}.pt"
    if not kept.exists():
        features = _extract(_chosen(folder, plan.clips), plan.seed + number)
        torch.save({field.name: getattr(features, field.name) for field in fields(features)}, kept)
    return Features(**torch.load(kept))


def _chosen(folder: Path, most: int | None) -> list[clips.Clip]:
    chosen: list[clips.Clip] = []
    seen: Counter[tuple[str, str]] = Counter()
    for clip in clips.read_manifest(folder):
        seen[clip.label, clip.split] += 1
        if most is None or seen[clip.label, clip.split] <= most:
            chosen.append(clip)
    return chosen


def _extract(chosen: Sequence[clips.Clip], seed: int) -> Features:
    layers, rng = frontend.weights(), np.random.default_rng(seed)
    counts = Counter(clip.label for clip in chosen)
    features = Features(torch.empty(0), [], [], [], [])
    loud = []
    for done, clip in enumerate(chosen):
        copies = MANY_COPIES if counts[clip.label] < FEW else 1
        waves = np.stack(list(_versions(clip, copies, rng)))
        with torch.no_grad():
            loud.append(frontend.loudness(torch.from_numpy(waves), layers).half())
        features.labels += [clip.label] * len(waves)
        features.splits += [clip.split] * len(waves)
        features.sources += [clip.source] * len(waves)
        features.plain += [True] + [False] * copies
        if done % 500 == 0:
            print(f"{done} of {len(chosen)} clips", flush=True)
    features.loud = torch.cat(loud)
    return features


def _versions(clip: clips.Clip, copies: int, rng: np.random.Generator) -> Iterator[clips.Wave]:
    wave = clips.load(clip.path)
    yield clips.pad(wave)
    for _ in range(copies):
        yield np.asarray(clips.vary(wave, clip.label, rng), np.float32)


class Trainer:
    """The model in training, its moving average, and everything a resumed run needs."""

    def __init__(self, plan: Plan, features: Features, *, held_out: bool) -> None:
        torch.manual_seed(plan.seed)
        self.folder = plan.work / (HELD_OUT if held_out else WHOLE)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._plan, self._features, self._held_out = plan, features, held_out
        self._labels = features.label_set()
        self._numbers = torch.tensor([self._number(label) for label in features.labels])
        # A sound of no label is taught to be every label alike, so that its first score is low
        # ("outlier exposure", Hendrycks et al. 2019): a label of its own took rain, clocks and
        # rotors along.
        count = len(self._labels)
        self._shares = torch.cat([torch.eye(count), torch.full((1, count), 1 / count)])
        self._model = network.trainable(self._labels).to(memory_format=torch.channels_last)
        self._average = {
            name: value.detach().clone() for name, value in self._model.state_dict().items()
        }
        self._optimizer = torch.optim.AdamW(self._groups(), lr=SPEED, betas=(0.9, 0.98))
        self._augment = augment.Augment(plan.seed)
        self._rng = np.random.default_rng(plan.seed)
        splits = ["train"] if held_out else ["train", "valid"]
        self._train = np.array([place for split in splits for place in features.where(split)])
        self._chances = self._weights()
        self._backgrounds = np.array(
            [place for place in self._train if features.labels[place] == clips.BACKGROUND]
        )
        self._step = 0

    def _number(self, label: str) -> int:
        """Return the label's place, or the one after them for sounds of no label."""
        return self._labels.index(label) if label in self._labels else len(self._labels)

    def _groups(self) -> list[dict[str, Any]]:
        parameters = list(self._model.parameters())
        return [
            {"params": [each for each in parameters if each.ndim > 1], "weight_decay": DECAY},
            {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
        ]

    def _weights(self) -> np.ndarray:
        """Draw each label as often as in DRAWN, and each of its sources by the root of its size."""
        names = [*self._labels, clips.OTHER]
        keys = [
            (names[self._numbers[place]], self._features.sources[place]) for place in self._train
        ]
        sizes = Counter(keys)
        roots: Counter[str] = Counter()
        for (label, _), size in sizes.items():
            roots[label] += size**0.5
        chances = np.array(
            [
                DRAWN.get(label, 1) / roots[label] / sizes[label, source] ** 0.5
                for label, source in keys
            ]
        )
        return np.asarray(chances / chances.sum())

    def run(self) -> None:
        self._resume()
        losses: list[float] = []
        while self._step < self._plan.steps:
            losses.append(self._advance())
            if self._step % SAVED_EVERY == 0 or self._step == self._plan.steps:
                self._save()
                heard = self.report() if self._held_out else ""
                print(
                    f"{self.folder.name}, step {self._step}: loss {np.mean(losses):.3f}{heard}",
                    flush=True,
                )
                losses.clear()

    def _advance(self) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = SPEED * self._pace()
        loud, shares = self._augment(*self._draw())
        loss = functional.cross_entropy(self._model(loud).logits, shares, label_smoothing=SMOOTHING)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._model.parameters(), 2.0)
        self._optimizer.step()
        self._step += 1
        self._remember()
        return float(loss.detach())

    def _pace(self) -> float:
        done = self._step / self._plan.steps
        return min(1, (self._step + 1) / 100, max(0.005, (1 - done) / (1 - LEVEL_UNTIL)))

    def _draw(self) -> tuple[augment.Batch, torch.Tensor]:
        places = torch.from_numpy(self._rng.choice(self._train, self._plan.batch, p=self._chances))
        under = torch.from_numpy(self._rng.choice(self._backgrounds, self._plan.batch))
        numbers = self._numbers[places]
        silent = numbers == self._number(clips.SILENCE)
        alone = silent | (numbers == self._number(clips.OTHER))
        batch = augment.Batch(
            self._features.loud[places].float(), self._shares[numbers], alone, silent
        )
        return batch, self._features.loud[under].float()

    def _remember(self) -> None:
        keep = min(MEMORY, (1 + self._step) / (10 + self._step))
        for name, value in self._model.state_dict().items():
            if value.dtype.is_floating_point:
                self._average[name].mul_(keep).add_(value, alpha=1 - keep)

    def averaged(self) -> Any:
        model = network.trainable(self._labels)
        model.load_state_dict(self._average)
        return model.eval()

    def report(self) -> str:
        """Return the averaged model's correct clips of the validation split, and its certainty."""
        places = self._features.where("valid", plain=True)
        right, scores = self._hear(places)
        groups: dict[str, list[int]] = {}
        for number, place in enumerate(places):
            label, source = self._features.labels[place], self._features.sources[place]
            groups.setdefault(f"{label} | {source[:40]}", []).append(number)
        known = right[self._numbers[places].numpy() < len(self._labels)]
        each = (
            f"\n  {group}: {right[of].sum()}/{len(of)}, mean score {scores[of].mean():.2f}"
            for group, of in sorted(groups.items())
        )
        return f"; valid {known.mean():.3f}{''.join(each)}"

    def _hear(self, places: list[int]) -> tuple[np.ndarray, np.ndarray]:
        model = self.averaged()
        with torch.inference_mode():
            batches = [
                self._features.loud[places[at : at + 64]].float()
                for at in range(0, len(places), 64)
            ]
            best = torch.cat([model(batch).logits.softmax(1) for batch in batches]).max(1)
        return (best.indices == self._numbers[places]).numpy(), best.values.numpy()

    def _save(self) -> None:
        state = {
            "step": self._step, "model": self._model.state_dict(), "average": self._average,
            "optimizer": self._optimizer.state_dict(), "augment": self._augment.state,
            "draw": self._rng.bit_generator.state, "dropout": torch.get_rng_state(),
        }  # fmt: skip
        torch.save(state, self.folder / "checkpoint.tmp")
        (self.folder / "checkpoint.tmp").replace(self.folder / "checkpoint.pt")

    def _resume(self) -> None:
        kept = self.folder / "checkpoint.pt"
        if not kept.exists():
            return
        state = torch.load(kept)
        self._step, self._average = state["step"], state["average"]
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._augment.state = state["augment"]
        self._rng.bit_generator.state = state["draw"]
        torch.set_rng_state(state["dropout"])


def parse() -> tuple[str, Plan]:
    parser = argparse.ArgumentParser(prog="python -m training.starter", description=__doc__)
    parser.add_argument("stage", choices=["fit", "publish", "all"], nargs="?", default="all")
    parser.add_argument(
        "--audio", type=Path, nargs="+", required=True, help="folders with a manifest.csv"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/starter"), help="for features and checkpoints"
    )
    parser.add_argument("--out", type=Path, default=STARTER)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--smoke", action="store_true", help="a few clips and 50 steps, into the work folder alone"
    )
    given = parser.parse_args()
    plan = Plan(tuple(given.audio), given.work, given.out, given.steps)
    if given.smoke:
        plan = Plan(
            plan.audio,
            plan.work / "smoke",
            plan.work / "smoke/starter",
            steps=50,
            batch=16,
            clips=6,
        )
    return given.stage, plan


def main() -> None:
    stage, plan = parse()
    if stage in ("fit", "all"):
        prepare(plan)
        # A core each; what fails there fails here.
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as cores:
            for fitted in [
                cores.submit(fit, plan, held_out=held_out) for held_out in (True, False)
            ]:
                fitted.result()
    if stage in ("publish", "all"):
        publish(plan)


if __name__ == "__main__":
    main()
