"""The options of a run, which decide its scores; kept with the run as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from earmark.core import clips
from earmark.core.errors import UsageError

FunctionToApply = Literal["softmax", "sigmoid", "none"]
Combine = Literal["mean", "max"]
#: Rows of the same clip: one clip with the first row's columns, or a clip for each row.
Duplicates = Literal["merge", "keep"]
#: The format of a list.
InputFormat = Literal["auto", "txt", "csv", "tsv", "jsonl", "parquet"]

#: A model's name, revision, labels of one's own, and the folder of its head.
ModelKey = tuple[str, str | None, tuple[str, ...], str | None]

CHOICES = {
    "function_to_apply": get_args(FunctionToApply),
    "combine": get_args(Combine),
    "input_format": get_args(InputFormat),
    "duplicates": get_args(Duplicates),
}
#: The least and the most that numbers of a submission may be.
BOUNDS: dict[str, tuple[float, float | None]] = {
    "top_k": (1, None),
    "window_s": (0.01, None),
    "hop_s": (0.01, None),
    "limit": (1, None),
    "chunk_size": (1, 1000),
    "priority": (1, 100),
    "stop_at": (0.01, 1),
}
#: Values of `channels` beside a number, as decoders take them.
_CHANNELS = {"mix": clips.MIX_UNLESS_CANCELLING, "each": clips.EACH, "first": 1}
#: Clips in one queue message. With 16, a clip of the starter takes 3 to 5% more processor time; a
#: larger message leaves more workers idle at the end of a short list of slow clips. Where a
#: worker's device scores more than 32 windows at once, a message has two batches.
CHUNK_SIZE = 32
#: A run pauses if more than this share of its clips fails on every worker; 1: never.
STOP_AT = 0.2

#: Options that make sense for one model only.
ONE_MODELS = ("revision", "labels", "head")
#: Options of the run that follows another one.
THEN_OPTIONS = ("then_label", "then_min_score")
#: Options that are several labels, or a text with commas.
LISTS = ("labels", "then_label")
#: Options that are kept only where they are used, so that results of older runs are reused.
SINCE_0_2 = {
    "embeddings": False,
    "head": None,
    "channels": "mix",
    "then_label": (),
    "then_min_score": 0.5,
}


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
    #: Keep the vector before the model's last layer, one for each window.
    embeddings: bool = False
    #: The folder of a head of one's own, in place of the model's last layer.
    head: str | None = None
    #: `mix`, `each`, `first`, or the number of one, from 1 up.
    channels: str = "mix"
    #: Of a run that follows another one: the labels there that let a clip through, and the score
    #: that one of them must reach.
    then_label: tuple[str, ...] = ()
    then_min_score: float = 0.5

    @property
    def decoded_channels(self) -> int:
        """The channels, as decoders take them."""
        return _CHANNELS.get(self.channels) or int(self.channels)

    @property
    def model_key(self) -> ModelKey:
        """What makes the model, with its labels."""
        return self.model, self.revision, self.labels, self.head

    def as_json(self) -> dict[str, Any]:
        values = {**asdict(self), "labels": list(self.labels)}
        for name, default in SINCE_0_2.items():
            if values[name] == default:
                del values[name]
        return values

    @classmethod
    def from_arguments(cls, given: Mapping[str, Any]) -> RunOptions:
        """Return the options among a person's arguments; labels may be a text with commas.

        Raises:
            UsageError: a value is out of bounds, or none of its choices.
        """
        check_arguments(given)
        chosen = _chosen(cls, given)
        for name in LISTS:
            chosen[name] = labels_in(chosen.get(name) or ())
        if head := chosen.get("head"):
            chosen["head"] = str(Path(head).expanduser().resolve())
        channels = str(chosen.get("channels", "mix"))
        return cls(**{**chosen, "channels": channels})

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunOptions:
        known = _chosen(cls, values)
        return cls(**{**known, **{name: tuple(known.get(name, ())) for name in LISTS}})


def labels_in(labels: str | Iterable[str]) -> tuple[str, ...]:
    """Return the labels of a text with commas, or of several texts that are a label each."""
    if isinstance(labels, str):
        labels = [label.strip() for label in labels.split(",")]
    return tuple(labels)


def of_each_model(given: Mapping[str, Any]) -> list[RunOptions]:
    """Return the options among a person's arguments, once for each model that they name.

    The last are those of the model that follows the first, if one does.

    Raises:
        UsageError: a value is wrong, or belongs to one model where there are several.
    """
    models = given.get("model") or RunOptions().model
    if isinstance(models, str):
        models = [models]
    for name in ONE_MODELS:
        if len(models) > 1 and given.get(name):
            raise UsageError(
                reason=f"--{name} belongs to one model: run that model by itself, with a --name of"
                " its own; `earmark compare` sets runs side by side."
            )
    then, through = given.get("then"), given.get("then_label")
    if bool(then) != bool(through):
        raise UsageError(
            reason="--then and --then-label go together: a model, and the labels that let a clip"
            " through to it."
        )
    own = _without(THEN_OPTIONS, given)
    options = [RunOptions.from_arguments({**own, "model": model}) for model in models]
    if then:
        follower = _without(ONE_MODELS, given)
        options.append(RunOptions.from_arguments({**follower, "model": then}))
    return options


def _without(names: Iterable[str], given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The way in which lists, globs and folders are read."""

    input_format: InputFormat = "auto"
    #: None: `url`, else another usual name.
    url_col: str | None = None
    #: None: found by the header.
    delimiter: str | None = None
    #: None: UTF-8, or UTF-16 by its first bytes.
    encoding: str | None = None
    #: The list has no header line: columns have numbers, from 1.
    no_header: bool = False
    #: The folder or URL of relative names; None: the list's own.
    base: str | None = None
    #: Names made of columns, as in `audio/fold{fold}/{name}`.
    template: str | None = None
    #: The columns of a span in seconds. None: found by usual names. Empty: none.
    start_col: str | None = None
    end_col: str | None = None
    #: The column that identifies a clip in place of its URL.
    key_col: str | None = None
    #: Every file of a folder is a clip, and fails if it is no sound.
    strict: bool = False

    @classmethod
    def from_arguments(cls, given: Mapping[str, Any]) -> Listing:
        """Return the options of this kind among a person's arguments."""
        return cls(**_chosen(cls, given))


def split(given: Mapping[str, Any]) -> tuple[list[RunOptions], dict[str, Any]]:
    """Return the options for each model, and the other arguments of `producer.submit.submit`."""
    taken = {*RunOptions.__slots__, *Listing.__slots__, "then"}
    others = {name: value for name, value in given.items() if name not in taken}
    others["listing"] = Listing.from_arguments(given)
    return of_each_model(given), others


def _chosen(kind: type[RunOptions | Listing], given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in kind.__slots__ if name in given}


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise UsageError if the value of an option is out of bounds, or none of its choices."""
    for name, (least, most) in BOUNDS.items():
        value = given.get(name)
        if value is None:
            continue
        if value < least or (most is not None and value > most):
            bounds = f"at least {least}" if most is None else f"from {least} to {most}"
            raise UsageError(reason=f"{name} is {value!r}; it must be {bounds}.")
    for name, choices in CHOICES.items():
        value = given.get(name)
        if value is not None and value not in choices:
            raise UsageError(reason=f"{name} is {value!r}; it must be {' or '.join(choices)}.")
    channels = str(given.get("channels", "mix"))
    if channels not in _CHANNELS and not re.fullmatch("[1-9][0-9]{0,3}", channels):
        raise UsageError(
            reason=f"channels is {channels!r}; it must be mix, each, first or a number from 1 up."
        )
