"""Folders with small ONNX models, as `earmark.json` describes them."""

from __future__ import annotations

import json
import wave
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.workers.scoring import checkpoints

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LABELS = ("quiet", "loud", "low")
#: From the mean square and the mean of a window to its logits.
WEIGHTS = np.array([[-9.0, 20.0, 1.0], [3.0, 0.5, -30.0]], np.float32)
BIAS = np.array([0.5, -1.0, 0.25], np.float32)


def logits(windows: Sequence[np.ndarray]) -> np.ndarray:
    """Return what the graph computes, by hand."""
    rows = [[np.mean(np.square(window)), np.mean(window)] for window in windows]
    return np.array(rows, np.float32) @ WEIGHTS + BIAS


def scores(samples: np.ndarray) -> dict[str, float]:
    """Return the softmax of one window's logits, by label."""
    exponentials = np.exp(logits([samples])[0])
    return dict(zip(LABELS, (exponentials / exponentials.sum()).tolist(), strict=True))


def graph(shape: Sequence[int | str] = ("windows", "samples")) -> onnx.ModelProto:
    """Return a graph with an input of this shape, and the outputs `logits` and `embedding`."""
    flat = numpy_helper.from_array(np.array([1 if len(shape) == 1 else 0, -1]), "flat")
    nodes = [
        helper.make_node("Reshape", ["audio", "flat"], ["rows"]),
        helper.make_node("Mul", ["rows", "rows"], ["squares"]),
        helper.make_node("ReduceMean", ["squares"], ["energy"], axes=[1]),
        helper.make_node("ReduceMean", ["rows"], ["mean"], axes=[1]),
        helper.make_node("Concat", ["energy", "mean"], ["embedding"], axis=1),
        helper.make_node("Gemm", ["embedding", "weights", "bias"], ["logits"]),
    ]
    initializers = [
        flat, numpy_helper.from_array(WEIGHTS, "weights"), numpy_helper.from_array(BIAS, "bias"),
    ]  # fmt: skip
    inputs = [helper.make_tensor_value_info("audio", TensorProto.FLOAT, shape)]
    names = ("logits", "embedding")
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    body = helper.make_graph(nodes, "energy", inputs, outputs, initializers)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def only_short(most: int) -> onnx.ModelProto:
    """Return a graph that gives no numbers for windows of more than so many samples."""
    model = graph()
    model.graph.node[-1].output[0] = "numbers"
    for name, value in (("most", np.float32(most)), ("zero", np.float32(0)), ("last", np.array(1))):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    model.graph.node.extend([
        helper.make_node("Shape", ["audio"], ["shape"]),
        helper.make_node("Gather", ["shape", "last"], ["length"]),
        helper.make_node("Cast", ["length"], ["samples"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["most", "samples"], ["left"]),
        helper.make_node("Sqrt", ["left"], ["root"]),
        helper.make_node("Mul", ["root", "zero"], ["nothing"]),
        helper.make_node("Add", ["numbers", "nothing"], ["logits"]),
    ])  # fmt: skip
    return model


def save(
    folder: Path, model: onnx.ModelProto | None = None, *, rate: int = 16_000, **changes: Any
) -> Path:
    """Save a graph with its labels, its reference clip and its description."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model or graph(), folder / "model.onnx")
    (folder / "labels.txt").write_text("\n".join(LABELS))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    describe(
        folder, sample_rate=rate, window_s=1, min_s=0.25, input="audio", output="logits",
        embeddings="embedding", function_to_apply="softmax", reference="reference.wav",
        scores=scores(save_clip(folder, rate=rate)), **changes,
    )  # fmt: skip
    return folder


def save_clip(folder: Path, *, rate: int = 16_000) -> np.ndarray:
    """Save `reference.wav`, a second long; return its samples."""
    pcm = (checkpoints.clip(1, rate=rate).clip(-1, 1) * 32767).astype("<i2")
    with wave.open(str(folder / "reference.wav"), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(pcm.tobytes())
    return pcm.astype(np.float32) / 2**15


def describe(folder: Path, **changes: Any) -> None:
    """Write `earmark.json`, or change some of it; None leaves a field out."""
    path = folder / "earmark.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update(changes)
    kept = {name: value for name, value in content.items() if value is not None}
    path.write_text(json.dumps(kept))


def save_external(folder: Path, location: str = "model.onnx_data") -> Path:
    """Save the graph with some weights in a second file; the graph names it as given."""
    model = graph()
    (weights,) = (each for each in model.graph.initializer if each.name == "weights")
    save(folder, model)
    (folder / "model.onnx_data").write_bytes(weights.raw_data)
    onnx.external_data_helper.set_external_data(weights, location)
    weights.ClearField("raw_data")
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder
