"""Rows as Parquet: one file, or a folder of files with the same columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars
import sqlalchemy as sa
from more_itertools import chunked

from db import results, schema
from db.runs import RunRow
from earmark import files, frames
from earmark.core.errors import UsageError
from workers.scoring import hub

#: The key of a file's metadata that says, as JSON, what made it.
METADATA_KEY = "earmark"
#: Parts of 20,000 rows in a file of a folder: some 30 MB.
PARTS_IN_FILE = 25


def write(
    rows: Iterable[dict[str, Any]],
    columns: Sequence[str],
    file: Path,
    options: files.ParquetOptions,
) -> None:
    """Write rows to a Parquet file, or to a folder of them."""
    columns_of = frames.Columns(columns, of_views=options.of_views)
    made_by = {METADATA_KEY: json.dumps(options.made_by(), ensure_ascii=False, default=str)}
    with (
        _sentences(file),
        files.whole(file) as target,
        TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder,
    ):
        parts = list(_parts(rows, columns_of, Path(folder)))
        # A later part may have columns that an earlier one lacks, or text where that has numbers.
        schema = _joined(parts).collect_schema()
        if not options.parts:
            _joined(parts).sink_parquet(target, metadata=made_by)
            return
        target.mkdir()
        for number, group in enumerate(chunked(parts, PARTS_IN_FILE)):
            whole = _joined([polars.LazyFrame(schema=schema), *group])
            whole.sink_parquet(target / f"part-{number:05}.parquet", metadata=made_by)


def _parts(
    rows: Iterable[dict[str, Any]], columns: frames.Columns, folder: Path
) -> Iterator[polars.LazyFrame]:
    yield columns.frame([]).lazy()
    # Polars cannot append to a file.
    for number, group in enumerate(chunked(rows, frames.ROWS_AT_ONCE)):
        part = folder / f"{number}.parquet"
        columns.frame(group).write_parquet(part)
        yield polars.scan_parquet(part)


def _joined(parts: Iterable[polars.LazyFrame]) -> polars.LazyFrame:
    return polars.concat(parts, how="diagonal_relaxed")


def made_by(engine: sa.Engine, run: RunRow) -> dict[str, Any]:
    """Return what made a run's results: model, digest, licence, options and versions."""
    facts = results.made_by(engine, run)
    return {
        **facts,
        "license": hub.license_of(run.options.model, facts.get("revision")),
        "versions": {"earmark": version("earmark"), "schema": schema.versions()[-1]},
    }


@contextmanager
def _sentences(file: Path) -> Iterator[None]:
    try:
        yield
    except polars.exceptions.SchemaError as error:
        raise UsageError(
            reason=f"A column holds values of several types, which Parquet cannot: {error}"
        ) from error
    except polars.exceptions.PolarsError as error:
        # Polars does not say of all its parts why one could not be written.
        reason = str(error).splitlines()[0]
        raise UsageError(
            reason=f"{file} cannot be written ({reason}): is the disk full?"
        ) from error
