"""Result rows as data frames: each column has one type, on both databases alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any

import polars
from more_itertools import chunked

from db.results import SCORE_OF
from db.rows import Rows, parsed, plain
from earmark.core import vectors
from earmark.core.errors import UsageError

if TYPE_CHECKING:
    import pandas
    import pyarrow


#: Rows held as Python objects at once: some 50 MB.
ROWS_AT_ONCE = 20_000
#: Columns that the keys of meta may become. Of a list with more, the rest stays JSON.
META_COLUMNS = 100


#: The largest whole number of a column; a larger one is text.
LARGEST = 2**63
WHOLE, NUMBER, REAL = polars.Int64, polars.Float64, polars.Float32
VECTOR = polars.List(polars.Float32)
TEXT, FLAG, TIME = polars.String, polars.Boolean, polars.Datetime("us", "UTC")
#: The columns of the views of clips. SQLite has flags as 0 and 1 and times as text.
TYPES: dict[str, Any] = {
    "clip_id": WHOLE, "run_id": WHOLE, "run": TEXT, "uri": TEXT, "start_s": NUMBER, "end_s": NUMBER,
    "channel": WHOLE, "member": TEXT, "rank": WHOLE, "label": TEXT, "score": REAL,
    "duration_s": NUMBER, "source_sample_rate": WHOLE, "channels": WHOLE, "codec": TEXT,
    "truncated": FLAG, "silent": FLAG, "over_scale": FLAG, "cancelling": FLAG,
    "recorded_at": TEXT, "recorded_from": TEXT, "tags": TEXT, "reused": FLAG, "unheard": FLAG,
    "bytes": WHOLE, "sha256": TEXT,
    "fetch_ms": REAL, "decode_ms": REAL, "classify_ms": REAL, "worker": TEXT, "finished_at": TIME,
    "error_code": TEXT, "error_stage": TEXT, "error": TEXT, "attempts": WHOLE, "crashes": WHOLE,
    "windows": WHOLE, "vector": VECTOR,
}  # fmt: skip


class Columns:
    """The columns of rows, with their types; of views, a key of `meta` becomes a column."""

    def __init__(self, names: Iterable[str], *, of_views: bool = True) -> None:
        known = TYPES if of_views else {}
        self._types = {}
        for name in names:
            score = REAL if of_views and name.startswith(SCORE_OF) else None
            self._types[name] = known.get(name, score)
        self._has_meta = of_views and "meta" in self._types
        if self._has_meta:
            del self._types["meta"]
        self._meta: dict[str, None] = {}

    def frame(self, rows: Iterable[dict[str, Any]]) -> polars.DataFrame:
        """Return some rows as a data frame; columns of meta that only later rows have come last."""
        typed = [self._typed(row) for row in rows]
        schema = {**self._types, **self._meta}
        return polars.DataFrame(typed, schema, strict=False, infer_schema_length=None)

    def _typed(self, row: dict[str, Any]) -> dict[str, Any]:
        typed = {name: _value(row[name], dtype) for name, dtype in self._types.items()}
        if self._has_meta:
            typed.update(self._spread(row["meta"]))
        return typed

    def _spread(self, meta: Any) -> Iterator[tuple[str, Any]]:
        rest = {}
        for key, value in (parsed(meta) or {}).items():
            name = f"meta.{key}"
            if len(self._meta) < META_COLUMNS:
                self._meta[name] = None
            if name in self._meta:
                yield name, _value(value, None)
            else:
                rest[key] = value
        if rest:
            self._meta["meta"] = None
            yield "meta", json.dumps(rest, ensure_ascii=False)


def _value(value: Any, dtype: Any) -> Any:
    # First what most cells have: there are 30 million in a million rows.
    if value is None or isinstance(value, float) or (isinstance(value, str) and dtype is not TIME):
        return value
    match value:
        case int() if dtype is FLAG:
            return bool(value)
        case int() if abs(value) >= LARGEST:
            return str(value)
        case str():
            return datetime.fromisoformat(value).replace(tzinfo=UTC)
        case list() | dict() if dtype in (None, TEXT):
            return json.dumps(value, ensure_ascii=False)
        case bytes() if dtype is VECTOR:
            return vectors.unpack([value])[0]
        case datetime() if dtype is TIME:
            return value.astimezone(UTC)
    return plain(value)


def polars_frame(rows: Rows) -> polars.DataFrame:
    """Return rows as a polars data frame."""
    columns = Columns(rows.columns)
    parts = map(columns.frame, chain([[]], chunked(rows, ROWS_AT_ONCE)))
    return polars.concat(parts, how="diagonal_relaxed")


def embeddings_frame(rows: Rows) -> polars.DataFrame:
    """Return rows of embeddings as a data frame whose column `vector` has arrays of one width."""
    frame = polars_frame(rows)
    width = len(frame["vector"][0]) if len(frame) else 0
    return frame.with_columns(polars.col("vector").list.to_array(width))


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


def _require(method: str, *packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UsageError(
            reason=f"{method}() needs {' and '.join(missing)}: pip install {' '.join(missing)}."
        )
