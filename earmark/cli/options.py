"""The options that several verbs share, each with its help."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from earmark.core import options
from earmark.output import Format

if TYPE_CHECKING:
    from collections.abc import Callable


def _workers(said: str | int) -> int:
    if said == "auto":
        from earmark.local import gpus

        return len(gpus()) or 1
    if not str(said).isdecimal() or not int(said):
        raise typer.BadParameter("a number from 1 up, or auto")
    return int(said)


Db = Annotated[
    str | None,
    typer.Option(help="Database URL. Default: EARMARK_DATABASE__URL, else a SQLite file."),
]
Workers = Annotated[
    int,
    typer.Option(
        parser=_workers, metavar="N|auto", help="Worker processes; auto: one for each GPU."
    ),
]
Watch = Annotated[bool, typer.Option("--watch", help="Show progress until the end.")]
FlowerPort = Annotated[int, typer.Option(help="Flower's port on this machine.")]
Run = Annotated[str, typer.Argument(help="A run's id or name.")]
LatestRun = Annotated[
    str | None, typer.Argument(help="A run's id or name; the newest if not said.")
]
As = Annotated[
    Format | None, typer.Option("--format", help="Default: a table on a terminal, CSV elsewhere.")
]
Out = Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file.")]

Sources = Annotated[
    list[str],
    typer.Argument(
        help="URLs, audio files, folders, globs, lists (txt, csv, tsv, jsonl, parquet), - for stdin."
    ),
]
Model = Annotated[str, typer.Option(help="starter, a Hugging Face id, or a model directory.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
TopK = Annotated[int, typer.Option(min=1, help="Labels kept per clip.")]
FunctionToApply = Annotated[
    options.FunctionToApply | None,
    typer.Option(help="What turns logits into scores. Default: what the checkpoint asks for."),
]
WindowS = Annotated[
    float | None,
    typer.Option(min=0.01, help="Seconds the model sees at once. Default: the model's."),
]
HopS = Annotated[
    float | None, typer.Option(min=0.01, help="Seconds between windows. Default: the window.")
]
Combine = Annotated[options.Combine, typer.Option(help="How a long clip's windows are combined.")]
MinScore = Annotated[float, typer.Option(help="Predictions below it are not stored.")]
Labels = Annotated[
    str | None,
    typer.Option(help="For a zero-shot (CLAP) model: what to listen for, comma-separated."),
]
InputFormat = Annotated[
    options.InputFormat, typer.Option(help="How the list is written, where its name does not tell.")
]
UrlCol = Annotated[
    str, typer.Option(help="The column with the URL or path; all others are kept as meta.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Stop after so many clips.")]
Name = Annotated[
    str | None, typer.Option(help="The run's name; the same name again goes on where it stopped.")
]
ChunkSize = Annotated[int, typer.Option(min=1, max=1000, help="Clips in one queue message.")]
Priority = Annotated[
    int, typer.Option(min=1, max=100, help="Share of the workers beside other runs.")
]
ReuseUrls = Annotated[
    bool,
    typer.Option(
        "--reuse-urls",
        help="Skip the download of what another run with this model and options has.",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 1 if a clip failed.")]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be classified, and how."""

    sources: Sources
    model: Model = "starter"
    revision: Revision = None
    top_k: TopK = 5
    function_to_apply: FunctionToApply = None
    window_s: WindowS = None
    hop_s: HopS = None
    combine: Combine = "mean"
    min_score: MinScore = 0.0
    labels: Labels = None
    input_format: InputFormat = "auto"
    url_col: UrlCol = "url"
    limit: Limit = None

    @property
    def options(self) -> options.RunOptions:
        chosen = {field.name: getattr(self, field.name) for field in fields(options.RunOptions)}
        labels = tuple(label.strip() for label in self.labels.split(",")) if self.labels else ()
        return options.RunOptions(**{**chosen, "labels": labels})

    def said(self, *names: str) -> dict[str, Any]:
        """Return some of the options by their names, as `producer.submit` takes them."""
        return {name: getattr(self, name) for name in ("input_format", "url_col", "limit", *names)}


@dataclass(frozen=True, kw_only=True)
class Submission(Task):
    """A task that becomes a run."""

    name: Name = None
    chunk_size: ChunkSize = 16
    priority: Priority = 1
    reuse_urls: ReuseUrls = False
    strict: Strict = False
    db: Db = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What `producer.submit` takes beside sources and options."""
        return self.said("name", "chunk_size", "priority", "reuse_urls")


def spread(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb, in place of its first parameter, every option of that parameter's class."""
    first, *others = inspect.signature(verb, eval_str=True).parameters.values()
    kind = first.annotation
    hints = get_type_hints(kind, include_extras=True)
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()
    }
    taken = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name]
        )
        for name, default in defaults.items()
    ]

    @functools.wraps(verb)
    def spread_verb(**said: Any) -> None:
        verb(kind(**{name: said.pop(name) for name in hints}), **said)

    own = [other.replace(kind=inspect.Parameter.KEYWORD_ONLY) for other in others]
    spread_verb.__signature__ = inspect.Signature([*taken, *own])  # type: ignore[attr-defined]
    return spread_verb
