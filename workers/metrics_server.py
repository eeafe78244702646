"""The HTTP server of a worker: /metrics for Prometheus, /ready and /health."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, MetricsHandler
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from db import feeding
from earmark.core import broker
from earmark.core.errors import ServiceError
from earmark.core.settings import Worker

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from producer.feeder import Feeder
    from workers.tasks import WorkerState


class ScrapeCollector(Collector):
    """Gauges read at scrape time: queue length, bytes in flight, GPU memory."""

    def __init__(self, state: WorkerState, feeder: Feeder) -> None:
        self._state = state
        self._feeder = feeder

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "earmark_leases_ended",
            "Clips this worker's feeder took back from workers that died.",
            value=self._feeder.taken_back,
        )
        in_hand = self._state.chunks_in_hand
        yield _gauge("earmark_chunks_in_hand", "Chunks that this worker has in progress.", in_hand)
        paused = self._state.pause is not None
        yield _gauge("earmark_worker_paused", "1 if this worker takes no chunks now.", paused)
        yield from self._model_gauges()
        with suppress(ServiceError):  # /ready shows it
            length = broker.queue_length()
            yield _gauge("earmark_queue_chunks", "Chunks that wait in the queue.", length)
        with suppress(ServiceError):
            yield from self._ledger_gauges()

    def _ledger_gauges(self) -> Iterator[Metric]:
        waiting = feeding.waiting(self._state.engine, str(self._state.settings.broker.queue))
        yield _gauge(
            "earmark_oldest_due_seconds",
            "Seconds since the oldest waiting clip of a run that is not paused became due.",
            waiting.oldest_s,
        )
        yield _gauge("earmark_runs_paused", "Runs that are paused.", waiting.paused_runs)

    def _model_gauges(self) -> Iterator[Metric]:
        waiting = lanes = most = 0
        gpus = set()
        for batcher in self._state.batchers:
            model = batcher.classifier
            waiting += batcher.waiting_bytes
            lanes += model.lanes
            most = max(most, model.limits.windows)
            if model.device.startswith("cuda"):
                gpus.add(model.device)
        yield _gauge("earmark_waiting_audio_bytes", "Decoded audio waiting for the model.", waiting)
        yield _gauge("earmark_model_lanes", "Batches the model works on at once.", lanes)
        yield _gauge("earmark_batch_windows_limit", "Windows a batch may hold.", most)
        for device in gpus:
            yield from _gpu_gauges(device)


def _gpu_gauges(device: str) -> Iterator[Metric]:
    # Imported here because it imports torch.
    from workers.scoring import gpu

    used, total, busy = gpu.usage(device)
    yield _gauge(
        "earmark_gpu_memory_used_bytes", "Memory of the GPU in use, by all processes.", used
    )
    yield _gauge("earmark_gpu_memory_bytes", "Memory of the GPU.", total)
    if busy is not None:
        yield _gauge("earmark_gpu_utilisation", "Share of the time that the GPU was at work.", busy)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(name, meaning, value=value)


def serve(worker: Worker, ready: Callable[[], bool]) -> None:
    """Answer /metrics, /ready (200 or 503) and /health in a thread.

    Raises:
        ServiceError: the port is taken.
    """

    class Handler(MetricsHandler):
        def do_GET(self) -> None:  # noqa: N802 - the library's name
            if self.path not in ("/health", "/ready"):
                super().do_GET()
                return
            self.send_response(200 if self.path == "/health" or ready() else 503)
            self.send_header("Content-Length", "0")
            self.end_headers()

    host, port = worker.metrics_address, worker.metrics_port
    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        cure = "give each worker of a machine an EARMARK_WORKER__METRICS_PORT of its own"
        raise ServiceError(reason=f"{host}:{port} cannot be served ({error}): {cure}.") from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def register(state: WorkerState, feeder: Feeder) -> None:
    """Show the gauges of this worker in /metrics from now on."""
    REGISTRY.register(ScrapeCollector(state, feeder))
