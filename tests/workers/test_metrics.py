"""The metrics of a worker with a GPU or two models, and of two workers on one port."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from db.session import connect
from earmark.core import broker
from earmark.core.errors import ServiceError
from earmark.core.settings import Broker, Database, Settings, Worker
from tests.servers import free_port
from workers import metrics_server

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def fake_batcher(device: str, *, waiting_bytes: int, lanes: int) -> Any:
    limits = SimpleNamespace(windows=64)
    return SimpleNamespace(
        waiting_bytes=waiting_bytes,
        classifier=SimpleNamespace(device=device, lanes=lanes, limits=limits),
    )


@pytest.fixture
def gauges(tmp_path: Path) -> Callable[..., dict[str, float]]:
    """Return a function from batchers to their worker's metrics; the worker's Redis is away."""
    broker.configure(Broker(url=f"redis://127.0.0.1:{free_port()}/0"))

    def samples(*batchers: Any) -> dict[str, float]:
        registry = CollectorRegistry()
        state: Any = SimpleNamespace(
            chunks_in_hand=3,
            batchers=list(batchers),
            pause=None,
            engine=connect(f"sqlite:///{tmp_path}/none.db", Database()),
            settings=Settings(),
        )
        feeder: Any = SimpleNamespace(taken_back=7)
        registry.register(metrics_server.ScrapeCollector(state, feeder))
        values = [sample for family in registry.collect() for sample in family.samples]
        assert len({sample.name for sample in values}) == len(values)
        return {sample.name: sample.value for sample in values}

    return samples


def test_the_gauges_of_two_models_are_added_up(gauges: Callable[..., dict[str, float]]) -> None:
    values = gauges(
        fake_batcher("cpu", waiting_bytes=5, lanes=2), fake_batcher("cpu", waiting_bytes=6, lanes=2)
    )
    assert values["earmark_waiting_audio_bytes"] == 11
    assert values["earmark_model_lanes"] == 4
    assert values["earmark_leases_ended_total"] == 7
    assert values["earmark_worker_paused"] == 0
    assert not any("gpu" in name or "queue" in name for name in values)


def test_a_gpus_memory_and_utilisation_are_shown(
    gauges: Callable[..., dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 80))
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 65)
    values = gauges(*[fake_batcher("cuda:0", waiting_bytes=0, lanes=2)] * 2)
    assert values["earmark_gpu_memory_used_bytes"] == 50
    assert values["earmark_gpu_memory_bytes"] == 80
    assert values["earmark_gpu_utilisation"] == 0.65


def test_without_nvidia_ml_py_only_the_gpus_memory_is_shown(
    gauges: Callable[..., dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_device: str) -> int:
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 80))
    monkeypatch.setattr(torch.cuda, "utilization", missing)
    values = gauges(fake_batcher("cuda", waiting_bytes=0, lanes=2))
    assert values["earmark_gpu_memory_used_bytes"] == 50
    assert "earmark_gpu_utilisation" not in values


def test_a_second_worker_on_one_metrics_port_names_the_cure() -> None:
    worker = Worker(metrics_port=free_port())
    metrics_server.serve(worker, lambda: True)
    with pytest.raises(ServiceError, match="EARMARK_WORKER__METRICS_PORT of its own"):
        metrics_server.serve(worker, lambda: True)
