"""What each worker of a machine gets of it: a GPU, a part of the cores, a port of its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from earmark import local_cluster
from earmark.cli import options as o  # noqa: TC001 - read by Typer
from earmark.core.settings import Model, Settings, Worker, cores

if TYPE_CHECKING:
    from pathlib import Path


def counted(said: str) -> int:
    """Return how many workers `--workers` comes to."""
    app, found = typer.Typer(), []

    @app.command()
    def up(workers: o.Workers = 1) -> None:
        found.append(workers)

    result = CliRunner().invoke(app, ["--workers", said])
    assert result.exit_code == 0, result.output
    return found[0]


def devices_of(workers: int) -> list[str]:
    return [own["CUDA_VISIBLE_DEVICES"] for own in local_cluster.shares(workers, Settings())]


def with_gpus(monkeypatch: pytest.MonkeyPatch, folder: Path, listed: str) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{listed}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_auto_means_a_worker_for_each_gpu_that_the_machine_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = "GPU {}: NVIDIA A100 (UUID: GPU-{})\\n  MIG 1g.5gb Device 0: (UUID: MIG-1)\\n"
    with_gpus(monkeypatch, tmp_path, "".join(gpu.format(number, number) for number in range(4)))
    assert counted("auto") == 4
    assert devices_of(4) == ["0", "1", "2", "3"]


def test_auto_keeps_to_the_gpus_that_the_environment_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert counted("auto") == 2
    assert devices_of(3) == ["3", "5", "3"]


@pytest.mark.parametrize("visible", ["", None])
def test_auto_is_one_worker_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str | None
) -> None:
    with_gpus(monkeypatch, tmp_path, "No devices were found\\n")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert counted("auto") == 1
    assert all("CUDA_VISIBLE_DEVICES" not in own for own in local_cluster.shares(2, Settings()))


def test_workers_share_the_cores_and_have_ports_of_their_own() -> None:
    settings = Settings(model=Model(device="cpu"), worker=Worker(metrics_port=9100))
    (one,) = local_cluster.shares(1, settings)
    several = list(local_cluster.shares(cores(), settings))
    assert one["EARMARK_WORKER__DECODERS"] == one["EARMARK_MODEL__THREADS"] == str(cores())
    assert {own["EARMARK_WORKER__DECODERS"] for own in several} == {"1"}
    assert [own["EARMARK_WORKER__METRICS_PORT"] for own in several] == [
        str(9100 + n) for n in range(cores())
    ]


def test_workers_with_a_gpu_each_keep_to_cores_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 8, 9, 10}, raising=False)
    lists = [own["EARMARK_WORKER__CORES"] for own in local_cluster.shares(2, Settings())]
    assert lists == ["0,1,2,3", "8,9,10"]
    assert "EARMARK_WORKER__CORES" not in next(local_cluster.shares(1, Settings()))
    assert "EARMARK_WORKER__CORES" not in next(local_cluster.shares(4, Settings()))


def test_workers_share_the_memory_for_decoded_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    def room(count: int, settings: Settings) -> int | None:
        said = next(local_cluster.shares(count, settings)).get("EARMARK_WORKER__IN_FLIGHT_BYTES")
        return said and int(said)

    monkeypatch.setattr(local_cluster, "memory", lambda: 16 * 1024**3)
    assert room(1, Settings()) == room(4, Settings()) == 512 * 1024**2
    assert room(8, Settings()) == 256 * 1024**2
    assert room(8, Settings(worker=Worker(in_flight_bytes=2**30))) is None


def test_what_is_said_of_decoders_and_threads_holds_for_each_worker() -> None:
    settings = Settings(model=Model(threads=3), worker=Worker(decoders=5))
    own = next(local_cluster.shares(8, settings))
    assert (own["EARMARK_WORKER__DECODERS"], own["EARMARK_MODEL__THREADS"]) == ("5", "3")
    assert "EARMARK_WORKER__METRICS_PORT" not in own


@pytest.mark.parametrize("said", ["0", "-1", "many", ""])
def test_another_number_of_workers_is_refused_with_a_sentence(said: str) -> None:
    with pytest.raises(AssertionError, match="a number from 1 up, or auto"):
        counted(said)


def test_a_queue_of_a_shared_ledger_cannot_name_another_folder(tmp_path: Path) -> None:
    kept = [tmp_path / "clips-12345678", tmp_path / "run-0123abcd" / "..", tmp_path.parent]
    (tmp_path / "clips-12345678").mkdir()
    (tmp_path / "run-0123abcd").mkdir()
    for queue in ("clips-12345678", "run-0123abcd/..", "..", ""):
        local_cluster.remove_logs(Settings(data_dir=tmp_path), queue)
    assert all(folder.is_dir() for folder in kept)
    local_cluster.remove_logs(Settings(data_dir=tmp_path), "run-0123abcd")
    assert not (tmp_path / "run-0123abcd").exists()
