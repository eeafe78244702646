"""The options that several verbs share, each with its help."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from console.output import Format


class InputFormat(StrEnum):
    """How a list is written."""

    auto = "auto"
    txt = "txt"
    csv = "csv"
    tsv = "tsv"
    jsonl = "jsonl"
    parquet = "parquet"


class Function(StrEnum):
    """What turns logits into scores."""

    softmax = "softmax"
    sigmoid = "sigmoid"
    none = "none"


class Combine(StrEnum):
    """How the windows of a clip are combined."""

    mean = "mean"
    max = "max"


Sources = Annotated[
    list[str],
    typer.Argument(help="URLs, audio files, folders, globs, lists (txt, csv, tsv, jsonl, parquet), - for stdin."),
]
Model = Annotated[str, typer.Option(help="starter, a Hugging Face id, or a model directory.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
TopK = Annotated[int, typer.Option(min=1, help="Labels kept per clip.")]
FunctionToApply = Annotated[Function | None, typer.Option(help="Default: what the checkpoint asks for.")]
WindowS = Annotated[float | None, typer.Option(min=0.01, help="Seconds the model sees at once. Default: the model's.")]
HopS = Annotated[float | None, typer.Option(min=0.01, help="Seconds between windows. Default: the window.")]
CombineWindows = Annotated[Combine, typer.Option(help="How a long clip's windows are combined.")]
MinScore = Annotated[float, typer.Option(help="Predictions below it are not stored.")]
Labels = Annotated[str | None, typer.Option(help="For a zero-shot (CLAP) model: what to listen for, comma-separated.")]
Name = Annotated[str | None, typer.Option(help="The run's name; the same name again goes on where it stopped.")]
ListFormat = Annotated[InputFormat, typer.Option(help="How the list is written, where its name does not tell.")]
UrlCol = Annotated[str, typer.Option(help="The column with the URL or path; all others are kept as meta.")]
ChunkSize = Annotated[int, typer.Option(min=1, max=1000, help="Clips in one queue message.")]
Priority = Annotated[int, typer.Option(min=1, max=100, help="Share of the workers beside other runs.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Stop after so many clips.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 1 if a clip failed.")]
Db = Annotated[str | None, typer.Option(help="Database URL. Default: EARMARK_DATABASE__URL, else a SQLite file.")]
Run = Annotated[str, typer.Argument(help="A run's id or name.")]
LatestRun = Annotated[str | None, typer.Argument(help="A run's id or name; the newest if not said.")]
As = Annotated[Format | None, typer.Option("--format", help="Default: a table on a terminal, CSV elsewhere.")]
Out = Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file.")]
