"""The tables as a diagram, drawn from the models: a page of docs/reference.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from db.models import Base

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sqlalchemy as sa

HEAD = """# The tables

This page is a diagram of the tables, for developers. The tables may change with each release;
[the views](../guides/sql.md#the-views) are the stable interface. Times are seconds since 1970.
"""


def schema_page() -> str:
    """Return the page with the entity diagram, which GitHub and most viewers of Markdown draw."""
    tables = Base.metadata.sorted_tables
    lines = [line for table in tables for line in (*_entity(table), *_relations(table))]
    return "\n".join([HEAD, "```mermaid", "erDiagram", *lines, "```", ""])


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
