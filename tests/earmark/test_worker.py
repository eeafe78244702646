"""Workers of a machine have names that stay when they are started again."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from earmark.worker import WORKERS_OF_A_MACHINE, reserve_name

if TYPE_CHECKING:
    from pathlib import Path

RESERVE = (
    "import sys, pathlib, earmark.worker as w; print(w.reserve_name(pathlib.Path(sys.argv[1]), ''))"
)


def test_each_worker_of_a_machine_has_a_name_and_a_gpu_its_index(tmp_path: Path) -> None:
    assert [reserve_name(tmp_path, "") for _ in range(2)] == ["earmark-1", "earmark-2"]
    assert reserve_name(tmp_path, "3") == "earmark-gpu3-1"
    assert reserve_name(tmp_path, "0,1") == "earmark-3"


@pytest.mark.slow
def test_a_worker_that_is_started_again_has_the_same_name(tmp_path: Path) -> None:
    for _ in range(2):
        command = [sys.executable, "-c", RESERVE, str(tmp_path)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        assert ended.stdout.strip() == "earmark-1"


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    assert reserve_name(tmp_path / "gone", "") == f"earmark-{os.getpid()}"
    assert WORKERS_OF_A_MACHINE >= 16
