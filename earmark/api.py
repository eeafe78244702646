"""Earmark from Python: what `import earmark` offers and the verbs of the command line call."""

from __future__ import annotations

import secrets
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, Unpack

from db import compare as comparing
from db import results, runs, urls
from db.passes import base_name
from earmark import folders, frames, machine, progress
from earmark import notify as webhook
from earmark.core.clips import State
from earmark.core.errors import ServiceError, UsageError
from earmark.core.options import Listing, RunOptions, of_each_model
from earmark.database import open_database, read_settings, with_database
from earmark.events import Rule, events
from earmark.growth import Growth
from earmark.machine import find_broker
from producer.submit import KeptOptions
from producer.submit import submit as submit_sources
from workers.scoring import cache, heads, hub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import pandas
    import polars
    import pyarrow
    import sqlalchemy as sa

    from db.compare import Comparison
    from db.rows import Rows
    from db.runs import Progress, RunRow
    from earmark.core.clips import Clip
    from earmark.core.options import Combine, Duplicates, FunctionToApply, InputFormat
    from earmark.core.settings import Settings
    from earmark.cut import Form
    from earmark.machine import Machine
    from producer.submit import Submitted

#: Between two looks at a run that is waited for.
LOOK_S = 0.5


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


class Conditions(TypedDict, total=False):
    """Which results: of a label, up to a rank, from a score up, of a day or hours, by window."""

    label: str | None
    rank: int
    min_score: float | None
    max_score: float | None
    by_score: bool
    windows: bool
    day: str | None
    hours: str | None


@dataclass(frozen=True, slots=True)
class LabelScore:
    """One label of a clip, and its score."""

    label: str
    score: float


