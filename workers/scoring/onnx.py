"""ONNX graphs, which ONNX Runtime runs, as models; an `earmark.json` describes each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workers.scoring import devices, hub, onnx_description, onnx_file
from workers.scoring.model import Model, ModelCard

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from earmark.core import settings
    from workers.scoring.onnx_description import Described, Description

#: Protobuf itself ends at 2 GiB; larger weights are external, in files of their own.
_MOST_GRAPH, _MOST_WEIGHTS = 2**31, 2**36
#: The operators that ONNX Runtime has itself. Others would be code of the model's author.
_OPERATORS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_FATAL_ONLY = 4


@dataclass(eq=False)
class OnnxModel(Model):
    """An ONNX graph in a session."""

    _session: Any
    _description: Description
    #: Of its input: (samples,), (windows, samples) or (windows, 1, samples); no number means any.
    _shape: list[Any]

    def batch(
        self, windows: Sequence[np.ndarray], *, embeddings: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        names = [self._description.output]
        if embeddings and self._description.embeddings:
            names.append(self._description.embeddings)
        outputs = self._session.run(names, {self._description.input: self._stacked(windows)})
        rows = [torch.from_numpy(output).float().reshape(len(windows), -1) for output in outputs]
        logits, *vectors = rows
        if logits.shape[1] != len(self.card.labels):
            raise ValueError(f"it gives {logits.shape[1]} scores, not {len(self.card.labels)}")
        return logits, vectors[0] if vectors else None

    def _stacked(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        """Return windows as the graph takes them, with zeros behind those that are too short."""
        length = self._shape[-1] if isinstance(self._shape[-1], int) else len(windows[0])
        batch = np.zeros((len(windows), length), np.float32)
        for row, window in zip(batch, windows, strict=True):
            row[: len(window)] = window[:length]
        return batch.reshape(*[len(windows), 1][: len(self._shape) - 1], -1)

    def twin(self) -> OnnxModel:
        """Return itself: many threads may run one session."""
        return self


def load(model: settings.Model, described: Described) -> OnnxModel:
    """Load an ONNX model.

    Raises:
        ServiceError: it or ONNX Runtime is not available, or the graph is not as described.
    """
    runtime = _runtime(described)
    content = described.description()
    labels = described.labels(content.labels)
    files = [described.folder / onnx_description.NAME, described.folder / content.labels]
    files += _graph_files(described, content.model)
    device = _device(described, model, runtime)
    session = _session(described, runtime, described.folder / content.model, device)
    shape = _input_shape(described, content, session)
    card = _card(described, content, labels, shape[-1], hub.sha256(files))
    limits = devices.batch_limits(model, device, card.sample_rate)
    if shape[:-1][:1] in ([], [1]):
        limits.windows = 1
    lanes = devices.lanes_on(model, device)
    return OnnxModel(card, limits, str(device), "float32", lanes, session, content, shape)


def _runtime(described: Described) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise described.refused("it needs ONNX Runtime: pip install 'earmark[onnx]'") from error
    return onnxruntime


def _graph_files(described: Described, name: str) -> list[Path]:
    """Return the graph's file and those of its external data, after a look at what they name."""
    graph = described.file(name, _MOST_GRAPH)
    try:
        operators, files = onnx_file.read(graph)
    except (OSError, ValueError) as error:
        raise described.refused(f"{name} cannot be read: {error}") from error
    if custom := operators - _OPERATORS:
        raise described.refused(f"{name} needs custom operators ({', '.join(sorted(custom))})")
    paths = [graph]
    for each in sorted(files):
        if not re.fullmatch(onnx_description.FILE, each):
            raise described.refused(f"{name} names an external file outside of its folder")
        beside = (graph.parent / each).relative_to(described.folder)
        paths.append(described.file(str(beside), _MOST_WEIGHTS))
    return paths


def _device(described: Described, model: settings.Model, runtime: Any) -> torch.device:
    device = devices.pick_device(model.device)
    if device.type == "cuda" and _CUDA in runtime.get_available_providers():
        return device
    if device.type == "cpu" or model.device == "auto":
        return torch.device("cpu")
    cure = "install onnxruntime-gpu in place of onnxruntime, or set EARMARK_MODEL__DEVICE to cpu"
    raise described.refused(f"ONNX Runtime has no {device} here; {cure}")


def _session(described: Described, runtime: Any, graph: Path, device: torch.device) -> Any:
    options = runtime.SessionOptions()
    # A lane is a thread, which computes its windows itself.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry("session.load_model_format", "ONNX")
    providers: list[Any] = [_CPU]
    if device.type == "cuda":
        providers.insert(0, (_CUDA, {"device_id": device.index or 0, "use_tf32": 0}))
    try:
        session = runtime.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # its errors have no class in common
        first_line = str(error).partition("\n")[0]
        raise described.refused(f"ONNX Runtime says: {first_line}") from error
    if device.type == "cuda" and session.get_providers()[0] != _CUDA:
        raise described.refused("ONNX Runtime cannot use CUDA here, see its message above")
    return session


def _input_shape(described: Described, content: Description, session: Any) -> list[Any]:
    """Return the shape of the graph's only input, after a look at the graph's names."""
    inputs = {each.name: each for each in session.get_inputs()}
    outputs = [each.name for each in session.get_outputs()]
    for name in filter(None, (content.output, content.embeddings)):
        if name not in outputs:
            raise described.refused(f"its outputs are {', '.join(outputs)}, without {name}")
    if list(inputs) != [content.input]:
        raise described.refused(f"its inputs are {', '.join(inputs)}, not {content.input} alone")
    shape: list[Any] = inputs[content.input].shape
    # Strings and None stand for any number.
    fits = all(size in (1, None) or isinstance(size, str) for size in shape[:-1])
    if not fits or len(shape) not in (1, 2, 3) or inputs[content.input].type != "tensor(float)":
        reason = f"its input is {inputs[content.input].type} of shape {shape}"
        raise described.refused(f"{reason}, not float samples of one window or of any number")
    return shape


def _card(
    described: Described, content: Description, labels: tuple[str, ...], samples: Any, sha256: str
) -> ModelCard:
    rate, window_s = content.sample_rate, content.window_s
    fixed = isinstance(samples, int)
    if fixed and samples != round(window_s * rate):
        raise described.refused(f"its windows have {samples} samples, not {window_s:g} s")
    return ModelCard(
        name=described.name,
        revision=described.revision,
        sha256=sha256,
        sample_rate=rate,
        function_to_apply=content.function_to_apply,
        labels=labels,
        window_s=window_s,
        fixed=fixed,
        min_samples=1 if fixed else round(min(content.min_s or window_s, window_s) * rate),
        license=hub.license_of(described.name, described.revision),
        hop_s=content.hop_s,
    )
