"""Rows in; a table, CSV, JSON lines or Parquet out, to the terminal or a file that appears only when it is whole."""

from __future__ import annotations

import csv
import json
import sys
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TextIO

from more_itertools import peekable
from rich.console import Console
from rich.table import Table

from earmark.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

#: A terminal shows so many rows of a table; a file or a pipe gets all.
TABLE_ROWS = 1000


class Format(StrEnum):
    """How rows are written."""

    table = "table"
    csv = "csv"
    jsonl = "jsonl"
    parquet = "parquet"


def write(rows: Iterable[dict[str, Any]], how: Format | None, file: Path | None) -> None:
    """Write rows to a file, or to standard output: a table on a terminal and CSV in a pipe, unless a format is said."""
    if how is None:
        how = Format.table if file is None and sys.stdout.isatty() else Format.csv
    if how is Format.parquet:
        _write_parquet(rows, file)
    elif how is Format.table and file is None:
        _print_table(rows)
    else:
        with _opened(file) as out:
            {Format.csv: _write_csv, Format.jsonl: _write_jsonl, Format.table: _write_table}[how](rows, out)


def _print_table(rows: Iterable[dict[str, Any]]) -> None:
    Console().print(_table(rows))


def _write_table(rows: Iterable[dict[str, Any]], out: TextIO) -> None:
    Console(file=out, width=200).print(_table(rows))


def _table(rows: Iterable[dict[str, Any]]) -> Table:
    ahead = peekable(rows)
    columns = [name for name in ahead.peek({}) if name != "meta"]
    table = Table(*columns, box=None, header_style="bold")
    for number, row in enumerate(ahead):
        if number == TABLE_ROWS:
            table.caption = f"the first {TABLE_ROWS} rows; --format csv gives all"
            break
        table.add_row(*(_cell(row[name]) for name in columns))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else str(_plain(value))


def _write_csv(rows: Iterable[dict[str, Any]], out: TextIO) -> None:
    ahead = peekable(rows)
    writer = csv.DictWriter(out, list(ahead.peek({})), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _harmless(_plain(value)) for name, value in row.items()} for row in ahead)


def _harmless(value: Any) -> Any:
    # A spreadsheet takes such a cell for a formula.
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _write_jsonl(rows: Iterable[dict[str, Any]], out: TextIO) -> None:
    for row in rows:
        out.write(json.dumps(_parsed(row), default=_plain, ensure_ascii=False) + "\n")


def _parsed(row: dict[str, Any]) -> dict[str, Any]:
    # SQLite's JSON is text.
    meta = row.get("meta")
    return {**row, "meta": json.loads(meta)} if isinstance(meta, str) else row


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return value.isoformat() if isinstance(value, datetime) else value


def _write_parquet(rows: Iterable[dict[str, Any]], file: Path | None) -> None:
    if file is None:
        raise UsageError(reason="Parquet goes to a file: say -o FILE.")
    import polars

    frame = polars.DataFrame([{name: _plain(value) for name, value in row.items()} for row in rows])
    with _whole(file) as part:
        frame.write_parquet(part)


@contextmanager
def _opened(file: Path | None) -> Iterator[TextIO]:
    if file is None:
        yield sys.stdout
        return
    with _whole(file) as part, part.open("w", encoding="utf-8", newline="") as out:
        yield out


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    part = file.with_name(f".{file.name}.part")
    try:
        yield part
        part.replace(file)
    except OSError as error:
        raise UsageError(reason=f"{file} cannot be written: {error.strerror}.") from error
    finally:
        part.unlink(missing_ok=True)
