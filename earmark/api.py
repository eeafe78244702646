"""Earmark from Python: what `import earmark` offers and the verbs of the command line call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from db import compare as comparing
from db import runs
from db.compare import Comparison
from earmark import folders
from earmark.core.errors import ServiceError
from earmark.core.options import (
    Combine,
    Duplicates,
    FunctionToApply,
    InputFormat,
    of_each_model,
    split,
)
from earmark.core.settings import Settings
from earmark.database import open_database, read_settings, with_database
from earmark.local_cluster import find_broker
from earmark.run_here import run_here
from earmark.run_object import Run, opened
from producer.submit import KeptOptions
from producer.submit import submit as submit_sources
from workers.scoring import hub, local_models


class Scoring(TypedDict, total=False):
    """How clips are scored: the fields of `RunOptions`, with their defaults."""

    model: str | Sequence[str]
    revision: str | None
    top_k: int
    function_to_apply: FunctionToApply | None
    window_s: float | None
    hop_s: float | None
    combine: Combine
    min_score: float
    labels: str | Sequence[str] | None
    embeddings: bool
    head: str | None
    channels: str | int
    then: str | None
    then_label: str | Sequence[str] | None
    then_min_score: float


class Submission(Scoring, KeptOptions, total=False):
    """How a list is read and becomes a run: the arguments of `producer.submit.submit`."""

    name: str | None
    input_format: InputFormat
    url_col: str | None
    delimiter: str | None
    encoding: str | None
    no_header: bool
    base: str | None
    template: str | None
    start_col: str | None
    end_col: str | None
    key_col: str | None
    strict: bool
    duplicates: Duplicates
    again: bool
    limit: int | None


@dataclass(frozen=True, slots=True)
class LabelScore:
    """One label of a clip, and its score."""

    label: str
    score: float


def run(
    sources: str | Iterable[str],
    *,
    workers: int = 1,
    db: str | None = None,
    settings: Settings | None = None,
    quiet: bool = False,
    watch: bool = False,
    notify: str | None = None,
    **options: Unpack[Submission],
) -> Run:
    """Classify every clip of the sources with a queue and workers here; return the finished run.

    Args:
        sources: URLs, audio files, folders, globs and lists, or one of them.
        workers: worker processes.
        db: a SQLite file or a database URL, in place of the settings' own.
        settings: in place of those of the environment.
        quiet: show no progress.
        watch: take new files of the sources, which are folders, until Ctrl-C.
        notify: a webhook to tell when every clip has ended, or the run is stopped.
        options: as those of `earmark run`: `model`, `top_k`, `name`, `url_col` and so on. With
            several models, or with `then`, the run of the first is returned; `together` has them
            all.

    Raises:
        UsageError: a source cannot be read or holds no clip, or an option is wrong.
        ServiceError: the database cannot be used, or the workers cannot work.
    """
    how: Any = {"workers": workers, "quiet": quiet, "watch": watch, "notify": notify}
    scoring, submission = split(options)
    ended = run_here(_listed(sources), _settings(settings, db), scoring, **how, **submission)
    for each in ended.together:
        if paused := each.progress().paused:
            raise ServiceError(reason=paused)
    return ended


def submit(
    sources: str | Iterable[str],
    *,
    db: str | None = None,
    settings: Settings | None = None,
    tell: Callable[[str], None] | None = None,
    **options: Unpack[Submission],
) -> Run:
    """Put the clips of the sources into the database and the queue; return the run at once.

    Workers elsewhere classify them, such as those of `earmark up` or `earmark worker`. Use it with
    EARMARK_BROKER__URL and EARMARK_DATABASE__URL, or beside `earmark up`.

    Args:
        tell: gets a sentence, before anything is submitted, if no worker may read the files.

    Raises:
        UsageError: a source cannot be read or holds no clip, or an option is wrong.
        ServiceError: the broker or the database cannot be used.
    """
    scoring, submission = split(options)
    for each in scoring:
        hub.check(each, here=False)
    local_models.check_then(scoring)
    reachable = find_broker(_settings(settings, db))
    engine = open_database(reachable, create=True)
    submitted = submit_sources(
        _listed(sources), engine, reachable, options=scoring, tell=tell, **submission
    )
    return Run(engine, runs.get_run(engine, submitted.run_id), reachable, submitted)


def open(run: int | str, *, db: str | None = None, settings: Settings | None = None) -> Run:
    """Return an existing run by its id or name.

    Raises:
        UsageError: there is no such run.
        ServiceError: the database cannot be used.
    """
    return opened(_settings(settings, db), str(run))


def compare(
    a: int | str, b: int | str, *, db: str | None = None, settings: Settings | None = None
) -> Comparison:
    """Compare the best labels of the clips that two runs have in common, by their ids or names.

    Its `agreement` is a share; `labels()`, `changes()` and `changed()` give rows: by label, by
    label and what became of it, and by clip.

    Raises:
        UsageError: there is no such run.
        ServiceError: the database cannot be used.
    """
    engine = open_database(_settings(settings, db))
    return comparing.compare(engine, runs.find_run(engine, str(a)), runs.find_run(engine, str(b)))


def classify(
    clip: str | Path, *, settings: Settings | None = None, **options: Unpack[Scoring]
) -> list[LabelScore]:
    """Return the best labels of one file or URL, scored in this process without queue or database.

    It loads the model each time. Use it to try a model; use `run` for more than a few clips.

    Raises:
        ClipError: the clip has no result; its subclass and its sentence say why.
        UsageError: an option is wrong.
        ServiceError: the model or the decoder cannot be had.
    """
    # Imported here because it loads what a worker loads.
    from earmark.in_process import classified

    scoring = of_each_model(options)[0]
    with classified(folders.uri_of(str(clip)), _settings(settings), scoring) as ended:
        predictions = ended.named(ended.success.predictions)
    return [LabelScore(label, score) for label, score in predictions]


def _settings(settings: Settings | None, db: str | None = None) -> Settings:
    return with_database(settings or read_settings(), db)


def _listed(sources: str | Iterable[str]) -> list[str]:
    return [sources] if isinstance(sources, str) else list(sources)
