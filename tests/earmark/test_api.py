"""Earmark as a library: what `import earmark` loads and offers."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import polars
import pytest

import earmark
from db import changes
from earmark import api, children, frames, local_cluster
from earmark.cli.options import SUBMISSION
from earmark.core import broker
from earmark.core.errors import NotAudio, ServiceError, UsageError
from earmark.core.options import Listing, RunOptions
from earmark.database import open_database
from earmark.demo import EXAMPLES
from producer.submit import KeptOptions, submit
from tests.earmark.conftest import LABELS
from tests.faults.nursery import forking
from tests.servers import running_valkey

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.earmark.conftest import Heard
    from tests.faults.nursery import Nursery

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "python.md"
HEAVY = {"torch", "transformers", "sqlalchemy", "celery", "pydantic", "numpy", "polars"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with clips, and a data folder of its own."""
    for name in [name for name in os.environ if name.startswith("EARMARK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EARMARK_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    for name in ("dog.ogg", "siren.wav", "broken.wav"):
        shutil.copy(EXAMPLES / name, tmp_path / "clips")
    (tmp_path / "list.csv").write_text("link\nclips/dog.ogg\nclips/siren.wav\nclips/dog.ogg\n")
    lines = ["url,what,start_s,end_s"]
    for name, what, seconds in (("siren.wav", "siren", 6), ("dog.ogg", "dog", 5)):
        lines += [f"clips/{name},{what},{start},{start + 1}" for start in range(seconds)]
    (tmp_path / "labelled.csv").write_text("\n".join(lines))
    yield tmp_path
    broker.app.close()


def in_new_process(program: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # A test before this one may have set it, as every command of ours does for its children.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_earmark_loads_nothing_heavy_and_leaves_the_import_path_alone(
    tmp_path: Path,
) -> None:
    program = """
import json, sys
before = list(sys.path)
import earmark
version = earmark.__version__
print(json.dumps({"modules": list(sys.modules), "path_is_kept": sys.path == before}))
"""
    ended = in_new_process(program, tmp_path)
    found = json.loads(ended.stdout)
    assert not HEAVY & set(found["modules"])
    assert found["path_is_kept"]


@pytest.mark.slow
def test_using_the_api_to_read_loads_no_torch(tmp_path: Path) -> None:
    program = "import sys, earmark; earmark.open; earmark.run; print(*sys.modules)"
    modules = set(in_new_process(program, tmp_path).stdout.split())
    assert "earmark.api" in modules
    assert not {"torch", "transformers"} & modules


def test_the_package_offers_what_it_lists() -> None:
    assert set(dir(earmark)) == set(earmark.__all__)
    assert all(getattr(earmark, name) for name in earmark.__all__)
    assert earmark.run is api.run
    with pytest.raises(AttributeError, match="has no attribute 'runs'"):
        earmark.runs  # noqa: B018


def test_the_version_is_printed(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "earmark", "--version"]
    shown = subprocess.check_output(program, text=True, cwd=tmp_path)
    assert shown.strip() == earmark.__version__


def test_a_module_of_the_users_in_place_of_ours_is_named_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "db.py").write_text("raise SystemExit('the wrong db')")
    program = """
import earmark
try:
    earmark.run("clips")
except Exception as error:
    print(type(error).__name__, error)
"""
    said = in_new_process(program, tmp_path).stdout
    assert said.startswith(f"ServiceError Python imports `db` from {tmp_path}/db.py, not from")


def test_run_and_submit_take_every_option_of_the_command_line() -> None:
    of_the_verb = set(SUBMISSION) - {"sources"}
    of_the_producer = set(inspect.signature(submit).parameters)
    of_the_producer -= {"sources", "engine", "settings", "options", "listing", "tell", "kept"}
    of_the_producer |= set(KeptOptions.__annotations__)
    typed = set(api.Submission.__annotations__)
    taken = {*RunOptions.__slots__, *Listing.__slots__, "then", *of_the_producer}
    assert typed == of_the_verb == taken


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"top_k": 0}, "top_k is 0; it must be at least 1."),
        ({"chunk_size": 5000}, "chunk_size is 5000; it must be from 1 to 1000."),
        ({"combine": "median"}, "combine is 'median'; it must be mean or max."),
    ],
)
def test_a_wrong_option_is_a_sentence(
    folder: Path, option: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        earmark.run("clips", **option)  # type: ignore[arg-type]
    assert not (folder / "data").exists()


def test_a_misspelled_option_is_refused(folder: Path) -> None:
    with pytest.raises(TypeError, match="modell"):
        earmark.run("clips", modell="starter")  # type: ignore[call-arg]


def test_a_run_that_does_not_exist_is_a_sentence(heard: Heard) -> None:
    with pytest.raises(UsageError, match="There is no run april"):
        earmark.open("april", settings=heard.settings)


def test_submitting_without_a_broker_names_the_setting(folder: Path) -> None:
    with pytest.raises(ServiceError, match="set EARMARK_BROKER__URL"):
        earmark.submit("clips")


def test_a_submitted_run_is_waited_for(folder: Path) -> None:
    with running_valkey(folder) as url:
        settings = earmark.Settings(broker={"url": url})
        run = earmark.submit(["list.csv"], url_col="link", top_k=2, settings=settings)
        assert run.options.top_k == 2
        assert run.report() == [
            "Of 4 lines or files: 2 new, 1 known already, 1 header or further line of a cell."
        ]
        with pytest.raises(TimeoutError, match="0 of 2 clips"):
            run.wait(timeout_s=0)
        changes.cancel(run.engine, run.id)
        assert run.wait().states["cancelled"] == 2
        assert list(run.results()) == list(run.failures()) == []


def test_a_run_is_opened_by_id_or_name_and_read(heard: Heard) -> None:
    run = earmark.open(heard.run.id, settings=heard.settings)
    assert (run.id, run.name) == (heard.run.id, heard.run.name)
    assert earmark.open(run.name, settings=heard.settings).id == run.id
    assert run.progress().states["done"] == 4
    assert [row["label"] for row in run.results(min_score=0.9)] == ["dog", "siren"]
    assert [row["error_code"] for row in run.failures()] == ["not_found", "not_audio"]
    assert run.report() == []


def test_a_data_frame_has_typed_columns(heard: Heard) -> None:
    run = earmark.open(heard.run.id, settings=heard.settings)
    frame = run.to_polars()
    assert frame["label"].to_list() == ["dog", "siren", "siren", LABELS[3]]
    of_views = frame.drop("meta.note", "meta.city")
    assert of_views.schema == {name: frames.TYPES[name] for name in of_views.columns}
    assert frame["truncated"].to_list() == [False] * 4
    assert frame["meta.city"].to_list() == ["Rome"] * 4
    none = run.to_polars(min_score=2.0)
    assert (len(none), none.schema) == (0, of_views.schema)
    windows = run.to_polars(windows=True, label="speech")
    assert windows.select("start_s", "end_s").rows() == [(0.0, 5.0), (5.0, 10.0)]


def test_a_data_frame_of_postgresql_has_the_same_types(postgres_url: str, folder: Path) -> None:
    with running_valkey(folder) as url:
        settings = earmark.Settings(broker={"url": url}, database={"url": postgres_url})
        run = earmark.submit("list.csv", url_col="link", settings=settings)
    changes.cancel(run.engine, run.id)
    assert run.to_polars().schema["truncated"] == polars.Boolean
    run.engine.dispose()


def test_rows_of_postgresql_become_the_same_columns() -> None:
    from datetime import UTC, datetime

    moment = datetime(2026, 3, 1, 12, tzinfo=UTC)
    of_postgresql = {"silent": True, "meta": {"n": 1}, "finished_at": moment, "more": 1}
    of_sqlite = {"silent": 1, "meta": '{"n": 1}', "finished_at": "2026-03-01 12:00:00", "more": 1}
    first, second = (frames.polars_frame(rows_of(row)) for row in (of_postgresql, of_sqlite))
    assert first.equals(second)
    assert first.rows(named=True) == [
        {"silent": True, "finished_at": moment, "more": 1, "meta.n": 1}
    ]


def rows_of(row: dict[str, object]) -> frames.Rows:
    from db.rows import Rows

    return Rows(iter([list(row), list(row.values())]))


@pytest.mark.parametrize("method", ["to_arrow", "to_pandas"])
def test_a_missing_package_is_a_sentence(
    heard: Heard, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "find_spec", lambda _: None)
    run = earmark.open(heard.run.id, settings=heard.settings)
    with pytest.raises(UsageError, match=rf"{method}\(\) needs .*: pip install .*pyarrow\."):
        getattr(run, method)()


def test_arrow_and_pandas_have_the_same_rows(heard: Heard) -> None:
    run = earmark.open(heard.run.id, settings=heard.settings)
    assert run.to_arrow().column("label").to_pylist() == run.to_polars()["label"].to_list()
    assert run.to_pandas()["label"].tolist() == run.to_polars()["label"].to_list()
    assert str(run.to_pandas()["silent"].dtype) == "bool"


def test_children_get_the_settings_of_the_call(folder: Path) -> None:
    settings = earmark.Settings(data_dir=folder, fetch={"ports": (80, 8080), "host_rate": 2.5})
    changed = settings.changed(fetch={"file_roots": [folder / "a,b"]}, worker={"log_json": True})
    program = "from earmark.core.settings import Settings; print(Settings().model_dump_json())"
    shown = subprocess.check_output(
        [sys.executable, "-c", program], env=children.environment(changed), text=True
    )
    read, given = json.loads(shown), changed.model_dump(mode="json")
    assert read.pop("database")["url"] == changed.database_url
    given.pop("database")
    assert read == given


@pytest.mark.slow
def test_one_clip_is_classified_in_this_process(folder: Path) -> None:
    best, second = earmark.classify(folder / "clips" / "dog.ogg", top_k=2)
    assert best.label == "dog"
    assert best.score > 0.9 > second.score
    with pytest.raises(NotAudio):
        earmark.classify("clips/broken.wav")
    assert not (folder / "data").exists()


def test_the_examples_of_the_page_run(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    nursery: Nursery,
) -> None:
    monkeypatch.setattr(children, "start", forking(nursery))
    names: dict[str, object] = {}
    settings = earmark.Settings(fetch={"file_roots": ["/"]})
    open_database(settings, create=True).dispose()
    with local_cluster.running(settings, queue="docs", workers=1) as here:
        elsewhere = here.settings.broker
        for block in re.findall(r"```python\n(.+?)```", PAGE.read_text(), re.S):
            if "earmark.submit" in block:
                monkeypatch.setenv("EARMARK_BROKER__URL", str(elsewhere.url))
                monkeypatch.setenv("EARMARK_BROKER__QUEUE", str(elsewhere.queue))
            exec(block, names)
    shown = capsys.readouterr().out
    assert shown.startswith("dog 0.9")
    assert "not_audio - " in shown
    assert "2 clips are done" in shown
    assert "march starter True" in shown
    assert "2 of 2" in shown
    assert "11 clips rescored" in shown
    assert f"1 {folder}/clips/siren.wav" in shown
    assert list((folder / "sirens").glob("*.flac"))
