"""`query`: a person's SQL reads and never writes, on both databases."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from db import results, runs
from db.query import query
from earmark import output
from earmark.core.errors import UsageError
from tests.db.builders import two_runs

if TYPE_CHECKING:
    import sqlalchemy as sa

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "sql.md"


def test_rows_come_by_column_name(engine: sa.Engine) -> None:
    assert list(query(engine, "SELECT 1 AS one, 'a' AS letter", timeout_s=5)) == [
        {"one": 1, "letter": "a"}
    ]


def test_the_views_can_be_read(engine: sa.Engine) -> None:
    for view in ("results", "top_k", "windows", "failures", "run_progress"):
        assert list(query(engine, f"SELECT * FROM {view}", timeout_s=5)) == []


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM runs",
        "DROP TABLE clips",
        "CREATE TABLE t (x int)",
        "UPDATE runs SET name = 'x'",
        "SELECT 1; DELETE FROM runs",
        "COMMIT; DELETE FROM runs",
        "ATTACH DATABASE '/tmp/x.db' AS x",
        "PRAGMA query_only = 0",
        "SELEC 1",
        "SELECT * FROM nowhere",
        "",
    ],
)
def test_statements_other_than_select_are_refused_in_one_sentence(
    engine: sa.Engine, statement: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        list(query(engine, statement, timeout_s=5))
    assert "\n" not in str(refusal.value)


def test_a_runaway_query_is_stopped(engine: sa.Engine) -> None:
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n"
    with pytest.raises(UsageError, match="took longer"):
        list(query(engine, endless, timeout_s=0.3))


def test_the_python_of_the_page_runs(
    engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_runs(engine)
    monkeypatch.chdir(tmp_path)
    run = runs.find_run(engine, "march").id
    output.write(results.results(engine, run), None, tmp_path / "march.parquet")
    (block,) = re.findall(r"```python\n(.+?)```", PAGE.read_text(), re.S)
    found = {}
    for statement in ast.parse(block).body:
        line = ast.unparse(statement)
        library = line.partition(".")[0]
        if find_spec(library):
            found[line] = eval(line, {library: import_module(library), "engine": engine})
    assert {len(rows) for rows in found.values()} == {3, 2}
