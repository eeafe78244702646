"""The options that several verbs share, each with its help."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from earmark.core import options
from earmark.core.options import STOP_AT, Listing, RunOptions
from earmark.output import Format

if TYPE_CHECKING:
    from collections.abc import Callable


def _workers(text: str | int) -> int:
    if text == "auto":
        from earmark.machine import gpus

        return len(gpus()) or 1
    if not str(text).isdecimal() or not int(text):
        raise typer.BadParameter("a number from 1 up, or auto")
    return int(text)


def _share(text: str | float) -> float:
    if text == "off":
        return 1.0
    try:
        share = float(str(text).removesuffix("%"))
    except ValueError:
        share = 0.0
    if str(text).endswith("%"):
        share /= 100
    if not 0 < share <= 1:
        raise typer.BadParameter("a share such as 20%, or off")
    return share


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
Notify = Annotated[
    str | None,
    typer.Option(
        envvar="EARMARK_NOTIFY",
        show_envvar=True,
        metavar="URL",
        help="A webhook to tell when the run ends or is stopped.",
    ),
]
FlowerPort = Annotated[int, typer.Option(help="Flower's port on this machine.")]
UiPort = Annotated[int, typer.Option("--port", help="The page's port on this machine.")]
UiAddress = Annotated[str, typer.Option("--address", help="Any but loopback needs a token.")]
UiToken = Annotated[
    str | None,
    typer.Option("--token", envvar="EARMARK_UI_TOKEN", help="The password asked for."),
]
_truth = typer.Option(help="The list's column with the true label, or `reviews`.")
Truth = Annotated[str, _truth]
MaybeTruth = Annotated[str | None, _truth]
Run = Annotated[str, typer.Argument(help="A run's id or name.")]
LatestRun = Annotated[
    str | None, typer.Argument(help="A run's id or name; default: all, or with --watch the newest.")
]
OutputFormat = Annotated[
    Format | None,
    typer.Option(
        "--format",
        help="Default: by the output file's name, else a table on a terminal and CSV elsewhere.",
    ),
]
TextFormat = Annotated[Format | None, typer.Option("--format", help="Default: text.")]
OutputFile = Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file.")]

Sources = Annotated[
    list[str],
    typer.Argument(
        help="URLs, audio files, folders, globs, containers (tar, zip), lists (txt, csv, tsv, json,"
        " parquet), - for stdin."
    ),
]
Model = Annotated[str, typer.Option(help="starter, a Hugging Face id, or a model directory.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
TopK = Annotated[int, typer.Option(min=1, help="Labels kept per clip.")]
FunctionToApply = Annotated[
    options.FunctionToApply | None,
    typer.Option(help="Function from logits to scores. Default: the checkpoint's own."),
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
    typer.Option(help="Labels for a zero-shot (CLAP) model, comma-separated."),
]
Channels = Annotated[
    str,
    typer.Option(
        metavar="mix|each|first|N",
        help="Which channels are heard: their mix, each by itself, the first, or the Nth.",
    ),
]
Embeddings = Annotated[
    bool,
    typer.Option("--embeddings", help="Keep each window's vector, for `similar` and `train`."),
]
Head = Annotated[
    str | None, typer.Option(help="A folder that `earmark train` wrote, on top of --model.")
]
InputFormat = Annotated[
    options.InputFormat, typer.Option(help="Format of the list, if its name does not tell.")
]
UrlCol = Annotated[
    str | None,
    typer.Option(
        help="The column with the URL or path; all others are kept as meta. Default: url, or"
        " another usual name."
    ),
]
Delimiter = Annotated[
    str | None, typer.Option(help="Of a table: a character, or tab. Default: found by the header.")
]
Encoding = Annotated[
    str | None,
    typer.Option(help="Of a list, such as cp1252. Default: UTF-8, or UTF-16 if recognised."),
]
NoHeader = Annotated[
    bool,
    typer.Option("--no-header", help="The table has no header; its columns are 1, 2, 3."),
]
Base = Annotated[
    str | None,
    typer.Option(help="Folder or URL that names are relative to. Default: the list's own."),
]
Template = Annotated[
    str | None,
    typer.Option(help="Names made of columns: 'audio/fold{fold}/{name}.wav'."),
]
StartCol = Annotated[
    str | None,
    typer.Option(
        help="The column with a span's start in seconds. Default: start_s, start_seconds or"
        " offset; '' for whole files."
    ),
]
EndCol = Annotated[
    str | None,
    typer.Option(help="The column with the span's end, or with its length if named duration."),
]
KeyCol = Annotated[
    str | None, typer.Option(help="The column that identifies a clip in place of its URL.")
]
Duplicates = Annotated[
    options.Duplicates,
    typer.Option(help="Rows of the same clip: one clip with the first row's columns, or one each."),
]
Again = Annotated[
    bool, typer.Option("--again", help="Redo local files that have changed since their result.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Stop after so many clips.")]
Name = Annotated[
    str | None, typer.Option(help="The run's name; the same name again goes on where it stopped.")
]
ChunkSize = Annotated[
    int | None,
    typer.Option(
        min=1, max=1000, help="Clips in one queue message; unset: 16, or a GPU's batch of 64."
    ),
]
Priority = Annotated[
    int, typer.Option(min=1, max=100, help="Share of the workers beside other runs.")
]
ReuseUrls = Annotated[
    bool,
    typer.Option(
        "--reuse-urls",
        help="Take results of other runs with this model and options, without a download.",
    ),
]
_STOP_AT = typer.Option(
    parser=_share,
    metavar="SHARE|off",
    help="Pause if more than this share of clips fails on every worker, by no fault of theirs.",
)
StopAt = Annotated[float, _STOP_AT]
MaybeStopAt = Annotated[float | None, _STOP_AT]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Exit with 1 if any clip failed; take each file of a folder as a clip.",
    ),
]


DEFAULTS = RunOptions()


@dataclass(frozen=True, kw_only=True)
class Task:
    """The options of a verb that classifies: its sources, and how they are scored."""

    sources: Sources
    model: Model = DEFAULTS.model
    revision: Revision = DEFAULTS.revision
    top_k: TopK = DEFAULTS.top_k
    function_to_apply: FunctionToApply = DEFAULTS.function_to_apply
    window_s: WindowS = DEFAULTS.window_s
    hop_s: HopS = DEFAULTS.hop_s
    combine: Combine = DEFAULTS.combine
    min_score: MinScore = DEFAULTS.min_score
    labels: Labels = None
    channels: Channels = DEFAULTS.channels
    embeddings: Embeddings = False
    head: Head = None
    input_format: InputFormat = "auto"
    url_col: UrlCol = None
    delimiter: Delimiter = None
    encoding: Encoding = None
    no_header: NoHeader = False
    base: Base = None
    template: Template = None
    start_col: StartCol = None
    end_col: EndCol = None
    key_col: KeyCol = None
    limit: Limit = None
    strict: Strict = False

    @property
    def options(self) -> RunOptions:
        """The options that decide the scores."""
        return RunOptions.from_arguments(self.scoring)

    @property
    def scoring(self) -> dict[str, Any]:
        """The same, as `earmark.run` takes them."""
        return {field.name: getattr(self, field.name) for field in fields(RunOptions)}

    @property
    def reading(self) -> dict[str, Any]:
        """The options that say how a list is read."""
        return {field.name: getattr(self, field.name) for field in fields(Listing)}


@dataclass(frozen=True, kw_only=True)
class Submission(Task):
    """The options of a verb that makes a run."""

    name: Name = None
    chunk_size: ChunkSize = None
    priority: Priority = 1
    reuse_urls: ReuseUrls = False
    stop_at: StopAt = STOP_AT
    duplicates: Duplicates = "merge"
    again: Again = False
    db: Db = None

    @property
    def submission(self) -> dict[str, Any]:
        """How the list becomes a run, as `producer.submit.submit` takes it."""
        return {"listing": Listing(**self.reading), **self._own}

    @property
    def arguments(self) -> dict[str, Any]:
        """All that `earmark.run` and `earmark.submit` take beside the sources."""
        return {**self.scoring, **self.reading, **self._own}

    @property
    def _own(self) -> dict[str, Any]:
        names = {field.name for field in fields(Submission)} - {
            field.name for field in fields(Task)
        }
        return {name: getattr(self, name) for name in ["limit", *sorted(names - {"db"})]}


def spread(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb, in place of its first parameter, every option of that parameter's class."""
    first, *others = inspect.signature(verb, eval_str=True).parameters.values()
    options_class = first.annotation
    hints = get_type_hints(options_class, include_extras=True)
    parameters = []
    for name, field in inspect.signature(options_class).parameters.items():
        parameters.append(field.replace(annotation=hints[name]))
    parameters += [other.replace(kind=inspect.Parameter.KEYWORD_ONLY) for other in others]

    @functools.wraps(verb)
    def spread_verb(**values: Any) -> None:
        chosen = {name: values.pop(name) for name in hints}
        verb(options_class(**chosen), **values)

    spread_verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return spread_verb
