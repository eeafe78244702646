"""Rows as a table that fits its terminal, whatever they hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from db.rows import plain
from earmark.core.spelling import printable

if TYPE_CHECKING:
    from rich.console import Console

#: Rows that a table on a terminal shows; a file or a pipe gets all.
TABLE_ROWS = 1000
#: The columns for a terminal. From the right, those are left out for which there is no room.
RESULTS = (
    "clip_id", "uri", "start_s", "end_s", "channel", "member",
    "error_code", "error", "rank", "label", "score", "duration_s",
)  # fmt: skip
STATUS = (
    "run_id", "run", "total", "done", "failed", "paused", "eta_s", "clips_per_s",
    "running", "queued", "pending", "cancelled",
)  # fmt: skip
COUNTS = ("total", "done", "failed", "clips_per_s", "running", "queued", "pending", "cancelled")
#: Columns that are shortened in the middle: the start and the end tell them apart.
SHORTENED = ("uri", "run", "member", "example", "paused")
#: The width from which on text is folded, and addresses are shortened if there is no room.
WIDTHS = {"uri": 24, "run": 20, "member": 16, "label": 24, "error": 32, "example": 32, "paused": 16}
GAP = 2
BAR = 10


def show(rows: Iterable[dict[str, Any]], console: Console, columns: Sequence[str] = ()) -> None:
    """Print rows as a table, or one below the other if they are too wide.

    Args:
        rows: only the first thousand are shown.
        columns: those worth showing, in order; the last ones are left out if there is no room.
            Default: all.
    """
    shown = list(islice(rows, TABLE_ROWS + 1))
    names = list(next(iter(shown), {}))
    if columns:
        names = [name for name in columns if _has_values(name, shown)]
    cells = [_cells(names, row) for row in shown[:TABLE_ROWS]]
    widths = _fitted(_needed(names, cells), console.width, may_drop=bool(columns))
    if "uri" in widths and _leave_out_shared_folder(cells, widths["uri"]):
        widths = _fitted(_needed(list(widths), cells), console.width, may_drop=True)
    if cells:
        console.print(_table(cells, widths) if widths else _records(cells))
    if len(shown) > TABLE_ROWS:
        console.print(f"The first {TABLE_ROWS} rows; --format csv gives all.", style="dim")


def _has_values(name: str, rows: list[dict[str, Any]]) -> bool:
    return any(row.get(name) is not None for row in rows)


def _cells(names: list[str], row: dict[str, Any]) -> dict[str, Text]:
    return {name: _cell(name, row[name]) for name in names}


def _leave_out_shared_folder(cells: list[dict[str, Text]], room: int) -> bool:
    """Leave out the start that all addresses share, if they are too long and there is one."""
    uris = [row["uri"].plain for row in cells]
    start = commonprefix(uris).rpartition("/")[0]  # noqa: RUF071 - up to the last slash
    if len(uris) < 2 or not start or max(map(len, uris)) <= room:
        return False
    for row, uri in zip(cells, uris, strict=True):
        row["uri"] = Text(f"…{uri.removeprefix(start)}")
    return True


def _needed(names: list[str], cells: list[dict[str, Text]]) -> dict[str, int]:
    needed = {}
    for name in names:
        widest = max(row[name].cell_len for row in cells)
        needed[name] = max(len(name), widest)
    return needed


def _fitted(needed: dict[str, int], room: int, *, may_drop: bool) -> dict[str, int]:
    """Return the width of each column that is shown; none if they do not fit."""
    widths = {name: min(width, WIDTHS.get(name, width)) for name, width in needed.items()}
    while widths:
        left = room - sum(widths.values()) - GAP * (len(widths) - 1)
        if left >= 0:
            break
        widths.popitem()
        if not may_drop:
            return {}
    # What is left goes to the columns that have less than they need.
    for name in widths:
        more = min(left, needed[name] - widths[name])
        widths[name] += more
        left -= more
    return widths


def _table(cells: list[dict[str, Text]], widths: dict[str, int]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, GAP, 0, 0), pad_edge=False)
    for name, width in widths.items():
        right = name.endswith(("_s", "_id")) or name in COUNTS
        table.add_column(name, justify="right" if right else "left", width=width, overflow="fold")
    for row in cells:
        table.add_row(*(_shortened(name, row[name], width) for name, width in widths.items()))
    return table


def _records(cells: list[dict[str, Text]]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, GAP, 0, 0), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for number, row in enumerate(cells):
        if number:
            table.add_row()
        for name, text in row.items():
            table.add_row(name, text)
    return table


def _shortened(name: str, text: Text, width: int) -> Text:
    plain = text.plain
    if name not in SHORTENED or text.cell_len <= width:
        return text
    end = width * 2 // 3
    return Text(f"{plain[: width - end - 1]}…{plain[-end:]}", style=text.style)


def _cell(name: str, value: Any) -> Text:
    match value:
        case None:
            return Text()
        case float() if name == "score":
            return Text.assemble((f"{bar(value):<{BAR}}", "green"), f" {value:.2f}")
        case float() if name.endswith("_s"):
            return Text(f"{value:.1f}")
        case float():
            return Text(f"{value:.3f}")
    text = printable(str(plain(value)), " ")
    return Text(text, style={"label": "bold", "error_code": "red"}.get(name, ""))


def bar(share: float, width: int = BAR) -> str:
    """Return a bar for a share from 0 to 1, exact to an eighth of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
