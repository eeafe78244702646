"""Output files are whole or absent, in the format of their name; errors are sentences."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import polars
import pytest

from db import schema
from db.session import connect
from earmark import files, frames, output
from earmark.core.errors import UsageError
from earmark.core.settings import Database
from tests.db.builders import two_runs
from tests.end_to_end.conftest import Earmark

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import sqlalchemy as sa

    from tests.faults.nursery import Nursery

pytestmark = pytest.mark.slow

MANY = (
    "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 99999)"
    " SELECT x, x * 7919 % 99991 FROM n"
)
ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n"
ROWS = [{"uri": "a", "label": None, "score": 1}, {"uri": "=b", "label": "dog", "score": 0.5}]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    file = tmp_path / "e.db"
    engine = connect(f"sqlite:///{file}", Database())
    schema.upgrade(engine)
    two_runs(engine)
    engine.dispose()
    return file


@pytest.fixture
def either(engine: sa.Engine, database_url: str) -> str:
    """The URL of a database with two runs; the test runs once on each kind."""
    two_runs(engine)
    return database_url


class CommandLine:
    """Runs a verb on a database, with more variables in its environment."""

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        self._folder, self._nursery = folder, nursery

    def __call__(
        self,
        database: Path | str,
        *words: str,
        environment: Mapping[str, str] = MappingProxyType({}),
        **how: Any,
    ) -> subprocess.CompletedProcess[str]:
        command_line = Earmark(dict(environment), self._folder, self._nursery)
        return command_line.ended(*words, "--db", str(database), **how)


@pytest.fixture
def earmark(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> CommandLine:
    return CommandLine(tmp_path_factory.mktemp("command-line"), nursery)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.csv", "uri,label,score\na,,1\n'=b,dog,0.5\n"),
        (
            "r.json",
            '[\n{"uri": "a", "label": null, "score": 1},\n'
            '{"uri": "=b", "label": "dog", "score": 0.5}\n]\n',
        ),
        (
            "r.jsonl",
            '{"uri": "a", "label": null, "score": 1}\n'
            '{"uri": "=b", "label": "dog", "score": 0.5}\n',
        ),
    ],
)
def test_the_suffix_says_the_format(tmp_path: Path, name: str, text: str) -> None:
    output.write(ROWS, None, tmp_path / name)
    assert (tmp_path / name).read_text() == text


def test_parquet_is_written_in_parts_whose_types_may_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "ROWS_AT_ONCE", 1)
    options = files.ParquetOptions(of_views=False)
    output.write(iter(ROWS), None, tmp_path / "r.parquet", parquet=options)
    assert polars.read_parquet(tmp_path / "r.parquet").rows() == [
        ("a", None, 1.0),
        ("=b", "dog", 0.5),
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["r.parquet"]


@pytest.mark.parametrize("name", ["r.csv", "r.jsonl", "r.parquet"])
def test_a_file_that_could_not_be_finished_is_not_there(tmp_path: Path, name: str) -> None:
    def breaking() -> Iterator[dict[str, Any]]:
        yield ROWS[0]
        raise OSError(28, "No space left on device")

    (tmp_path / name).write_text("as it was")
    with pytest.raises(UsageError, match="No space left on device"):
        output.write(breaking(), None, tmp_path / name)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "as it was")]


def test_a_run_is_exported_whole(earmark: CommandLine, database: Path, tmp_path: Path) -> None:
    assert earmark(database, "export", "march", "-o", str(tmp_path / "m.parquet")).returncode == 0
    assert polars.read_parquet(tmp_path / "m.parquet")["label"].to_list() == [
        "siren",
        "rain",
        "rain",
    ]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")  # noqa: PTH110
def test_a_full_disk_behind_standard_output_is_one_sentence(
    earmark: CommandLine, database: Path
) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        ended = earmark(database, "results", "march", stdout=full.fileno())
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "No space left" in ended.stderr


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_file_that_grows_too_large_leaves_what_was_there(
    earmark: CommandLine, either: str, tmp_path: Path, suffix: str
) -> None:
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / f"big.{suffix}"
    file.write_text("as it was")
    # More than what SQLite writes beside its file to be able to read it.
    ended = earmark(either, "query", MANY, "-o", str(file), longest_file=100_000)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "cannot be written" in ended.stderr
    assert [(found.name, found.read_text()) for found in file.parent.iterdir()] == [
        (file.name, "as it was")
    ]


@pytest.mark.parametrize(
    "words", [["query", MANY], ["export", "march", "-o", "-"], ["labels", "m"]]
)
def test_a_reader_that_stops_early_ends_it_without_a_word(
    earmark: CommandLine, either: str, words: list[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = earmark(either, *words, stdout=writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM runs",
        "SELECT * FROM nowhere",
        "SELEC",
        "",
        "SELECT 1; SELECT 2",
        "SELECT 1 AS a, 2 AS a",
        ENDLESS,
    ],
)
def test_a_bad_query_is_one_sentence_and_leaves_no_file(
    earmark: CommandLine, either: str, tmp_path: Path, statement: str
) -> None:
    ended = earmark(
        either, "query", statement, "--timeout-s", "0.5", "-o", str(tmp_path / "bad.csv")
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert not list(tmp_path.glob("*bad*"))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_whatever_a_column_holds_can_be_written(
    earmark: CommandLine, either: str, tmp_path: Path, suffix: str
) -> None:
    statement = (
        "SELECT 'plain' AS meta, label_ids, sha256,"
        " (SELECT avg(attempts) FROM clips) AS tries, CURRENT_DATE AS today"
        " FROM clips WHERE id = 1"
    )
    file = tmp_path / f"all.{suffix}"
    assert earmark(either, "query", statement, "-o", str(file)).returncode == 0
    read = {"csv": polars.read_csv, "jsonl": polars.read_ndjson, "parquet": polars.read_parquet}[
        suffix
    ]
    (row,) = read(file).to_dicts()
    assert (row["meta"], row["sha256"], row["tries"]) == ("plain", "aa", 0.625)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_no_rows_are_a_file_with_the_names_of_the_columns(
    earmark: CommandLine, either: str, tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"none.{suffix}"
    assert earmark(either, "results", "march", "--min-score", "2", "-o", str(file)).returncode == 0
    found = {"csv": polars.read_csv, "parquet": polars.read_parquet}[suffix](file)
    assert found.height == 0
    assert {"uri", "label", "score"} < set(found.columns)


def test_a_pipe_and_a_link_stay_what_they_are(tmp_path: Path) -> None:
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        output.write(ROWS, output.Format.csv, pipe)
        assert reader.communicate()[0].startswith("uri,label")
    file.touch()
    link.symlink_to(file)
    output.write(ROWS, output.Format.csv, link)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert file.read_text().startswith("uri,label")


def test_a_locked_database_is_one_sentence(earmark: CommandLine, database: Path) -> None:
    holder = sqlite3.connect(database, isolation_level=None)
    for statement in (
        "PRAGMA journal_mode = DELETE",
        "PRAGMA locking_mode = EXCLUSIVE",
        "BEGIN EXCLUSIVE",
    ):
        holder.execute(statement)
    impatient = {"EARMARK_DATABASE__BUSY_TIMEOUT_S": "0.1"}
    for words in (
        ["query", "SELECT 1"],
        ["export", "march", "-o", "-"],
        ["failures", "march"],
        ["prune", "march"],
    ):
        ended = earmark(database, *words, environment=impatient)
        assert (ended.returncode, ended.stderr.count("\n")) == (3, 1)
        assert "is locked by another program" in ended.stderr
    holder.close()


@pytest.mark.parametrize(
    "where", ["none.db", "postgresql://postgres@127.0.0.1:1/none", "postgresql://h:port/none"]
)
def test_a_database_that_is_not_there_is_one_sentence(
    earmark: CommandLine, tmp_path: Path, where: str
) -> None:
    for words in (["query", "SELECT 1"], ["export", "march", "-o", str(tmp_path / "m.csv")]):
        ended = earmark(where if "://" in where else tmp_path / where, *words)
        assert (ended.returncode, ended.stderr.count("\n")) == (3, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [["results", "march"], ["results", "march", "--windows"], ["failures", "march"]]
)
def test_a_table_fits_80_columns_and_has_colour_only_on_a_terminal(
    earmark: CommandLine, database: Path, words: list[str]
) -> None:
    plain = earmark(database, *words, "--format", "table").stdout
    assert max(map(len, plain.splitlines())) <= 80
    assert "\x1b" not in plain
    wanted = {"FORCE_COLOR": "1"}
    coloured = earmark(database, *words, "--format", "table", environment=wanted).stdout
    assert "\x1b[32m█" in coloured or "\x1b[31mnot_found" in coloured
    unwanted = {**wanted, "NO_COLOR": "1"}
    uncoloured = earmark(database, *words, "--format", "table", environment=unwanted).stdout
    assert "\x1b[3" not in uncoloured


def test_status_names_the_hosts_that_fail(earmark: CommandLine, database: Path) -> None:
    assert "most failures: h1.org (1)" in earmark(database, "status", "march").stderr


def test_prune_asks_first(earmark: CommandLine, database: Path) -> None:
    assert earmark(database, "prune", "march", stdin="n\n").returncode == 1
    assert "4 clips" in earmark(database, "prune", "march", "--yes").stderr
    assert earmark(database, "results", "march").returncode == 2


def test_status_gives_the_same_numbers_as_json(earmark: CommandLine, database: Path) -> None:
    told = json.loads(earmark(database, "status", "march", "--format", "json").stdout)
    assert (told["done"], told["failed"]) == (3, 1)
    # Four clips are too few for a pace.
    assert (told["clips_per_s"], told["eta_s"], told["bottleneck"]) == (None, None, None)
    every = json.loads(earmark(database, "status", "--format", "json").stdout)
    assert [each["run"] for each in every] == ["april", "march"]


@pytest.mark.parametrize(
    "words", [["status"], ["results", "march"], ["results", "--help"], ["query", "SELECT 1"]]
)
def test_reading_loads_nothing_heavy(database: Path, words: list[str]) -> None:
    code = (
        "import sys\nfrom earmark.cli import main\n"
        "try: main()\nexcept SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *words, "--db", str(database)]
    loaded = subprocess.run(command, text=True, capture_output=True, check=True).stderr.split()
    assert not {
        "torch",
        "celery",
        "alembic",
        "transformers",
        "requests",
        "polars",
        "matplotlib",
        "starlette",
    } & set(loaded)
    assert "typer" in loaded
