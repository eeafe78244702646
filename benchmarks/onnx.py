"""The cost of a window of an ONNX model behind Earmark's queue, and in ONNX Runtime by hand.

    python -m benchmarks.onnx FOLDER

Both run the same session settings with the same batches, in turns, one thread each. The costs are
CPU seconds; the share is the median over the turns of what the hand-written loop takes of ours: 1
is equal.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from earmark.core import settings
from workers.scoring import classifier
from workers.scoring.batcher import Batcher, QueuedWindow


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="with an earmark.json and a model.onnx")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--windows", type=int, default=16, help="in a turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded = classifier.load(settings.Model(name=arguments.folder, device="cpu", threads=1))
    queue = Batcher(loaded, settings.Worker(), _take)
    by_hand = _session(Path(arguments.folder) / "model.onnx")
    ours_s, theirs_s = [], []
    generator = np.random.default_rng(0)
    samples = round(loaded.card.window_s * loaded.card.sample_rate)
    for turn in range(arguments.turns + 1):
        windows = 0.1 * generator.standard_normal((arguments.windows, samples), np.float32)
        ways = [(ours_s, partial(_ours, queue)), (theirs_s, partial(by_hand, loaded))]
        for costs, score in ways if turn % 2 else reversed(ways):
            began = time.process_time()
            score(windows)
            costs.append(time.process_time() - began)
    queue.close()
    _report(ours_s[1:], theirs_s[1:], arguments.windows)


def _session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def score(loaded: classifier.Classifier, windows: np.ndarray) -> None:
        place = 0
        while place < len(windows):
            size = len(loaded.choose([len(window) for window in windows[place:]]))
            session.run(None, {name: windows[place : place + size]})
            place += size

    return score


def _ours(queue: Batcher, windows: np.ndarray) -> None:
    best: list[Future[np.ndarray]] = [Future() for _ in windows]
    function = queue.classifier.card.function_to_apply
    queue.put(
        QueuedWindow(window, function, future, top_k=5)
        for window, future in zip(windows, best, strict=True)
    )
    for future in best:
        future.result()


def _take(batch: list[QueuedWindow], outcomes: Any) -> None:
    for window, outcome in zip(batch, outcomes, strict=True):
        future: Any = window.tag
        future.set_result(outcome)


def _report(ours_s: list[float], theirs_s: list[float], windows: int) -> None:
    for way, costs in (("ours", ours_s), ("by hand", theirs_s)):
        print(f"{way:8} {1000 * statistics.median(costs) / windows:8.2f} CPU ms a window")
    share = statistics.median(one / other for one, other in zip(theirs_s, ours_s, strict=True))
    print(f"by hand over ours: {share:.3f}")


if __name__ == "__main__":
    main()
