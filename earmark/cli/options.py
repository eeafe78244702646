"""The options that several verbs share, each with its help."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer import Argument, Option

from earmark import output, run_object
from earmark.core.options import BOUNDS, STOP_AT, Duplicates, Listing, RunOptions, labels_in
from earmark.database import read_settings
from earmark.output import Format


def _workers(text: str | int) -> int:
    if text == "auto":
        from earmark.local_cluster import gpus

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


#: In a verb, the argument RUN and --db.
Run = run_object.Run
#: By name, options as typer reads them.
Parameters = dict[str, inspect.Parameter]
STOPPING: Any = {"parser": _share, "metavar": "SHARE|off", "min": None, "max": None}
PAUSE_HELP = "Pause if more than this share of clips fails on every worker, by no fault of theirs."
MaybeStopAt = Annotated[float | None, Option(help=PAUSE_HELP, **STOPPING)]
Db = Annotated[
    str | None, Option(help="Database URL. Default: EARMARK_DATABASE__URL, else a SQLite file.")
]
Workers = Annotated[
    int, Option(parser=_workers, metavar="N|auto", help="Worker processes; auto: one for each GPU.")
]
Watch = Annotated[bool, Option("--watch", help="Show progress until the end.")]
Notify = Annotated[
    str | None,
    Option(
        envvar="EARMARK_NOTIFY",
        show_envvar=True,
        metavar="URL",
        help="A webhook to tell when the run ends or is stopped.",
    ),
]
FlowerPort = Annotated[int, Option(help="Flower's port on this machine.")]
UiPort = Annotated[int, Option("--port", help="The page's port on this machine.")]
UiAddress = Annotated[str, Option("--address", help="Any but loopback needs a token.")]
UiToken = Annotated[
    str | None, Option("--token", envvar="EARMARK_UI_TOKEN", help="The password asked for.")
]
_truth = Option(help="A column of the list that says what is there, or `reviews`.")
Truth = Annotated[str, _truth]
MaybeTruth = Annotated[str | None, _truth]
RunName = Annotated[str, Argument(help="A run's id or name.")]
LatestRun = Annotated[
    str | None, Argument(help="A run's id or name; default: all, or with --watch the newest.")
]
Label = Annotated[str | None, Option(help="Only this label.")]
OutputFormat = Annotated[
    Format | None,
    Option(
        "--format",
        help="Default: by the output file's name, else a table on a terminal and CSV elsewhere.",
    ),
]
TextFormat = Annotated[Format | None, Option("--format", help="Default: text.")]
OutputFile = Annotated[Path | None, Option("--output", "-o", help="Write to this file.")]


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


def parameters(of: Callable[..., Any], helps: dict[str, str], **more: Any) -> Parameters:
    """Return an option for some fields of a class, or arguments of a function, with their help.

    Args:
        more: what else an option has beside its type, default and bounds.
    """
    hints, fields = get_type_hints(of), inspect.signature(of).parameters
    options = {}
    for name, text in helps.items():
        kind: Any = hints[name]
        default = fields[name].default
        flags = [f"--{name.replace('_', '-')}"] if kind is bool else []
        least, most = BOUNDS.get(name, (None, None))
        values = {"min": least, "max": most, **more.get(name, {})}
        if kind == tuple[str, ...]:
            kind, default = list[str] | None, None
            values |= {"callback": _split, "metavar": "LABEL,..."}
        flags = values.pop("flags", flags)
        annotation = Annotated[kind, Option(*flags, help=text, **values)]
        options[name] = _parameter(name, annotation, default)
    return options


def _split(texts: list[str] | None) -> list[str]:
    """Return the labels of an option that may be given several times, each time some."""
    labels: list[str] = []
    for text in texts or ():
        labels += labels_in(text)
    return labels


def _parameter(name: str, kind: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=kind)


def some(options: Parameters, *names: str) -> Parameters:
    """Return those of the options that have these names."""
    return {name: options[name] for name in names}


@dataclass(frozen=True)
class Output:
    """How a verb writes its rows, and the file they go to."""

    format: Format | None
    file: Path | None

    def write(self, rows: Iterable[dict[str, Any]], **how: Any) -> None:
        """Write rows; `how` is that of `output.write`."""
        output.write(rows, self.format, self.file, **how)


def _opened(run: str, db: str | None, *, change: bool = False) -> Run:
    return run_object.opened(read_settings(db), run, change=change)


#: A run that a verb changes.
RunToChange = Annotated[Run, "change"]
_RUN = {"run": _parameter("run", RunName), "db": _parameter("db", Db, None)}
_OUTPUT = {
    "format": _parameter("format", OutputFormat, None),
    "file": _parameter("file", OutputFile, None),
}
#: Arguments of verbs that are made of several options.
MADE: dict[Any, tuple[Callable[..., Any], Parameters]] = {
    Run: (_opened, _RUN),
    RunToChange: (functools.partial(_opened, change=True), _RUN),
    Output: (Output, _OUTPUT),
}


def verb(
    commands: typer.Typer, example: str, given: Parameters | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function the verb of an example.

    An argument whose type is in `MADE` is made of several options, and `given` is a dictionary of
    those that are given here.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        made: dict[str, tuple[Callable[..., Any], Parameters]] = {}
        taken: list[inspect.Parameter] = []
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            make, options = MADE.get(parameter.annotation, (None, {}))
            if parameter.name == "given":
                make, options = dict, given or {}
            if make:
                made[parameter.name] = make, options
                taken += options.values()
            else:
                taken.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

        @functools.wraps(function)
        def run_verb(**values: Any) -> None:
            arguments = {}
            for argument, (make, options) in made.items():
                arguments[argument] = make(**{each: values.pop(each) for each in options})
            function(**arguments, **values)

        taken.sort(key=lambda parameter: parameter.name == "db")  # as the last of each verb
        run_verb.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
        name = re.findall(r"(?:^| )earmark (?:db )?(\w+)", example)[0]
        commands.command(name, epilog=f"Example: {example}")(run_verb)
        return function

    return register


SOURCES = Argument(
    help="URLs, audio files, folders, globs, containers (tar, zip), lists (txt, csv, tsv, json,"
    " parquet), - for stdin."
)
MODELS = Option(
    "--model",
    metavar="MODEL",
    help="starter, a Hugging Face id, or a model directory. Each of several has a run NAME/MODEL.",
)
FOLLOWER = Option(
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
    channels={"metavar": "mix|each|first|N"},
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
    Listing, {"strict": "Exit with 1 if any clip failed; take each file of a folder as a clip."}
)
#: The options of a verb that classifies: its sources, and how they are scored.
TASK: Parameters = {
    "sources": _parameter("sources", Annotated[list[str], SOURCES]),
    **SCORING,
    "model": _parameter("model", Annotated[list[str], MODELS], [RunOptions().model]),
    "then": _parameter("then", Annotated[str | None, FOLLOWER], None),
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
        "chunk_size": "Clips in one queue message; unset: 32, or 128 for a GPU.",
        "priority": "Share of the workers beside other runs.",
        "reuse_urls": "Take results of other runs with this model and options, without a download.",
        "stop_at": PAUSE_HELP,
        "duplicates": "Rows of the same clip: one clip with the first row's columns, or one each.",
        "again": "Redo local files that have changed since their result.",
    },
    stop_at=STOPPING,
)
