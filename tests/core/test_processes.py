"""The working directory is not on the import path of a program, nor of what it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from earmark.core.processes import INSTALLATION

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
