"""What is exported opens in the tools people have, alike from both databases."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import polars
import pytest

from db import ledger, runs
from db.session import connect
from earmark import frames, label_files, output, parquet
from earmark.core import clips
from earmark.core.options import RunOptions
from earmark.core.settings import Database, Ledger
from earmark.label_files import LabelFormat
from tests import needs
from tests.db.builders import add_clips, chunk_of, two_runs
from tests.earmark.verbs import Ended, verb
from tests.servers import upgraded

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import sqlalchemy as sa

UTC_TIME = polars.Datetime("us", "UTC")


@pytest.fixture
def march(engine: sa.Engine, database_url: str) -> str:
    """The URL of a database with the run `march`; the test runs once on each kind."""
    two_runs(engine)
    return database_url


@pytest.fixture
def local(tmp_path: Path) -> str:
    """The URL of a SQLite file with the run `march`."""
    url = upgraded(f"sqlite:///{tmp_path}/local.db")
    engine = connect(url, Database())
    two_runs(engine)
    engine.dispose()
    return url


def export(db: str, file: Path, *words: str, run: str = "march") -> Ended:
    return verb("export", run, "-o", str(file), "--db", db, *words)


def test_parquet_has_the_same_types_from_both_databases(march: str, tmp_path: Path) -> None:
    assert f"3 rows: {tmp_path}/m.parquet" in export(march, tmp_path / "m.parquet").text
    frame = polars.read_parquet(tmp_path / "m.parquet")
    assert frame.schema == {
        **{name: frames.TYPES[name] for name in frame.columns[:-1]},
        "meta.city": polars.String,
    }
    types = [frame.schema[name] for name in ("truncated", "score", "finished_at", "start_s")]
    assert types == [polars.Boolean, polars.Float32, UTC_TIME, polars.Float64]
    assert frame["truncated"].to_list() == [False, False, True]
    assert frame["meta.city"].to_list() == ["Rome", "Oslo", "Rome"]


def test_parquet_says_what_made_it(local: str, tmp_path: Path) -> None:
    export(local, tmp_path / "m.parquet")
    metadata = polars.read_parquet_metadata(tmp_path / "m.parquet")[parquet.METADATA_KEY]
    made_by = json.loads(metadata)
    assert made_by["run"] == "march"
    assert (made_by["model"], made_by["sha256"], made_by["window_s"]) == ("m", "0", 4.0)
    assert made_by["options"]["top_k"] == 5
    assert made_by["license"] is None
    assert set(made_by["versions"]) == {"earmark", "schema"}


def with_pandas(file: Path) -> dict[str, int]:
    import pandas

    frame = pandas.read_parquet(file)
    assert str(frame["finished_at"].dtype).endswith(", UTC]")
    return dict(frame[~frame["truncated"]].groupby("meta.city")["label"].count())


def with_polars(file: Path) -> dict[str, int]:
    counts = polars.scan_parquet(file).filter(~polars.col("truncated")).group_by("meta.city").len()
    return dict(counts.collect().rows())


def with_duckdb(file: Path) -> dict[str, int]:
    needs.module("duckdb")
    import duckdb

    question = f"""SELECT "meta.city", count(*) FROM '{file}' WHERE NOT truncated GROUP BY 1"""
    connection = duckdb.connect()
    return dict(connection.sql(question).fetchall())


def with_datasets(file: Path) -> dict[str, int]:
    needs.module("datasets")
    import datasets

    table = datasets.Dataset.from_parquet(str(file), cache_dir=str(file.parent / "cache"))
    assert table.features["truncated"].dtype == "bool"
    cities = [row["meta.city"] for row in table if not row["truncated"]]
    return {city: cities.count(city) for city in cities}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("read", [with_pandas, with_polars, with_duckdb, with_datasets])
def test_parquet_opens_in_the_tools_people_have(
    local: str, tmp_path: Path, read: Callable[[Path], dict[str, int]]
) -> None:
    export(local, tmp_path / "m.parquet")
    assert read(tmp_path / "m.parquet") == {"Rome": 1, "Oslo": 1}


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_parts_is_what_load_dataset_reads(
    local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs.module("datasets")
    import datasets

    monkeypatch.setattr(frames, "ROWS_AT_ONCE", 1)
    monkeypatch.setattr(parquet, "PARTS_IN_FILE", 2)
    assert "3 rows: " in export(local, tmp_path / "parts", "--parts").text
    files = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert files == ["part-00000.parquet", "part-00001.parquet"]
    loaded: Any = datasets.load_dataset(str(tmp_path / "parts"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"]["label"][:] == ["siren", "rain", "rain"]
    assert "Directory not empty" in export(local, tmp_path / "parts", "--parts").text


def test_meta_of_every_kind_becomes_columns(tmp_path: Path) -> None:
    metas: list[dict[str, Any] | None] = [
        {"n": 1, "site": "a", "tags": ["x", "y"]},
        None,
        {"n": "two", "ok": True, "big": 2**70},
    ]
    rows = [{"clip_id": number, "meta": meta} for number, meta in enumerate(metas)]
    output.write(rows, None, tmp_path / "m.parquet")
    frame = polars.read_parquet(tmp_path / "m.parquet")
    assert frame["meta.n"].to_list() == ["1", None, "two"]
    assert frame["meta.tags"].to_list() == ['["x", "y"]', None, None]
    assert frame["meta.ok"].to_list() == [None, None, True]
    assert frame["meta.big"].to_list() == [None, None, str(2**70)]


def test_meta_with_a_key_of_its_own_in_each_row_stays_small(tmp_path: Path) -> None:
    rows = [{"clip_id": number, "meta": json.dumps({f"k{number}": 1})} for number in range(150)]
    output.write(rows, None, tmp_path / "m.parquet")
    frame = polars.read_parquet(tmp_path / "m.parquet")
    assert frame.width == 1 + frames.META_COLUMNS + 1
    assert frame["meta"].to_list()[-1] == '{"k149": 1}'


def test_top_k_has_a_row_for_each_label(march: str, tmp_path: Path) -> None:
    export(march, tmp_path / "m.jsonl", "--top-k", "2")
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [(row["rank"], row["label"]) for row in rows] == [
        (1, "siren"), (2, "dog"), (1, "rain"), (2, "dog"), (1, "rain"),
    ]  # fmt: skip
    # `--rank` is the same option, in `results` as well.
    shown = verb("results", "march", "--top-k", "2", "--format", "jsonl", "--db", march).text
    assert [json.loads(line)["rank"] for line in shown.splitlines()] == [1, 2, 1, 2, 1]
    export(march, tmp_path / "w.jsonl", "--rank", "2", "--windows", "--label", "rain")
    rows = [json.loads(line) for line in (tmp_path / "w.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in rows] == [2, 2, 2, 2, 1, 1]


def test_wide_has_a_column_for_each_label(march: str, tmp_path: Path) -> None:
    export(march, tmp_path / "m.parquet", "--wide")
    frame = polars.read_parquet(tmp_path / "m.parquet").select(
        polars.selectors.starts_with("score.")
    )
    assert set(frame.schema.values()) == {polars.Float32}
    assert [
        {key: round(value, 2) for key, value in row.items() if value} for row in frame.to_dicts()
    ] == [
        {"score.dog": 0.3, "score.siren": 0.8},
        {"score.dog": 0.4, "score.rain": 0.45},
        {"score.rain": 0.95},
    ]
    assert (
        "goes with no other choice"
        in export(march, tmp_path / "n.csv", "--wide", "--top-k", "2").text
    )


def test_an_unknown_ending_is_refused(local: str, tmp_path: Path) -> None:
    ended = export(local, tmp_path / "m.xlsx")
    assert ended.status == 2
    assert "ends with none of .csv, .json, .jsonl, .parquet" in ended.text
    assert export(local, tmp_path / "m.xlsx", "--format", "csv").status == 0


def test_raven_finds_each_of_many_files(march: str, tmp_path: Path) -> None:
    assert "6 rows: " in export(march, tmp_path / "t.txt", "--labels", "raven").text
    head, *lines = (tmp_path / "t.txt").read_text().splitlines()
    rows = [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]
    names = ("Begin File", "Begin Time (s)", "File Offset (s)", "Label")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("0.wav", "0.0", "0.0", "siren"),
        ("0.wav", "4.0", "4.0", "siren"),
        ("0.wav", "8.0", "8.0", "dog"),
        ("0.wav", "12.0", "12.0", "siren"),
        ("1.wav", "16.0", "0.0", "rain"),
        ("2.wav", "20.0", "0.0", "rain"),
    ]


def test_raven_takes_the_clips_that_are_wanted_where_they_are(march: str, tmp_path: Path) -> None:
    wanted = ("--labels", "raven", "--label", "rain", "--min-score", "0.9")
    export(march, tmp_path / "t.txt", *wanted)
    (_, line) = (tmp_path / "t.txt").read_text().splitlines()
    assert line.split("\t")[3:5] == ["20.0", "24.0"]
    assert export(march, tmp_path / "t.txt", "--labels", "raven", "--label", "rian").status == 2


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("https://h/a b.wav", "7-a_b.wav.txt"),
        ("/sounds/../../etc/passwd", "7-passwd.txt"),
        ("https://h/..", "7-...txt"),
        ("/s/" + "𝕏" * 200, f"7-{'𝕏' * 30}.txt"),
        ("/s/a\\..\\b\0.wav", "7-a_.._b_.wav.txt"),
    ],
)
def test_names_of_label_files_stay_in_their_folder(tmp_path: Path, uri: str, name: str) -> None:
    span = {"start_s": 0.0, "end_s": 4.0, "channel": 2, "score": 0.5}
    rows = [{"clip_id": 7, "uri": uri, "label": "dog\t9.0\nbark", **span}]
    label_files.write(rows, LabelFormat.audacity, tmp_path / "labels")
    (file,) = (tmp_path / "labels").iterdir()
    assert file.name == name
    assert file.read_text() == "0.000\t4.000\tdog 9.0 bark 0.50 channel 2\n"
    assert [path.name for path in tmp_path.iterdir()] == ["labels"]


def test_no_export_has_the_signature_of_an_address(local: str, tmp_path: Path) -> None:
    engine = connect(local, Database())
    run_id = ledger.open_run(engine, "signed", RunOptions(), queue="clips", chunk_size=16)
    add_clips(engine, run_id, [clips.Clip("https://me:SECRET@h/a.wav?X-Amz-Signature=SECRET")])
    clip_id = next(
        row["clip_id"] for row in runs.select(engine, "SELECT max(id) AS clip_id FROM clips")
    )
    claim = ledger.claim(engine, chunk_of(engine, [clip_id]), worker="w", limits=Ledger())
    facts = clips.AudioFacts(4.0, 44100, 1, "vorbis")
    scores = (clips.Prediction(0, 0.5),)
    outcome = clips.Success(
        clip_id, clips.Source("aa", 7), facts, scores, (), clips.Timings(1, 2, 3)
    )
    identity = {"name": "s", "revision": "", "sha256": "0", "sample_rate": 16000, "window_s": 4.0}
    model = ledger.register_model(engine, ["dog"], **identity, function_to_apply="sigmoid")
    ledger.settle_model(engine, run_id, model[0])
    ledger.finish(engine, claim, [outcome], model[1], Ledger())
    engine.dispose()
    for name in ("s.csv", "s.json", "s.jsonl", "s.parquet"):
        assert export(local, tmp_path / name, run="signed").status == 0
    export(local, tmp_path / "raven.txt", "--labels", "raven", run="signed")
    export(local, tmp_path / "audacity", "--labels", "audacity", run="signed")
    export(local, tmp_path / "wide.csv", "--wide", run="signed")
    written = [path for path in tmp_path.rglob("*") if path.is_file() and ".db" not in path.name]
    assert len(written) == 7
    for path in written:
        assert b"SECRET" not in path.read_bytes() + path.name.encode()


def test_names_are_told_with_what_was_meant(local: str) -> None:
    for words, meant in (
        (("results", "march", "--label", "sirne"), "siren"),
        (("results", "mrach"), "march"),
        (("query", "SELECT lable FROM results"), "label"),
        (("query", "SELECT r.lable FROM results r"), "label"),
        (("query", "SELECT * FROM reslts"), "results"),
    ):
        ended = verb(*words, "--db", local)
        assert ended.status == 2
        assert ended.text.endswith(f"Did you mean {meant}?")


def test_postgresql_tells_what_was_meant_too(postgres_url: str) -> None:
    ended = verb("query", "SELECT lable FROM results", "--db", postgres_url)
    assert 'reference the column "results.label"' in ended.text


def test_an_empty_answer_says_that_it_is_empty(local: str, tmp_path: Path) -> None:
    for words, sentence in (
        (("results", "march", "--min-score", "2"), "No clip of march has such a result."),
        (("failures", "april"), "No clip of april failed."),
        (("query", "SELECT 1 AS n WHERE 1 = 2"), "There are no rows."),
    ):
        assert sentence in verb(*words, "--db", local).text
    upgraded(f"sqlite:///{tmp_path}/new.db")
    assert "There is no run yet" in verb("status", "--db", str(tmp_path / "new.db")).text
