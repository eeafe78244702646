"""What a worker counts, and the small server that tells it: /metrics for Prometheus, /ready and /health."""

from __future__ import annotations

import threading
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, Counter, Histogram, MetricsHandler
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from earmark.core import broker
from earmark.core.clips import Failure, Success
from earmark.core.errors import ServiceError

if TYPE_CHECKING:
    from collections import Counter as Counts
    from collections.abc import Callable, Iterator, Sequence

    from prometheus_client.metrics_core import Metric

    from earmark.core.clips import Outcome
    from earmark.core.settings import Worker
    from producer.feeder import Feeder
    from workers.tasks import Desk

_clips = Counter("earmark_clips", "Clips by outcome: done, failed, retried, or lost with their lease.", ["outcome"])
_errors = Counter("earmark_errors", "Tries that ended with an error, by its code.", ["code"])
_audio = Counter("earmark_audio_seconds", "Seconds of audio classified.")
_bytes = Counter("earmark_fetched_bytes", "Bytes of the clips fetched.")
_stages = Counter("earmark_stage_seconds", "Seconds that clips spent in a stage, with its waits.", ["stage"])
_wait = Counter("earmark_decoder_wait_seconds", "Seconds of the stage decode that clips waited for a decoder.")
_model = Counter("earmark_model_seconds", "Seconds that the lanes of the model were at work.")
_batches = Histogram("earmark_batch_windows", "Windows in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64))

#: Stages that a clip's own timings tell of.
_TIMED = ("fetch", "decode", "classify")

decoder_wait = _wait.inc


def batch(windows: int, seconds: float) -> None:
    """Count a batch that the model has scored."""
    _batches.observe(windows)
    _model.inc(seconds)


def chunk(counts: Counts[str], outcomes: Sequence[Outcome], store_s: float) -> dict[str, float]:
    """Count what a chunk came to; return the seconds that its clips spent in each stage."""
    stages = {stage: sum(getattr(one.timings, f"{stage}_ms") for one in outcomes) / 1000 for stage in _TIMED}
    stages["store"] = store_s
    for outcome, clips in counts.items():
        _clips.labels(outcome).inc(clips)
    for stage, seconds in stages.items():
        _stages.labels(stage).inc(seconds)
    for failure in outcomes:
        if isinstance(failure, Failure):
            _errors.labels(failure.error.code).inc()
    _bytes.inc(sum(one.source.bytes for one in outcomes if one.source))
    _audio.inc(sum(one.facts.duration_s for one in outcomes if isinstance(one, Success) and not one.reused))
    return stages


class AtAScrape(Collector):
    """What need not be counted, because it can be looked up when somebody asks."""

    def __init__(self, desk: Desk, feeder: Feeder) -> None:
        self._desk = desk
        self._feeder = feeder

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "earmark_leases_ended", "Clips this worker's feeder took back from workers that died.",
            value=self._feeder.taken_back,
        )  # fmt: skip
        yield _gauge("earmark_chunks_in_hand", "Chunks this worker is at.", self._desk.chunks_in_hand)
        batchers = self._desk.batchers
        models = [batcher.classifier for batcher in batchers]
        waiting, lanes = sum(batcher.waiting_bytes for batcher in batchers), sum(model.lanes for model in models)
        most = max((model.limits.windows for model in models), default=0)
        yield _gauge("earmark_waiting_audio_bytes", "Decoded audio waiting for the model.", waiting)
        yield _gauge("earmark_model_lanes", "Batches the model works on at once.", lanes)
        yield _gauge("earmark_batch_windows_limit", "Windows a batch may hold.", most)
        for device in {model.device for model in models if model.device.startswith("cuda")}:
            yield from _of_the_gpu(device)
        try:
            yield _gauge("earmark_queue_chunks", "Chunks that wait in the queue.", broker.queue_length())
        except ServiceError:  # which /ready tells
            return


def _of_the_gpu(device: str) -> Iterator[Metric]:
    import torch

    free, total = torch.cuda.mem_get_info(device)
    yield _gauge("earmark_gpu_memory_used_bytes", "Memory of the GPU in use, by anybody.", total - free)
    yield _gauge("earmark_gpu_memory_bytes", "Memory of the GPU.", total)
    try:
        share = torch.cuda.utilization(device) / 100
        yield _gauge("earmark_gpu_utilisation", "Share of the time that the GPU was at work.", share)
    except (ModuleNotFoundError, RuntimeError):  # nvidia-ml-py is not installed, or finds no driver
        return


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

    where = worker.metrics_address, worker.metrics_port
    try:
        server = ThreadingHTTPServer(where, Handler)
    except OSError as error:
        cure = "give each worker of a machine an EARMARK_WORKER__METRICS_PORT of its own"
        raise ServiceError(reason=f"{where[0]}:{where[1]} cannot be served ({error}): {cure}.") from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def look_up(desk: Desk, feeder: Feeder) -> None:
    """From now on /metrics tells also of the desk and its models."""
    REGISTRY.register(AtAScrape(desk, feeder))
