"""The options that several verbs share, each with its help."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from earmark.core.options import BOUNDS, STOP_AT, Duplicates, Listing, RunOptions
from earmark.output import Format


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


#: By name, options as typer reads them.
Parameters = dict[str, inspect.Parameter]
STOPPING: Any = {"parser": _share, "metavar": "SHARE|off", "min": None, "max": None}
#: What an option has beside its help, type, default and bounds.
MORE: dict[str, Any] = {
    "channels": {"metavar": "mix|each|first|N"},
    "stop_at": STOPPING,
    "rank": {"min": 1},
}
#: The flags of an option that has more than its name.
FLAGS = {"rank": ["--rank", "--top-k"]}
PAUSE_HELP = "Pause if more than this share of clips fails on every worker, by no fault of theirs."
MaybeStopAt = Annotated[float | None, typer.Option(help=PAUSE_HELP, **STOPPING)]
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
_truth = typer.Option(help="A column of the list that says what is there, or `reviews`.")
Truth = Annotated[str, _truth]
MaybeTruth = Annotated[str | None, _truth]
Run = Annotated[str, typer.Argument(help="A run's id or name.")]
LatestRun = Annotated[
    str | None, typer.Argument(help="A run's id or name; default: all, or with --watch the newest.")
]
Label = Annotated[str | None, typer.Option(help="Only this label.")]
OutputFormat = Annotated[
    Format | None,
    typer.Option(
        "--format",
        help="Default: by the output file's name, else a table on a terminal and CSV elsewhere.",
    ),
]
TextFormat = Annotated[Format | None, typer.Option("--format", help="Default: text.")]
OutputFile = Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file.")]


@dataclass(frozen=True, kw_only=True)
class _Submission:
    """What `producer.submit.submit` takes beside the options of a run and of a list."""

    limit: int | None = None
    name: str | None = None
    chunk_size: int | None = None
    priority: int = 1
    reuse_urls: bool = False
    stop_at: float = STOP_AT
    duplicates: Duplicates = "merge"
    again: bool = False


def parameters(of: Callable[..., Any], helps: dict[str, str]) -> Parameters:
    """Return an option for some fields of a class, or arguments of a function, with their help."""
    hints, fields = get_type_hints(of), inspect.signature(of).parameters
    options = {}
    for name, text in helps.items():
        kind: Any = hints[name]
        default = fields[name].default
        if kind == tuple[str, ...]:
            kind, default = str | None, None  # a text with commas
        flags = [f"--{name.replace('_', '-')}"] if kind is bool else FLAGS.get(name, [])
        least, most = BOUNDS.get(name, (None, None))
        more = {"min": least, "max": most, **MORE.get(name, {})}
        annotation = Annotated[kind, typer.Option(*flags, help=text, **more)]
        options[name] = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )
    return options


def spread(options: Parameters, *names: str) -> Callable[[Callable[..., None]], Any]:
    """Give a verb some options, or all of these, in place of its argument `given`, a dictionary."""
    chosen = {name: options[name] for name in names or options}

    def with_options(verb: Callable[..., None]) -> Callable[..., None]:
        taken: list[inspect.Parameter] = []
        for parameter in inspect.signature(verb, eval_str=True).parameters.values():
            own = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            taken += chosen.values() if parameter.name == "given" else [own]

        @functools.wraps(verb)
        def spread_verb(**values: Any) -> None:
            given = {name: values.pop(name) for name in chosen}
            verb(given=given, **values)

        spread_verb.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
        return spread_verb

    return with_options


SOURCES = typer.Argument(
    help="URLs, audio files, folders, globs, containers (tar, zip), lists (txt, csv, tsv, json,"
    " parquet), - for stdin."
)
MODELS = typer.Option(
    "--model",
    metavar="MODEL",
    help="starter, a Hugging Face id, or a model directory. Each of several has a run NAME/MODEL.",
)
FOLLOWER = typer.Option(
    metavar="MODEL", help="A model that hears only the clips that the first one lets through."
)
SCORING = parameters(
    RunOptions,
    {
        "model": "starter, a Hugging Face id, or a model directory.",
        "revision": "Branch, tag or commit of a hub model.",
        "top_k": "The best labels kept, of each clip and window.",
        "function_to_apply": "Function from logits to scores. Default: the checkpoint's own.",
        "window_s": "Seconds the model sees at once. Default: the model's.",
        "hop_s": "Seconds between windows. Default: the window.",
        "combine": "How a long clip's windows are combined.",
        "min_score": "Predictions below it are not stored.",
        "labels": "Labels for a zero-shot (CLAP) model, comma-separated.",
        "channels": "Which channels are heard: their mix, each by itself, the first, or the Nth.",
        "embeddings": "Keep each window's vector, for `similar` and `train`.",
        "head": "A folder that `earmark train` wrote, on top of --model.",
    },
)
THEN = parameters(
    RunOptions,
    {
        "then_label": "The labels of the first model that let a clip through to --then,"
        " comma-separated.",
        "then_min_score": "The score that one of them must reach.",
    },
)
LISTING = parameters(
    Listing,
    {
        "input_format": "Format of the list, if its name does not tell.",
        "url_col": "The column with the URL or path; all others are kept as meta. Default: url, or"
        " another usual name.",
        "delimiter": "Of a table: a character, or tab. Default: found by the header.",
        "encoding": "Of a list, such as cp1252. Default: UTF-8, or UTF-16 if recognised.",
        "no_header": "The table has no header; its columns are 1, 2, 3.",
        "base": "Folder or URL that names are relative to. Default: the list's own.",
        "template": "Names made of columns: 'audio/fold{fold}/{name}.wav'.",
        "start_col": "The column with a span's start in seconds. Default: start_s, start_seconds or"
        " offset; '' for whole files.",
        "end_col": "The column with the span's end, or with its length if named duration.",
        "key_col": "The column that identifies a clip in place of its URL.",
    },
)
LIMIT = parameters(_Submission, {"limit": "Stop after so many clips."})
STRICT = parameters(
    Listing,
    {
        "strict": "Exit with 1 if any clip failed; take each file of a folder as a clip.",
    },
)
#: The options of a verb that classifies: its sources, and how they are scored.
TASK: Parameters = {
    "sources": inspect.Parameter(
        "sources", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[list[str], SOURCES]
    ),
    **SCORING,
    "model": inspect.Parameter(
        "model",
        inspect.Parameter.KEYWORD_ONLY,
        default=[RunOptions().model],
        annotation=Annotated[list[str], MODELS],
    ),
    "then": inspect.Parameter(
        "then",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[str | None, FOLLOWER],
    ),
    **THEN,
    **LISTING,
    **LIMIT,
    **STRICT,
}
#: Those of a verb that makes a run.
SUBMISSION = TASK | parameters(
    _Submission,
    {
        "name": "The run's name; the same name again goes on where it stopped.",
        "chunk_size": "Clips in one queue message; unset: 16, or a GPU's batch of 64.",
        "priority": "Share of the workers beside other runs.",
        "reuse_urls": "Take results of other runs with this model and options, without a download.",
        "stop_at": PAUSE_HELP,
        "duplicates": "Rows of the same clip: one clip with the first row's columns, or one each.",
        "again": "Redo local files that have changed since their result.",
    },
)
