"""Write rows as a table, CSV, JSON lines or Parquet, to the terminal or to a file.

A file appears under its name only when it is whole.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from datetime import date
from decimal import Decimal
from enum import StrEnum
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TextIO

from more_itertools import chunked, peekable
from rich.console import Console
from rich.table import Table
from rich.text import Text

from db.rows import Rows
from earmark.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

EXAMPLE_QUERY = 'query "SELECT label, count(*) FROM results GROUP BY label"'
#: Rows that a table on a terminal shows; a file or a pipe gets all.
TABLE_ROWS = 1000
#: The columns of results, windows and failures that fit a terminal's 80 columns.
BRIEF = (
    "clip_id",
    "uri",
    "start_s",
    "end_s",
    "label",
    "score",
    "duration_s",
    "error_code",
    "error",
)
#: Of these, a terminal shows only columns with a value: most clips are whole files.
SPAN = ("start_s", "end_s")
BAR, LONGEST_URI = 10, 24
#: The file name that means standard output.
STANDARD_OUTPUT = Path("-")
#: Rows of a Parquet file held in memory at once: some 50 MB.
ROWS_IN_PART = 20_000


class Format(StrEnum):
    """How rows are written."""

    table = "table"
    csv = "csv"
    #: An object a line, as jsonl.
    json = "json"
    jsonl = "jsonl"
    parquet = "parquet"


def write(
    rows: Iterable[dict[str, Any]],
    format: Format | None,
    file: Path | None,
    *,
    brief: bool = False,
) -> None:
    """Write rows to a file, or to standard output.

    Args:
        rows: taken one by one, so that any number fits in memory.
        format: default: that of the file's suffix, else a table on a terminal and CSV elsewhere.
        file: appears under this name once it is whole; `-` is standard output.
        brief: a terminal's table has only what fits 80 columns.
    """
    file = None if file == STANDARD_OUTPUT else file
    format = format or _default_format(file)
    if format is Format.parquet:
        _write_parquet(rows, file)
        return
    if format is Format.table and file is None:
        Console(highlight=False).print(_table(rows, brief=brief))
        return
    with opened(file) as out:
        match format:
            case Format.csv:
                _write_csv(rows, out)
            case Format.table:
                _write_table(rows, out)
            case _:
                _write_jsonl(rows, out)


def print_rows(rows: Iterable[dict[str, Any]], title: str) -> None:
    """Print rows as a table below a title, if there are any."""
    if listed := list(rows):
        Console(highlight=False).print(f"\n[bold]{title}[/]", _table(listed))


def _default_format(file: Path | None) -> Format:
    if file is None:
        return Format.table if sys.stdout.isatty() else Format.csv
    match file.suffix.lower():
        case ".parquet":
            return Format.parquet
        case ".jsonl" | ".json":
            return Format.jsonl
    return Format.csv


def _write_table(rows: Iterable[dict[str, Any]], out: TextIO) -> None:
    Console(file=out, width=200).print(_table(rows))


def _table(rows: Iterable[dict[str, Any]], *, brief: bool = False) -> Table:
    names, rows = _named(rows)
    shown = list(islice(rows, TABLE_ROWS + 1))
    columns = [name for name in names if name != "meta" and (not brief or name in BRIEF)]
    for name in SPAN:
        if brief and name in columns and all(row[name] is None for row in shown):
            columns.remove(name)
    table = Table(box=None, header_style="bold")
    for name in columns:
        table.add_column(
            name,
            justify="right" if name.endswith(("_s", "_id")) else "left",
            no_wrap=brief and name != "error",
        )
    if len(shown) > TABLE_ROWS:
        table.caption = f"the first {TABLE_ROWS} rows; --format csv gives all"
    show = _brief_cell if brief else _full_cell
    for row in shown[:TABLE_ROWS]:
        table.add_row(*(show(name, row[name]) for name in columns))
    return table


def _full_cell(_: str, value: Any) -> Text:
    return Text(_cell(value))


def _brief_cell(name: str, value: Any) -> Text:
    if name == "score" and isinstance(value, float):
        return Text.assemble((f"{bar(value):<{BAR}}", "green"), f" {value:.2f}")
    if name.endswith("_s") and isinstance(value, float):
        return Text(f"{value:.1f}")
    text = _cell(value)
    if name == "uri" and len(text) > LONGEST_URI:
        # An address is told apart by its end.
        text = f"…{text[1 - LONGEST_URI :]}"
    return Text(text, style={"label": "bold", "error_code": "red"}.get(name, ""))


def bar(share: float, width: int = BAR) -> str:
    """Return a bar for a share from 0 to 1, exact to an eighth of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else str(_plain(value))