class Run:
    """A run in a database: what `run`, `submit` and `open` return.

    Use it to wait for workers and to read results. It holds no rows: each method asks the database.
    """

    def __init__(
        self,
        engine: sa.Engine,
        row: RunRow,
        settings: Settings,
        submitted: Submitted | None = None,
    ) -> None:
        #: The database, as SQLAlchemy knows it.
        self.engine = engine
        self.row = row
        self._settings = settings
        self._submitted = submitted
        weakref.finalize(self, engine.dispose)

    def __repr__(self) -> str:
        return f"<Run {self.id}, {self.name!r}>"

    @property
    def id(self) -> int:
        """The number that the tables call `run_id`."""
        return self.row.id

    @property
    def name(self) -> str:
        """The name that was given to it, else `run-` and its id."""
        return self.row.name

    @property
    def together(self) -> list[Run]:
        """The runs of its pass, one for each model, itself among them; else it alone."""
        rows = runs.in_pass(self.engine, self.row)
        return [Run(self.engine, row, self._settings, self._submitted) for row in rows]

    @property
    def options(self) -> RunOptions:
        """How its clips are scored."""
        return self.row.options

    def report(self) -> list[str]:
        """Return sentences on the lines of the list that were not simply one new clip each.

        There are none of a run that was opened.
        """
        return self._submitted.report() if self._submitted else []

    def progress(self) -> Progress:
        """Return how many clips are in each state (`states`, `final`, `total`, `finished`)."""
        return runs.progress(self.engine, self.id)

    def wait(self, timeout_s: float | None = None) -> Progress:
        """Return the progress once every clip is final; workers elsewhere do the work.

        Raises:
            TimeoutError: some clips are not final after so many seconds.
            ServiceError: the run is paused, as its clips fail on every worker.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not (state := self.progress()).finished:
            if state.paused:
                raise ServiceError(reason=state.paused)
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(
                    f"{state.final} of {state.total} clips are final after {timeout_s} s."
                )
            time.sleep(LOOK_S)
        return state

    def results(self, **conditions: Unpack[Conditions]) -> Rows:
        """Yield the clips that are done, each with its best label, as in the view `results`.

        `label`, `min_score` and `max_score` choose among them, `rank` also among a clip's further
        labels, and `day` ("2026-05-01") and `hours` ("4-6") by when they were recorded. `by_score`
        sorts them; `windows=True` yields each window instead.
        """
        return results.results(self.engine, self.id, **conditions)

    def events(
        self,
        *,
        label: str | None = None,
        min_score: float = 0.5,
        low: float | None = None,
        gap_s: float = 0.0,
    ) -> Rows:
        """Yield when each label is heard, clip by clip, also where another one is louder.

        An event reaches `min_score`, goes on down to `low` (else `min_score`), and has no gap
        longer than `gap_s` seconds.
        """
        return events(self.engine, self.row, Rule(min_score, low, gap_s), label=label)

    def failures(self) -> Rows:
        """Yield the clips that failed, each with its error, as in the view `failures`."""
        return results.failures(self.engine, self.id)

    def embeddings(self) -> polars.DataFrame:
        """Return the embeddings that the run keeps, a row for each window.

        `frame["vector"].to_numpy()` is an array of shape (windows, dimensions).

        Raises:
            UsageError: the run keeps none.
        """
        return frames.embeddings_frame(results.embeddings(self.engine, self.row))

    def similar(
        self,
        to: str | int,
        count: int = 50,
        *,
        label: str | None = None,
        min_score: float | None = None,
        day: str | None = None,
        hours: str | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield the windows most like a clip's id, a file, a URL or words (CLAP), best first.

        Raises:
            UsageError: the run keeps no embeddings, or `to` is none of these.
            ClipError: the file or URL cannot be heard.
        """
        from earmark.similar import similar

        chosen = {"label": label, "min_score": min_score, "day": day, "hours": hours}
        return similar(self.engine, self.row, self._settings, str(to), count, **chosen)

    def train(self, labels_from: str, folder: str | Path) -> list[dict[str, Any]]:
        """Write a head that learns a column of the list, or `reviews`; return how well it does.

        Raises:
            UsageError: the run keeps no embeddings, or there is nothing to learn from.
        """
        from earmark.train import train

        return train(self.engine, self.row, self._settings, labels_from, Path(folder))

    def rescore(self, head: str | Path, name: str) -> Run:
        """Return a new run with a head's results for this run's embeddings.

        Raises:
            UsageError: the run keeps no embeddings, or another run has the name.
            ServiceError: the head cannot be read, or is another model's.
        """
        from earmark.rescore import rescore

        folder = str(Path(head).resolve())
        made = rescore(self.engine, self.row, self._settings, name, folder)
        return Run(open_database(self._settings), made, self._settings)

    def cut(
        self,
        folder: str | Path,
        *,
        label: str | None = None,
        min_score: float = 0.5,
        sample: int | None = None,
        **form: Unpack[Form],
    ) -> list[dict[str, Any]]:
        """Write the sound of each event to a file in a new folder; return a row for each file.

        `sample` is how many events at most, spread over the scores; `pad_s` seconds before and
        after each are kept; `format` is "flac" or "wav".

        Raises:
            UsageError: the folder is there already.
        """
        from earmark.cut import cutting

        with cutting(
            self.engine, self.row, self._settings, Path(folder),
            label=label, min_score=min_score, sample=sample, **form,
        ) as (rows, _):  # fmt: skip
            return list(rows)

    def to_polars(self, **conditions: Unpack[Conditions]) -> polars.DataFrame:
        """Return the results as a polars data frame with typed columns; conditions as above."""
        return frames.polars_frame(self.results(**conditions))

    def to_pandas(self, **conditions: Unpack[Conditions]) -> pandas.DataFrame:
        """Return the results as a pandas data frame, where pandas and pyarrow are installed."""
        return frames.pandas_frame(self.results(**conditions))

    def to_arrow(self, **conditions: Unpack[Conditions]) -> pyarrow.Table:
        """Return the results as an Arrow table, where pyarrow is installed."""
        return frames.arrow_table(self.results(**conditions))


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
    cache.check_then(scoring)
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
    settings = _settings(settings, db)
    engine = open_database(settings)
    return Run(engine, runs.find_run(engine, str(run)), settings)


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
    uri = folders.uri_of(str(clip))
    with classified(uri, folders.readable(uri, _settings(settings)), scoring) as ended:
        predictions = ended.named(ended.success.predictions)
    return [LabelScore(label, score) for label, score in predictions]


