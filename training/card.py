"""A model's directory and labelled clips in; its recall, README.md and picture out."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from training import clips

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

TEMPLATE = Path(__file__).with_name("card.md")
#: What the encoder needs for one frame; Earmark pads shorter clips to it, too.
SHORTEST = 8_144
_NO_LABEL = {clips.OTHER: "of no label", clips.BACKGROUND: "of no label"}
_SYNTHETIC = ("synthetic", "timgm6mb")
#: What a first look needs: shares of the test set, and of each of six labels that people try first.
WANTED, WANTED_OF_LABEL = {"real": 0.88, "new": 0.80, "mean": 0.88}, 0.90
TRIED_FIRST = ("dog", "music", "piano", "silence", "siren", "speech")


#: A score under which an answer is better taken as none.
SURE = 0.5


@dataclass(frozen=True, slots=True)
class Heard:
    clip: clips.Clip
    label: str
    score: float
    top: tuple[str, ...]

    @property
    def right(self) -> bool:
        return self.label == self.clip.label

    @property
    def real(self) -> bool:
        return not self.clip.source.startswith(_SYNTHETIC)


def listen(folder: Path, chosen: Iterable[clips.Clip]) -> list[Heard]:
    """Classify each clip as transformers would, one by one."""
    model, extractor = _load(folder)
    return [_listen(model, extractor, clip) for clip in chosen]


def _load(folder: Path) -> tuple[Any, Any]:
    torch.set_num_threads(1)
    model = transformers.AutoModelForAudioClassification.from_pretrained(folder).eval()
    extractors: Any = transformers.AutoFeatureExtractor
    return model, extractors.from_pretrained(folder)


def _listen(model: Any, extractor: Any, clip: clips.Clip) -> Heard:
    wave = clips.pad(clips.load(clip.path), SHORTEST)
    with torch.inference_mode():
        scores = (
            model(**extractor(wave, sampling_rate=clips.RATE, return_tensors="pt"))
            .logits[0]
            .softmax(0)
        )
    best = scores.topk(3)
    top = tuple(model.config.id2label[number] for number in best.indices.tolist())
    return Heard(clip, top[0], float(best.values[0]), top)


def write(
    folder: Path, test: Sequence[Heard], valid: Sequence[Heard], training: Sequence[clips.Clip]
) -> None:
    """Write the model's card and the picture of its confusions beside it.

    Args:
        test: what the model hears in the clips kept for it.
        valid: what its twin does, which was not trained on the validation split.
        training: all clips of both splits.
    """
    model, extractor = _load(folder)
    labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
    trained = {clip.source for clip in training if clip.split == "train"}
    strangers = [each for each in valid if each.clip.label == clips.OTHER]
    known = [each for each in valid if each.clip.label != clips.OTHER]
    right = [each for each in known if each.right]
    facts = {
        "labels": len(labels),
        "megabytes": (folder / "model.safetensors").stat().st_size / 1e6,
        "milliseconds": _milliseconds(model, extractor),
        "parameters": model.num_parameters() / 1e6,
        "shortest": SHORTEST / clips.RATE,
        "window": clips.WINDOW_S,
        "columns": ", ".join(clips.COLUMNS),
        "totals": "\n".join(_totals(test)),
        "table": "\n".join(_table(test, labels, training)),
        "validation": "\n".join(_validation(known, trained)),
        "sources": "\n".join(_sources(training)),
        "of_label": WANTED_OF_LABEL,
        "tried_first": ", ".join(TRIED_FIRST),
        "short": ", ".join(_short(test)) or "none",
        "sure_right": _mean_score(each for each in test if each.right),
        "sure_wrong": _mean_score(each for each in test if not each.right),
        "strangers": len(strangers),
        "stranger_score": _mean_score(strangers),
        "known_score": _mean_score(right),
        "sure": SURE,
        "unsure_strangers": _share_under(strangers),
        "unsure_known": _share_under(right),
    }
    (folder / "README.md").write_text(
        TEMPLATE.read_text(encoding="utf-8").format(**facts), encoding="utf-8"
    )
    _draw(test, labels, folder / "confusion.png")


def attribution(folder: Path) -> str:
    """Return the folder's ATTRIBUTION.md, or its manifest's originals with their licences."""
    for written in folder.rglob("ATTRIBUTION.md"):
        return written.read_text(encoding="utf-8")
    originals = {
        f"- {clip.source}, {clip.original}: {clip.licence}" for clip in clips.read_manifest(folder)
    }
    return "\n".join(["# Originals and their licences", "", *sorted(originals), ""])


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share."""
    z, share = 1.96, right / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _share(right: int, count: int) -> str:
    low, high = wilson(right, count)
    return f"{right} | {count} | {right / count:.2f} ({low:.2f}-{high:.2f})"


