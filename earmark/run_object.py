"""A run in a database: its progress and results, and what is made of them."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import sqlalchemy as sa

from db import access, results, runs
from db.rows import Rows
from db.runs import Progress, RunRow
from earmark.core.errors import ServiceError
from earmark.core.options import RunOptions
from earmark.core.settings import Settings
from earmark.database import open_database
from earmark.events import Rule, events
from earmark.progress import LOOK_S

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow

    from earmark.cut import Form
    from producer.submit import Submitted


class Choice(TypedDict, total=False):
    """Which clips: those of a label, from a score up, recorded on a day or in hours."""

    label: str | None
    min_score: float | None
    day: str | None
    hours: str | None


class Conditions(Choice, total=False):
    """Which results: also up to a rank or a score, sorted, by window."""

    rank: int
    max_score: float | None
    by_score: bool
    windows: bool


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
        self.settings = settings
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
        return [Run(self.engine, row, self.settings, self._submitted) for row in rows]

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
        from earmark import frames

        return frames.embeddings_frame(results.embeddings(self.engine, self.row))

    def similar(
        self, to: str | int, count: int = 50, **choice: Unpack[Choice]
    ) -> Iterator[dict[str, Any]]:
        """Yield the windows most like a clip's id, a file, a URL or words (CLAP), best first.

        Raises:
            UsageError: the run keeps no embeddings, or `to` is none of these.
            ClipError: the file or URL cannot be heard.
        """
        from earmark.similar import similar

        return similar(self.engine, self.row, self.settings, str(to), count, **choice)

    def train(self, labels_from: str, folder: str | Path) -> list[dict[str, Any]]:
        """Write a head that learns a column of the list, or `reviews`; return how well it does.

        Raises:
            UsageError: the run keeps no embeddings, or there is nothing to learn from.
        """
        from earmark.train import train

        return train(self.engine, self.row, self.settings, labels_from, Path(folder))

    def rescore(self, head: str | Path, name: str) -> Run:
        """Return a new run with a head's results for this run's embeddings.

        Raises:
            UsageError: the run keeps no embeddings, or another run has the name.
            ServiceError: the head cannot be read, or is another model's.
        """
        from earmark.rescore import rescore

        folder = str(Path(head).resolve())
        made = rescore(self.engine, self.row, self.settings, name, folder)
        return Run(open_database(self.settings), made, self.settings)

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
            self.engine, self.row, self.settings, Path(folder),
            label=label, min_score=min_score, sample=sample, **form,
        ) as (rows, _):  # fmt: skip
            return list(rows)

    def to_polars(self, **conditions: Unpack[Conditions]) -> polars.DataFrame:
        """Return the results as a polars data frame with typed columns; conditions as above."""
        from earmark import frames

        return frames.polars_frame(self.results(**conditions))

    def to_pandas(self, **conditions: Unpack[Conditions]) -> pandas.DataFrame:
        """Return the results as a pandas data frame, where pandas and pyarrow are installed."""
        from earmark import frames

        return frames.pandas_frame(self.results(**conditions))

    def to_arrow(self, **conditions: Unpack[Conditions]) -> pyarrow.Table:
        """Return the results as an Arrow table, where pyarrow is installed."""
        from earmark import frames

        return frames.arrow_table(self.results(**conditions))


def opened(settings: Settings, run: str, *, change: bool = False) -> Run:
    """Return an existing run by its id or name.

    Raises:
        UsageError: there is no such run.
        ServiceError: the run is to be changed, and the database can only be read.
    """
    engine = open_database(settings)
    if change:
        access.check_writable(engine)
    return Run(engine, runs.find_run(engine, run), settings)