def run_here(
    sources: Sequence[str | Clip],
    settings: Settings,
    options: Sequence[RunOptions],
    *,
    workers: int = 1,
    roots: Sequence[Path] | None = None,
    quiet: bool = False,
    on_interrupt: str | None = None,
    watch: bool = False,
    notify: str | None = None,
    **submission: Any,
) -> Run:
    """Do the work of `run` with all of its settings and options given.

    Args:
        roots: the folders that the workers may read; default: those of the sources.
        on_interrupt: the sentence for Ctrl-C; default: how to go on with the run.
        submission: further arguments of `producer.submit.submit`.
    """
    growth = Growth(map(str, sources)) if watch else None
    _check(settings, options, notify)
    engine = open_database(settings, create=True)
    queue = f"run-{secrets.token_hex(4)}"
    local = _on_files_of(sources, roots, settings, options[0])
    with (
        progress.terminable(),
        machine.running(local, queue=queue, workers=workers) as here,
        progress.interruptible(lambda: on_interrupt or _how_to_go_on(engine, queue)),
    ):
        look = _look_after(here, engine)
        if growth:
            _grow(growth, here, engine, look, notify, quiet, options=options, **submission)
        submitted = submit_sources(sources, engine, here.settings, options=options, **submission)
        _watch(engine, submitted.run_ids, settings, notify, look, quiet=quiet)
    run = Run(engine, runs.get_run(engine, submitted.run_id), settings, submitted)
    if not here.restarts and not any(map(_has_failures, run.together)):
        # Nobody needs its logs.
        machine.remove_logs(settings, queue)
    return run


def _watch(
    engine: sa.Engine,
    run_ids: Iterable[int],
    settings: Settings,
    notify: str | None,
    meanwhile: Callable[[], object],
    *,
    quiet: bool,
) -> None:
    for run_id in run_ids:
        with webhook.telling(notify, engine, run_id, settings):
            progress.watch(engine, run_id, settings, meanwhile=meanwhile, quiet=quiet)


def _has_failures(run: Run) -> bool:
    return bool(run.progress().states[State.failed])


def _check(settings: Settings, options: Sequence[RunOptions], notify: str | None) -> None:
    """Raise an EarmarkError if a run here could not work, before it begins."""
    if notify:
        webhook.check(notify, settings)
    folders.check(settings)
    for each in options:
        hub.check(each, here=True)
        if each.head:
            heads.load(each.head)
    cache.check_then(options)


def _on_files_of(
    sources: Sequence[str | Clip],
    roots: Sequence[Path] | None,
    settings: Settings,
    options: RunOptions,
) -> Settings:
    """Return the settings of workers for one run."""
    model = {"name": options.model, "revision": options.revision}
    if roots is None:
        roots = folders.file_roots(map(str, sources))
    return settings.changed(fetch={"file_roots": roots}, model=model)


def _grow(
    growth: Growth,
    here: Machine,
    engine: sa.Engine,
    look: Callable[[], None],
    notify: str | None,
    quiet: bool,
    **submission: Any,
) -> NoReturn:
    """Submit the files of growing folders as they are complete, until Ctrl-C."""

    def take() -> list[int]:
        look()
        if not (files := growth.complete()):
            return []
        submitted = submit_sources(files, engine, here.settings, **submission)
        submission["name"] = base_name(runs.get_run(engine, submitted.run_id))
        return submitted.run_ids

    while True:
        _watch(engine, take(), here.settings, notify, take, quiet=quiet)
        time.sleep(LOOK_S)


def _settings(settings: Settings | None, db: str | None = None) -> Settings:
    return with_database(settings or read_settings(), db)


def _listed(sources: str | Iterable[str]) -> list[str]:
    return [sources] if isinstance(sources, str) else list(sources)


def split(given: Mapping[str, Any]) -> tuple[list[RunOptions], dict[str, Any]]:
    """Return the options for each model, and the other arguments of `producer.submit.submit`."""
    taken = {*RunOptions.__slots__, *Listing.__slots__, "then"}
    others = {name: value for name, value in given.items() if name not in taken}
    others["listing"] = Listing.from_arguments(given)
    return of_each_model(given), others


def _look_after(here: Machine, engine: sa.Engine) -> Callable[[], None]:
    """Return a function for between two looks at a run: restart workers, check the disks."""
    written = [here.settings.data_dir]
    if file := urls.file_of(engine.url):
        written.append(file.absolute().parent)
    disks = folders.DiskWatch(written, progress.tell)

    def look() -> None:
        here.keep_alive()
        disks.look()

    return look


def _how_to_go_on(engine: sa.Engine, queue: str) -> str:
    try:
        name = base_name(runs.run_on_queue(engine, queue))
    except UsageError:
        return "Stopped before the first clip was submitted."
    return f"Stopping; the same command with --name {name} goes on where this stops."
