"""Views and tables, drawn from the models: a page of docs/reference.py."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from db import schema
from db.models import Base

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD = """# Tables and views

Look up the columns of the views, and how the tables behind them belong together. The views are the
stable interface; [SQL](../guides/sql.md#the-views) explains their columns. The tables may change
with each release. Times in tables are seconds since 1970.

## Views
"""
TABLES = """
## Tables
"""


def schema_page() -> str:
    """Return the page with the views' columns, and the tables as an entity diagram."""
    tables = Base.metadata.sorted_tables
    lines = [line for table in tables for line in (*_entity(table), *_relations(table))]
    diagram = ["```mermaid", "erDiagram", *lines, "```", ""]
    return "\n".join([HEAD, *_views(), TABLES, *diagram])


def _views() -> Iterator[str]:
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        for statement in schema.view_statements("sqlite"):
            connection.execute(sa.text(statement))
        for view in schema.view_names():
            columns = sa.inspect(connection).get_columns(view)
            names = ", ".join(column["name"] for column in columns)
            yield fill(f"**`{view}`**: {names}.", 100, initial_indent="- ", subsequent_indent="  ")
    engine.dispose()


def _entity(table: sa.Table) -> Iterator[str]:
    yield f"  {table.name} {{"
    for column in table.columns:
        yield f"    {type(column.type).__name__.lower()} {column.name}{_key(column)}"
    yield "  }"


def _key(column: sa.Column[Any]) -> str:
    if column.primary_key:
        return " PK"
    if column.foreign_keys or "of" in column.info:
        return " FK"
    return ""


def _relations(table: sa.Table) -> Iterator[str]:
    kept = {column.name: column.info["of"] for column in table.columns if "of" in column.info}
    checked = {key.parent.name: key.column.table.name for key in table.foreign_keys}
    for name, other in sorted({**kept, **checked}.items()):
        yield f"  {other} ||--o{{ {table.name} : {name}"
