"""ONNX graphs, which ONNX Runtime runs, as models; an `earmark.json` describes each."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from earmark.core import errors, settings
from workers.scoring import description, devices, hub, onnx_file
from workers.scoring.model import Limits, ModelCard

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from workers.scoring.description import Described, Description

logger = logging.getLogger(__name__)

#: Protobuf itself ends at 2 GiB; larger weights are external, in files of their own.
_MOST_GRAPH, _MOST_WEIGHTS = 2**31, 2**36
#: The operators that ONNX Runtime has itself. Others would be code of the model's author.
_OPERATORS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_FATAL_ONLY = 4


@dataclass(frozen=True, slots=True)
class Input:
    """The shape of a graph's input: (samples,), (windows, samples) or (windows, 1, samples)."""

    rank: int
    #: None: any number.
    samples: int | None
    one_window: bool

    def batch(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        """Return windows as the graph takes them, with zeros behind those that are too short."""
        length = self.samples or len(windows[0])
        batch = np.zeros((len(windows), length), np.float32)
        for row, window in zip(batch, windows, strict=True):
            row[: len(window)] = window[:length]
        if self.rank == 2:
            return batch
        return batch[0] if self.rank == 1 else batch[:, None]


@dataclass(eq=False)
class OnnxModel:
    """An ONNX graph in a session, as a `Model`."""

    _session: Any
    _description: Description
    _input: Input
    card: ModelCard
    limits: Limits
    device: str
    lanes: int
    dtype: str = "float32"

    def batch(
        self, windows: Sequence[np.ndarray], *, embeddings: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        names = [self._description.output]
        if embeddings and self._description.embeddings:
            names.append(self._description.embeddings)
        outputs = self._session.run(names, {self._description.input: self._input.batch(windows)})
        logits, *vectors = (_rows(output, len(windows)) for output in outputs)
        if logits.shape[1] != len(self.card.labels):
            raise ValueError(f"it gives {logits.shape[1]} scores, not {len(self.card.labels)}")
        return logits, vectors[0] if vectors else None

    def twin(self) -> OnnxModel:
        """Return itself: many threads may run one session."""
        return self


def _rows(output: np.ndarray, windows: int) -> torch.Tensor:
    return torch.from_numpy(output).float().reshape(windows, -1)


def load(model: settings.Model, described: Described) -> OnnxModel:
    """Load an ONNX model.

    Raises:
        ServiceError: it or ONNX Runtime is not available, or the graph is not as described.
    """
    runtime = _runtime()
    content = described.description()
    labels = described.labels(content.labels)
    files = [described.folder / description.NAME, described.folder / content.labels]
    files += _graph_files(described, content.model)
    device = _device(model, runtime)
    session = _session(described, runtime, described.folder / content.model, device)
    shape = _input(described, content, session)
    card = _card(described, content, labels, shape, description.sha256(files))
    limits = devices.batch_limits(model, device, card.sample_rate)
    if shape.one_window:
        limits.windows = 1
    lanes = devices.lanes_on(model, device)
    return OnnxModel(session, content, shape, card, limits, str(device), lanes)


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise errors.ServiceError(
            reason="ONNX models need ONNX Runtime: pip install 'earmark[onnx]'."
        ) from error
    return onnxruntime


def _graph_files(described: Described, name: str) -> list[Path]:
    """Return the graph's file and those of its external data, after a look at what they name."""
    graph = described.file(name, _MOST_GRAPH)
    try:
        names = onnx_file.read(graph)
    except (OSError, ValueError) as error:
        raise described.refused(f"{name} cannot be read: {error}") from error
    if custom := names.domains - names.own_domains - _OPERATORS:
        raise described.refused(f"{name} needs custom operators ({', '.join(sorted(custom))})")
    files = [graph]
    for each in sorted(names.files):
        if not description.is_file_name(each):
            raise described.refused(f"{name} names an external file outside of its folder")
        beside = (graph.parent / each).relative_to(described.folder)
        files.append(described.file(str(beside), _MOST_WEIGHTS))
    return files


def _device(model: settings.Model, runtime: Any) -> torch.device:
    device = devices.pick_device(model.device)
    if device.type == "cpu":
        return device
    if device.type == "cuda" and _CUDA in runtime.get_available_providers():
        return device
    if model.device != "auto":
        cure = "install onnxruntime-gpu in place of onnxruntime, or set it to cpu"
        reason = f"EARMARK_MODEL__DEVICE is {device}, which ONNX Runtime lacks here: {cure}."
        raise errors.ServiceError(reason=reason)
    logger.info("ONNX Runtime has no %s here: cpu", device, extra={"action": "device_chosen"})
    return torch.device("cpu")


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


def _input(described: Described, content: Description, session: Any) -> Input:
    """Return the graph's only input, after a look at its names and shape."""
    inputs = {each.name: each for each in session.get_inputs()}
    outputs = [each.name for each in session.get_outputs()]
    for name in filter(None, (content.output, content.embeddings)):
        if name not in outputs:
            raise described.refused(f"its outputs are {', '.join(outputs)}, without {name}")
    if list(inputs) != [content.input]:
        raise described.refused(f"its inputs are {', '.join(inputs)}, not {content.input} alone")
    shape = inputs[content.input].shape
    rank = len(shape)
    samples = shape[-1] if rank and isinstance(shape[-1], int) else None
    one_window = rank == 1 or shape[:1] == [1]
    fits = rank in (1, 2, 3) and (one_window or not isinstance(shape[0], int))
    if rank == 3 and shape[1] not in (1, None) and isinstance(shape[1], int):
        fits = False
    if not fits or inputs[content.input].type != "tensor(float)":
        reason = f"its input is {inputs[content.input].type} of shape {shape}"
        raise described.refused(f"{reason}, not float samples of one window or of any number")
    return Input(rank, samples, one_window)


def _card(
    described: Described, content: Description, labels: tuple[str, ...], shape: Input, sha256: str
) -> ModelCard:
    rate = content.sample_rate
    window_s = content.window_s
    if shape.samples:
        window_s = shape.samples / rate
        if content.window_s and abs(content.window_s - window_s) * rate > 1:
            raise described.refused(f"its windows have {window_s:g} s, not {content.window_s:g}")
    if window_s is None:
        raise described.refused("it takes windows of any length, so earmark.json needs window_s")
    least = 1 if shape.samples else round((content.min_s or window_s) * rate)
    return ModelCard(
        name=described.name,
        revision=described.revision,
        sha256=sha256,
        sample_rate=rate,
        function_to_apply=content.function_to_apply,
        labels=labels,
        window_s=window_s,
        fixed=shape.samples is not None,
        min_samples=least,
        license=hub.license_of(described.name, described.revision),
        hop_s=content.hop_s,
    )
