"""Rows of a statement, by column name, one by one as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from db.dialects import dialect_of, prepared
from db.session import reading
from earmark.core.errors import UsageError

#: Rows of a large result held in memory at once.
ROWS_AT_ONCE = 2000


class Rows(Iterator[dict[str, Any]]):
    """An iterator of rows, each a dictionary; it knows its columns even where there are no rows.

    Reads of any number of rows return it. Take all at once with `list(rows)`.
    """

    def __init__(self, lines: Iterator[Sequence[Any]]) -> None:
        """Take lines of which the first has the names of the columns."""
        self.columns = tuple(next(lines))
        self._lines = lines
        for name in self.columns:
            if self.columns.count(name) > 1:
                raise UsageError(
                    reason=f"Two columns are called {name}: give one another name with AS."
                )

    def __next__(self) -> dict[str, Any]:
        return dict(zip(self.columns, next(self._lines), strict=True))


def select(engine: sa.Engine, statement: str, **values: Any) -> Rows:
    """Return the rows of plain SQL, spelled as this database has it."""
    return Rows(_lines(engine, prepared(statement, dialect_of(engine)), values))


def _lines(
    engine: sa.Engine, statement: sa.TextClause, values: dict[str, Any]
) -> Iterator[Sequence[Any]]:
    with reading(engine) as connection:
        result = connection.execution_options(yield_per=ROWS_AT_ONCE).execute(statement, values)
        yield tuple(result.keys())
        yield from result


def parsed(value: Any) -> Any:
    """Return the JSON of a column, which is text on SQLite."""
    return json.loads(value) if isinstance(value, str) else value


def plain(value: Any) -> Any:
    """Return a value of any column as one that CSV and JSON can hold."""
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
