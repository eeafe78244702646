"""The options of a run, which decide its scores; kept with the run as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

FunctionToApply = Literal["softmax", "sigmoid", "none"]
Combine = Literal["mean", "max"]
#: The format of a list.
InputFormat = Literal["auto", "txt", "csv", "tsv", "jsonl", "parquet"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The way in which the clips of a run are classified."""

    #: `starter`, a hub id, or a local directory.
    model: str = "starter"
    revision: str | None = None
    #: Five labels answer "what is it" and cost a hundred bytes a clip.
    top_k: int = 5
    #: None: by the checkpoint's problem type, as transformers does.
    function_to_apply: FunctionToApply | None = None
    #: None: the model's own length.
    window_s: float | None = None
    #: None: windows are side by side, without overlap.
    hop_s: float | None = None
    combine: Combine = "mean"
    #: Predictions below it are not stored.
    min_score: float = 0.0
    #: The labels to listen for, if the model is a zero-shot one (CLAP).
    labels: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "labels": list(self.labels)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunOptions:
        known = {name: values[name] for name in cls.__slots__ if name in values}
        return cls(**{**known, "labels": tuple(known.get("labels", ()))})