def _write_csv(rows: Iterable[dict[str, Any]], out: TextIO) -> None:
    names, rows = _named(rows)
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _harmless(_plain(value)) for name, value in row.items()})


def _named(rows: Iterable[dict[str, Any]]) -> tuple[list[str], Iterable[dict[str, Any]]]:
    if isinstance(rows, Rows):
        return list(rows.columns), rows
    ahead = peekable(rows)
    return list(ahead.peek({})), ahead


def _harmless(value: Any) -> Any:
    # A spreadsheet takes such a cell for a formula.
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value


def _write_jsonl(rows: Iterable[dict[str, Any]], out: TextIO) -> None:
    for row in rows:
        out.write(json.dumps(_parsed(row), default=_plain, ensure_ascii=False) + "\n")


def _parsed(row: dict[str, Any]) -> dict[str, Any]:
    # SQLite's JSON is text.
    if isinstance(meta := row.get("meta"), str):
        with suppress(ValueError):
            return {**row, "meta": json.loads(meta)}
    return row


def _plain_row(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    match value:
        case None | str() | int() | float() | list():
            return value
        case dict():
            return json.dumps(value, ensure_ascii=False)
        case date():
            return value.isoformat()
        case bytes():
            return value.hex()
        case Decimal():
            return float(value)
    return str(value)


def _write_parquet(rows: Iterable[dict[str, Any]], file: Path | None) -> None:
    if file is None:
        raise UsageError(reason="Parquet goes to a file: say -o FILE.")
    import polars

    try:
        with (
            whole(file) as part,
            TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder,
        ):
            if parts := list(_parquet_parts(rows, Path(folder))):
                polars.concat(map(polars.scan_parquet, parts), how="vertical_relaxed").sink_parquet(
                    part
                )
            else:
                polars.DataFrame(schema=_named(rows)[0]).write_parquet(part)
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


def _parquet_parts(rows: Iterable[dict[str, Any]], folder: Path) -> Iterator[Path]:
    import polars

    # Polars cannot append to a file, and a later part may have text where an earlier has nulls.
    for number, group in enumerate(chunked(rows, ROWS_IN_PART)):
        part = folder / f"{number}.parquet"
        plain = [_plain_row(row) for row in group]
        polars.DataFrame(plain, infer_schema_length=None).write_parquet(part)
        yield part


@contextmanager
def opened(file: Path | None) -> Iterator[TextIO]:
    """Yield standard output, or a file that appears under its name at the end.

    Raises:
        UsageError: it cannot be written, such as on a full disk.
    """
    if file is None:
        with _standard_output():
            yield sys.stdout
            sys.stdout.flush()
        return
    with whole(file) as part, part.open("w", encoding="utf-8", newline="") as out:
        yield out


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Yield a path for a file or a folder; it takes the real name at the end if all went well."""
    if file.exists() and not (file.is_file() or file.is_dir()):
        # A device or a pipe, whose place a file must not take.
        with _sentence(str(file)):
            yield file
        return
    # A person who has a link to a file wants the file written.
    target = file.resolve()
    part = target.with_name(f".{target.name}.part")
    try:
        with _sentence(str(file)):
            yield part
            part.replace(target)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)


@contextmanager
def _standard_output() -> Iterator[None]:
    try:
        with _sentence("Standard output"):
            yield
    except UsageError:
        # What is left in Python's buffer would fail once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


@contextmanager
def _sentence(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(reason=f"{name} cannot be written: {error.strerror or error}.") from error