def _mean_score(heard: Iterable[Heard]) -> float:
    scores = [each.score for each in heard]
    return float(np.mean(scores)) if scores else math.nan


def _share_under(heard: Sequence[Heard]) -> float:
    return float(np.mean([each.score < SURE for each in heard])) if heard else math.nan


def _milliseconds(model: Any, extractor: Any) -> float:
    """Return the best CPU time of the extractor and the model for one window."""
    wave = np.random.default_rng(0).normal(0, 0.1, clips.SAMPLES).astype(np.float32)
    times = []
    with torch.inference_mode():
        for _ in range(200):
            start = time.process_time()
            model(**extractor(wave, sampling_rate=clips.RATE, return_tensors="pt"))
            times.append(time.process_time() - start)
    return min(times) * 1000


def _totals(test: Sequence[Heard]) -> Iterable[str]:
    groups = {
        "real recordings": ([each for each in test if each.real], WANTED["real"]),
        "real recordings of another source than any training clip": (
            [*filter(_foreign, test)],
            WANTED["new"],
        ),
        "synthetic: sound font of another maker, silence": (
            [each for each in test if not each.real],
            "",
        ),
        "all": (list(test), ""),
    }
    for name, (group, wanted) in groups.items():
        yield f"| {name} | {_share(sum(each.right for each in group), len(group))} | {wanted} |"
    top = sum(each.clip.label in each.top for each in test)
    yield f"| all, among the first three | {_share(top, len(test))} | |"
    mean = np.mean([*_shares(test).values()])
    yield f"| all, mean over labels | | | {mean:.2f} | {WANTED['mean']} |"


def _shares(test: Sequence[Heard]) -> dict[str, float]:
    groups = _by(test, lambda each: each.clip.label)
    return {
        label: sum(each.right for each in group) / len(group) for label, group in groups.items()
    }


def _short(test: Sequence[Heard]) -> Iterable[str]:
    shares = _shares(test)
    return (
        f"{label} {shares[label]:.2f}"
        for label in TRIED_FIRST
        if shares.get(label, 1) < WANTED_OF_LABEL
    )


def _foreign(each: Heard) -> bool:
    return each.real and not each.clip.source.startswith("ESC-10")


def _by(heard: Iterable[Heard], key: Callable[[Heard], Any]) -> dict[Any, list[Heard]]:
    groups = defaultdict(list)
    for each in sorted(heard, key=key):
        groups[key(each)].append(each)
    return groups


def _table(
    test: Sequence[Heard], labels: Sequence[str], training: Sequence[clips.Clip]
) -> Iterable[str]:
    heard = _by(test, lambda each: each.clip.label)
    for label in labels:
        mine = [clip for clip in training if clip.label == label]
        trained = f"{len(mine)} of {len({clip.recording for clip in mine})}"
        group = heard.get(label, [])
        wrong = Counter(each.label for each in group if not each.right)
        mistakes = ", ".join(f"{name} {count}" for name, count in wrong.most_common())
        share = _share(sum(each.right for each in group), len(group)) if group else "- | 0 | -"
        yield f"| {label} | {trained} | {share} | {mistakes} |"


def _validation(valid: Sequence[Heard], trained: set[str]) -> Iterable[str]:
    for (label, source), group in _by(
        valid, lambda each: (each.clip.label, each.clip.source)
    ).items():
        mark = "" if source in trained else " *"
        yield f"| {label} | {source}{mark} | {sum(each.right for each in group)} | {len(group)} |"


def _sources(training: Sequence[clips.Clip]) -> Iterable[str]:
    groups: dict[str, list[clips.Clip]] = defaultdict(list)
    for clip in training:
        groups[clip.source].append(clip)
    for source, group in sorted(groups.items()):
        licences = ", ".join(sorted({clip.licence for clip in group}))
        names = ", ".join(sorted({_NO_LABEL.get(clip.label, clip.label) for clip in group}))
        recordings = len({clip.recording for clip in group})
        yield f"| {source} | {licences} | {names} | {recordings} | {len(group)} |"


def _draw(test: Sequence[Heard], labels: Sequence[str], path: Path) -> None:
    from matplotlib import pyplot

    counts = np.zeros((len(labels), len(labels)), int)
    for each in test:
        counts[labels.index(each.clip.label), labels.index(each.label)] += 1
    figure, axes = pyplot.subplots(figsize=(7, 6.4), dpi=90, layout="constrained")
    axes.imshow(counts / counts.sum(1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="heard as", ylabel="is")
    for row, column in zip(*counts.nonzero(), strict=True):
        colour = "white" if counts[row, column] * 2 > counts[row].sum() else "black"
        axes.text(
            column,
            row,
            str(counts[row, column]),
            ha="center",
            va="center",
            color=colour,
            fontsize=8,
        )
    figure.savefig(path)
    pyplot.close(figure)
