"""The working directory is not on the import path of a program, nor of what it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from earmark.core.errors import ServiceError
from earmark.core.processes import INSTALLATION, keep_to_cores
from earmark.core.settings import Worker

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
import json, os, subprocess, sys
from multiprocessing import get_context
from concurrent.futures import ProcessPoolExecutor
from earmark.core.processes import isolate_imports

isolate_imports()
with ProcessPoolExecutor(1, get_context("spawn")) as pool:
    spawned = pool.submit(eval, "__import__('sys').path").result()
show = "import json, sys; print(json.dumps(sys.path))"
output = subprocess.run([sys.executable, "-c", show], capture_output=True, check=True).stdout
child = json.loads(output)
print(json.dumps({"program": sys.path, "spawned": spawned, "child": child}))
"""


def run(program: str, folder: Path, pythonpath: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": pythonpath}
    environment.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_no_process_has_the_working_directory_on_its_import_path(tmp_path: Path) -> None:
    # `export PYTHONPATH=$PYTHONPATH:/elsewhere` begins with an empty folder if it was unset.
    ended = run(PROGRAM, tmp_path, pythonpath=f":{tmp_path.parent}")
    assert ended.returncode == 0, ended.stderr
    for process, path in eval(ended.stdout).items():
        assert not {"", ".", str(tmp_path)} & set(path), process
        assert str(tmp_path.parent) in path, process


def test_an_installation_may_be_the_working_directory() -> None:
    program = (
        "from earmark.core.processes import isolate_imports; isolate_imports();"
        " import db; print(db.__file__)"
    )
    ended = run(program, INSTALLATION)
    assert ended.stdout.strip() == str(INSTALLATION / "db" / "__init__.py"), ended.stderr


def test_a_foreign_package_of_our_name_is_refused_in_one_sentence(tmp_path: Path) -> None:
    intruder = tmp_path / "project" / "db.py"
    intruder.parent.mkdir()
    intruder.touch()
    ended = run("from earmark.cli import main; main()", tmp_path, pythonpath=str(intruder.parent))
    assert ended.returncode == 3
    assert ended.stderr.startswith(
        f"earmark: Python imports `db` from {intruder}, not from Earmark in {INSTALLATION}"
    )
    assert ended.stderr.count("\n") == 1


KEEP_TO_ONE = """
import os, subprocess, sys
from earmark.core.processes import keep_to_cores
from earmark.core.settings import Worker, cores

core = max(os.sched_getaffinity(0))
keep_to_cores(Worker(cores=f"{core}-{core}").cores)
assert cores() == 1
show = "import os; print(os.sched_getaffinity(0))"
print(subprocess.check_output([sys.executable, "-c", show], text=True).strip() == str({core}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone knows the cores of a process")
def test_a_process_and_its_children_keep_to_the_cores_that_it_is_given() -> None:
    assert subprocess.check_output([sys.executable, "-c", KEEP_TO_ONE], text=True) == "True\n"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone knows the cores of a process")
def test_cores_that_are_not_here_are_named() -> None:
    wanted = Worker(cores="9997,9998-9999").cores  # type: ignore[arg-type]
    with pytest.raises(ServiceError, match="cores that are not here: 9997, 9998, 9999"):
        keep_to_cores(wanted)
