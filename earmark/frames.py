"""Result rows as data frames: each column has one type, on both databases alike."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import polars
from more_itertools import chunked

from earmark.core.errors import UsageError

if TYPE_CHECKING:
    import pandas
    import pyarrow

    from db.rows import Rows

#: Rows held as Python objects at once: some 50 MB.
ROWS_AT_ONCE = 20_000
WHOLE, NUMBER, TEXT, FLAG = polars.Int64, polars.Float64, polars.String, polars.Boolean
#: The columns of the views `results` and `windows`. SQLite has flags as 0 and 1 and times as text.
TYPES: dict[str, Any] = {
    "clip_id": WHOLE,
    "run_id": WHOLE,
    "run": TEXT,
    "uri": TEXT,
    "start_s": NUMBER,
    "end_s": NUMBER,
    "rank": WHOLE,
    "channel": WHOLE,
    "member": TEXT,
    "label": TEXT,
    "score": NUMBER,
    "meta": TEXT,
    "duration_s": NUMBER,
    "source_sample_rate": WHOLE,
    "channels": WHOLE,
    "codec": TEXT,
    "truncated": FLAG,
    "silent": FLAG,
    "reused": FLAG,
    "bytes": WHOLE,
    "sha256": TEXT,
    "fetch_ms": NUMBER,
    "decode_ms": NUMBER,
    "classify_ms": NUMBER,
    "worker": TEXT,
    "finished_at": polars.Datetime("us", "UTC"),
}


def polars_frame(rows: Rows) -> polars.DataFrame:
    """Return rows as a polars data frame."""
    schema = {name: TYPES.get(name) for name in rows.columns}
    parts = [polars.DataFrame(schema=schema)]
    for group in chunked(rows, ROWS_AT_ONCE):
        typed = [_typed_row(row) for row in group]
        parts.append(polars.DataFrame(typed, schema=schema, orient="row"))
    return polars.concat(parts, how="vertical_relaxed")


def arrow_table(rows: Rows) -> pyarrow.Table:
    """Return rows as an Arrow table.

    Raises:
        UsageError: pyarrow is not installed.
    """
    _require("to_arrow", "pyarrow")
    return polars_frame(rows).to_arrow()


def pandas_frame(rows: Rows) -> pandas.DataFrame:
    """Return rows as a pandas data frame.

    Raises:
        UsageError: pandas or pyarrow is not installed.
    """
    _require("to_pandas", "pandas", "pyarrow")
    return polars_frame(rows).to_pandas()


def _typed_row(row: dict[str, Any]) -> list[Any]:
    return [_typed(name, value) for name, value in row.items()]


def _typed(name: str, value: Any) -> Any:
    match value:
        case dict() | list():
            return json.dumps(value, ensure_ascii=False)
        case int() if TYPES.get(name) is FLAG:
            return bool(value)
        case str() if name == "finished_at":
            return datetime.fromisoformat(value).replace(tzinfo=UTC)
    return value


def _require(method: str, *packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UsageError(
            reason=f"{method}() needs {' and '.join(missing)}: pip install {' '.join(missing)}."
        )
