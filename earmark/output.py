"""Write rows as a table, CSV, JSON, JSON lines or Parquet, to the terminal or to a file.

A file appears under its name only when it is whole.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, TextIO

from more_itertools import peekable
from rich.console import Console
from rich.markup import escape

from db.rows import Rows, plain
from earmark import tables, terminal
from earmark.core.errors import UsageError
from earmark.files import ParquetOptions, opened

EXAMPLE_QUERY = 'query "SELECT label, count(*) FROM results GROUP BY label"'
#: The file name that means standard output.
STANDARD_OUTPUT = Path("-")
#: The endings of files, which are the names of their formats.
FILE_FORMATS = ("csv", "json", "jsonl", "parquet")
#: Columns of a table that goes to a file.
FILE_WIDTH = 200
#: Rows between two looks of a person at how many are written.
ROWS_A_LOOK = 5000


class Format(StrEnum):
    """How rows are written."""

    table = "table"
    csv = "csv"
    #: One array of objects.
    json = "json"
    #: An object a line.
    jsonl = "jsonl"
    parquet = "parquet"


class _Counted(Iterator[dict[str, Any]]):
    """Counts the rows that pass, and tells a person how many they are by now."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.count = 0
        self.columns, self._rows = _named(rows)
        self.look: Callable[[str], None] = lambda _: None

    def __next__(self) -> dict[str, Any]:
        row = next(self._rows)
        self.count += 1
        if self.count % ROWS_A_LOOK == 0:
            self.look(f"{self.count} rows")
        return row


def write(
    rows: Iterable[dict[str, Any]],
    format: Format | None,
    file: Path | None,
    *,
    columns: Sequence[str] = (),
    empty: str = "There are no rows.",
    parquet: ParquetOptions | None = None,
) -> None:
    """Write rows to a file, or to standard output, and say where they are or that there are none.

    Args:
        rows: taken one by one, so that any number fits in memory.
        format: default: that of the file's suffix, else a table on a terminal and CSV elsewhere.
        file: appears under this name once it is whole; `-` is standard output.
        columns: the columns of a terminal's table, the most important first; default: all.
        empty: the sentence for a person if there are no rows.
        parquet: how a Parquet file is written.
    """
    if file == STANDARD_OUTPUT:
        file = None
    format = format or _default_format(file)
    counted = _Counted(rows)
    if file is None:
        _print(counted, format, columns)
    else:
        with terminal.screen.status(f"Writing {escape(str(file))}") as status:
            counted.look = lambda text: status.update(f"Writing {escape(str(file))}: {text}")
            _write_file(counted, format, file, parquet)
        terminal.tell(f"{terminal.count_of(counted.count, 'row')}: {file}")
    if not counted.count:
        terminal.tell(empty)


def write_record(record: dict[str, Any], format: Format) -> None:
    """Write one record to standard output; as JSON it is an object, not an array of one."""
    write([record], Format.jsonl if format is Format.json else format, None)


def print_rows(rows: Iterable[dict[str, Any]], title: str) -> None:
    """Print rows as a table below a title, if there are any."""
    if listed := list(rows):
        console = Console(highlight=False)
        console.print(f"\n[bold]{title}[/]")
        tables.show(listed, console)


def _default_format(file: Path | None) -> Format:
    if file is None:
        return Format.table if sys.stdout.isatty() else Format.csv
    suffix = file.suffix.lower().removeprefix(".")
    if suffix and suffix not in FILE_FORMATS:
        raise UsageError(
            reason=f"{file} ends with none of {', '.join(f'.{each}' for each in FILE_FORMATS)}:"
            " choose one of them, or say --format."
        )
    return Format(suffix or "csv")


def _print(rows: _Counted, format: Format, columns: Sequence[str]) -> None:
    if format is Format.parquet:
        raise UsageError(reason="Parquet goes to a file: say -o FILE.")
    if format is Format.table:
        tables.show(rows, Console(highlight=False), columns)
        return
    with opened(None) as out:
        _write_text(rows, format, out)


def _write_file(rows: _Counted, format: Format, file: Path, options: ParquetOptions | None) -> None:
    if format is Format.parquet:
        # Imported here because polars takes long.
        from earmark import parquet

        parquet.write(rows, rows.columns, file, options or ParquetOptions())
        return
    with opened(file) as out:
        _write_text(rows, format, out)


def _write_text(rows: _Counted, format: Format, out: TextIO) -> None:
    match format:
        case Format.csv:
            write_csv(rows, rows.columns, out)
        case Format.json:
            _write_json(rows, out)
        case Format.jsonl:
            _write_jsonl(rows, out)
        case _:
            tables.show(rows, Console(file=out, width=FILE_WIDTH))


def write_csv(rows: Iterable[dict[str, Any]], columns: Sequence[str], out: TextIO) -> None:
    """Write rows as CSV, in which no cell is a formula."""
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _harmless(plain(value)) for name, value in row.items()})


def _named(
    rows: Iterable[dict[str, Any]],
) -> tuple[tuple[str, ...], Iterator[dict[str, Any]]]:
    if isinstance(rows, Rows):
        return rows.columns, rows
    ahead = peekable(rows)
    return tuple(ahead.peek({})), ahead


def _harmless(value: Any) -> Any:
    # A spreadsheet takes such a cell for a formula.
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value


def _write_json(rows: _Counted, out: TextIO) -> None:
    before = "[\n"
    for row in rows:
        out.write(f"{before}{_json(row)}")
        before = ",\n"
    out.write("\n]\n" if rows.count else "[]\n")


def _write_jsonl(rows: _Counted, out: TextIO) -> None:
    for row in rows:
        out.write(f"{_json(row)}\n")


def _json(row: dict[str, Any]) -> str:
    # SQLite's JSON is text.
    for name in ("meta", "tags"):
        if isinstance(text := row.get(name), str):
            with suppress(ValueError):
                row = {**row, name: json.loads(text)}
    return json.dumps(row, default=plain, ensure_ascii=False)
