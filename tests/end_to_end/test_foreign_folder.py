"""Verbs in a working directory with Python files that are named like imported modules."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import urlopen

import pytest

from earmark.demo import EXAMPLES
from tests.end_to_end.conftest import wait_until
from tests.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping

EARMARK = str(Path(sysconfig.get_path("scripts"), "earmark"))
MODULES = (
    "celery", "celeryconfig", "console", "db", "earmark", "flowerconfig", "multiprocessing",
    "numpy", "pickle", "sitecustomize", "soundfile", "soxr", "torch", "usercustomize",
)  # fmt: skip
PACKAGES = ("flower", "producer", "workers")
#: Records that it was imported.
TRAP = """
import os, sys
with open(os.environ["TRAPPED"], "a") as log:
    log.write(f"{__file__} by {sys.argv}\\n")
"""


class Folder:
    """A downloaded data set: a clip, and Python files that must not run."""

    def __init__(self, path: Path) -> None:
        self.path = path / "downloaded"
        self.trapped = path / "trapped"
        self._data = path / "data"
        for name in PACKAGES:
            (self.path / name).mkdir(parents=True)
            (self.path / name / "__init__.py").write_text(TRAP)
        for name in MODULES:
            (self.path / f"{name}.py").write_text(TRAP)
        shutil.copy(EXAMPLES / "dog.ogg", self.path)

    @property
    def environment(self) -> Mapping[str, str]:
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("EARMARK_", "PYTHON"))
        }
        return {**clean, "EARMARK_DATA_DIR": str(self._data), "TRAPPED": str(self.trapped)}

    def start(self, *words: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([EARMARK, *words], cwd=self.path, env=self.environment, **pipes)  # type: ignore[call-overload, no-any-return]

    def run(self, *words: str) -> str:
        process = self.start(*words)
        output = process.communicate(timeout=180)[0]
        assert process.returncode == 0, output
        return output

    def assert_nothing_was_imported(self) -> None:
        assert not self.trapped.exists(), self.trapped.read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.mark.parametrize("verb", ["run", pytest.param("explain", marks=pytest.mark.chaos)])
def test_a_verb_imports_nothing_from_the_working_directory(folder: Folder, verb: str) -> None:
    assert "dog" in folder.run(verb, "dog.ogg")
    folder.assert_nothing_was_imported()


@pytest.mark.chaos
def test_up_with_flower_imports_nothing_from_the_working_directory(folder: Folder) -> None:
    port = free_port()
    up = folder.start("up", "--files", ".", "--flower-port", str(port))
    try:
        wait_until(
            lambda: up.poll() is not None or _answers(f"http://127.0.0.1:{port}/healthcheck"), 60
        )
        assert up.poll() is None, up.communicate()[0]
        assert "1 done" in folder.run("submit", "dog.ogg", "--watch")
    finally:
        up.terminate()
        up.communicate(timeout=60)
    assert up.returncode == 0
    folder.assert_nothing_was_imported()


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
