"""The cost of a clip in a worker's model side, in pipelines, and in a loop that has no queue.

    python -m benchmarks.inference
    python -m benchmarks.inference --models starter --clips 400

All ways are given the same 16 kHz arrays and take turns on a few clips at a time, so a busy machine
slows all alike. Costs are CPU seconds (wall seconds with more than one thread), the median over the
turns; above 1, ours wins. Beside ours stands what the queue takes of its CPU time: all that is not
features and forward pass. The base models get few clips, which cost seconds each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from earmark.core import settings
from workers.scoring import classifier, hub
from workers.scoring.batcher import Batcher, QueuedWindow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RATE = 16_000
LABELS = {number: f"label {number}" for number in range(50)}
AST_MICRO = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 384,
    "frequency_stride": 16,
    "time_stride": 16,
}
AST_TINY = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 768,
}


@dataclass
class Cost:
    """Seconds of each turn of one way."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    #: CPU seconds in features and forward passes, where they are ours.
    model: list[float] = field(default_factory=list)


def main() -> None:
    arguments = _arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    classifier.Classifier._forward = _timed(classifier.Classifier._forward)  # type: ignore[method-assign]
    print(
        f"{'model':14} {'lengths':8} {'way':12}"
        f" {'CPU ms/clip':>12} {'clips/s':>8} {'cost, of ours':>14}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            name = saved_model(model, Path(folder) / model)
            for lengths in ("equal", "ragged"):
                _compare(model, name, lengths, arguments)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, ours included")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(CLIPS), choices=CLIPS)
    parser.add_argument(
        "--clips", type=int, help="instead of as many as a model is given by default"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="lanes of ours, torch threads of the others"
    )
    return parser.parse_args()


def _compare(model: str, name: str, lengths: str, arguments: argparse.Namespace) -> None:
    loaded = classifier.load(settings.Model(name=name, device="cpu", threads=arguments.threads))
    queue = Batcher(loaded, settings.Worker(), _take)
    ways = _ways(loaded, queue, name)
    costs = {way: Cost() for way in ways}
    default, turn = CLIPS[model]
    turns = list(_turns(lengths, arguments.clips or default, turn))
    for score in ways.values():
        score(turns[0][:1])
    for number, clips in enumerate(turns):
        for place in np.random.default_rng(number).permutation(len(ways)):
            way = list(ways)[place]
            # A length the CPU kernels meet for the first time costs extra: everyone gets lengths of
            # their own.
            _measure(ways[way], [clip[place:] for clip in clips], costs[way])
    queue.close()
    for way, cost in costs.items():
        print(
            _row(
                f"{model:14} {lengths:8} {way:12}",
                cost,
                costs["ours"],
                sum(map(len, turns)),
                arguments.threads,
            )
        )
    print(f"{model:14} {lengths:8} {'queue':12} {_queue(costs['ours']):>12.1%}", flush=True)


def _ways(loaded: classifier.Classifier, queue: Batcher, name: str) -> dict[str, Any]:
    folder = hub.STARTER if name == "starter" else name
    pipe: Any = transformers.pipeline("audio-classification", model=str(folder), device="cpu")
    return {
        "ours": lambda clips: _ours(queue, clips),
        "loop": lambda clips: _loop(loaded, clips),
        "pipeline": lambda clips: [pipe(clip) for clip in clips],
        "pipeline x8": lambda clips: pipe(clips, batch_size=8),
        "pipeline x16": lambda clips: pipe(clips, batch_size=16),
        "features": lambda clips: [loaded._model._features([clip]) for clip in clips],
    }


def _ours(queue: Batcher, clips: list[np.ndarray]) -> list[np.ndarray]:
    function = queue.classifier.card.function_to_apply
    best: list[Future[np.ndarray]] = [Future() for _ in clips]
    queue.put(
        QueuedWindow(clip, function, future, top_k=5)
        for clip, future in zip(clips, best, strict=True)
    )
    return [future.result() for future in best]


def _take(batch: list[QueuedWindow], outcomes: Any) -> None:
    for window, outcome in zip(batch, outcomes, strict=True):
        future: Any = window.tag
        future.set_result(outcome)


def _loop(loaded: classifier.Classifier, clips: list[np.ndarray]) -> list[torch.Tensor]:
    """The best possible loop: our features, the same batches and forward pass, and no queue."""
    scores = []
    with torch.inference_mode():
        while clips:
            batch = loaded.choose([len(clip) for clip in clips])
            logits, _ = loaded._model.batch([clips[place] for place in batch])
            scores.append(logits.softmax(-1))
            clips = [clip for place, clip in enumerate(clips) if place not in batch]
    return scores


def _turns(lengths: str, count: int, turn: int) -> Iterator[list[np.ndarray]]:
    generator = np.random.default_rng(0)
    for start in range(0, count, turn):
        seconds = [
            generator.uniform(1, 10) if lengths == "ragged" else 5.0
            for _ in range(min(turn, count - start))
        ]
        yield [
            generator.standard_normal(round(each * RATE)).astype(np.float32) * 0.1
            for each in seconds
        ]


def _measure(score: Any, clips: list[np.ndarray], cost: Cost) -> None:
    forward_s.clear()
    wall, cpu = time.perf_counter(), time.process_time()
    score(clips)
    cost.wall.append(time.perf_counter() - wall)
    cost.cpu.append(time.process_time() - cpu)
    cost.model.append(sum(forward_s))


#: CPU seconds of each of our forward passes in this turn.
forward_s: list[float] = []


def _timed(forward: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def timed(*arguments: Any, **options: Any) -> np.ndarray:
        started = time.thread_time()
        logits = forward(*arguments, **options)
        forward_s.append(time.thread_time() - started)
        return logits

    return timed


def _queue(ours: Cost) -> float:
    return statistics.median(
        1 - model / cpu for model, cpu in zip(ours.model, ours.cpu, strict=True)
    )


def _row(title: str, cost: Cost, ours: Cost, clips: int, threads: int) -> str:
    theirs, reference = (cost.cpu, ours.cpu) if threads == 1 else (cost.wall, ours.wall)
    ratio = statistics.median(one / other for one, other in zip(theirs, reference, strict=True))
    return (
        f"{title} {1000 * sum(cost.cpu) / clips:12.2f} {clips / sum(cost.wall):8.2f} {ratio:14.2f}"
    )


def saved_model(model: str, folder: Path) -> str:
    if model == "starter":
        return model
    torch.manual_seed(0)
    network, extractor = MAKERS[model]()
    network.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return str(folder)


def _ast(**changes: Any) -> tuple[Any, Any]:
    config = transformers.ASTConfig(**changes, id2label=LABELS)
    return transformers.ASTForAudioClassification(config), transformers.ASTFeatureExtractor()


def _wav2vec2() -> tuple[Any, Any]:
    config = transformers.Wav2Vec2Config(id2label=LABELS)
    return transformers.Wav2Vec2ForSequenceClassification(
        config
    ), transformers.Wav2Vec2FeatureExtractor()


#: Random weights: they cost what trained ones do.
MAKERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "ast-micro": lambda: _ast(**AST_MICRO),
    "ast-tiny": lambda: _ast(**AST_TINY),
    "ast-base": _ast,
    "wav2vec2-base": _wav2vec2,
}
#: How many clips a model is given, and how many of them each way scores before the next has its
#: turn.
CLIPS = {
    "starter": (200, 20),
    "ast-micro": (80, 16),
    "ast-tiny": (16, 8),
    "ast-base": (4, 2),
    "wav2vec2-base": (6, 3),
}


if __name__ == "__main__":
    main()
