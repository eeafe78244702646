"""An embedded Valkey and workers as child processes on this machine, started and stopped."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from more_itertools import divide

from earmark import children, valkey
from earmark.core import broker
from earmark.core.errors import SERVICE_EXIT, ServiceError
from earmark.core.settings import Settings, cores, memory
from earmark.core.settings import Worker as WorkerSettings

#: Decoded audio that waits takes at most one in so many parts of the machine's memory.
IN_FLIGHT_PART = 8
#: Stop restarting a worker after it has ended this often.
MAX_RESTARTS = 10
#: The queue of a run on this machine, which names the folder of its logs.
OWN_QUEUE = re.compile("run-[0-9a-f]{8}")


@contextmanager
def running(settings: Settings, *, queue: str, workers: int) -> Iterator[LocalCluster]:
    """Run an embedded Valkey and workers with these settings."""
    folder = settings.data_dir / queue
    with valkey.running(folder / "valkey") as url:
        here = use_broker(settings, url=url, queue=queue)
        environments = [children.environment(here) | own for own in shares(workers, settings)]
        with running_workers(environments, folder) as started:
            yield LocalCluster(here, started)
    broker.app.close()


def remove_logs(settings: Settings, queue: str) -> None:
    """Delete what a run on this machine left in the data folder, if this is such a run's queue."""
    if OWN_QUEUE.fullmatch(queue):
        shutil.rmtree(settings.data_dir / queue, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A running Valkey with workers; the settings lead a producer to it."""

    settings: Settings
    workers: list[Worker]

    @property
    def restarts(self) -> int:
        """How often a worker had to be started again."""
        return sum(worker.restarts for worker in self.workers)

    def keep_alive(self) -> None:
        """Restart the workers that have died.

        Raises:
            ServiceError: one cannot work here, or keeps dying.
        """
        for worker in self.workers:
            worker.keep_alive()


class Worker:
    """One worker process, started again when it dies of anything but a wrong setting."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self._environment = environment
        self._log = log
        self.restarts = 0
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        self.process = self._start()

    def keep_alive(self) -> None:
        """Start the process again if it has died.

        Raises:
            ServiceError: it cannot work here, or keeps dying.
        """
        status = self.process.poll()
        if status is None:
            return
        self.restarts += 1
        if status == SERVICE_EXIT:
            raise ServiceError(reason=children.last_line(self._log))
        if self.restarts > MAX_RESTARTS:
            raise ServiceError(
                reason=f"The worker keeps ending (last with {status}): see {self._log}."
            )
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return children.start([*children.EARMARK, "worker"], self._log, self._environment)


@contextmanager
def running_workers(environments: Iterable[dict[str, str]], logs: Path) -> Iterator[list[Worker]]:
    """Run a worker process in each of these environments; stop them at the end."""
    started = []
    for number, environment in enumerate(environments, 1):
        started.append(Worker(environment, logs / f"worker-{number}.log"))
    try:
        yield started
    finally:
        children.stop(*(worker.process for worker in started))


def shares(count: int, settings: Settings) -> Iterator[dict[str, str]]:
    """Yield the variables of each worker of this machine: its part of what the machine has.

    Workers with a GPU each keep to cores of their own.
    """
    devices = gpus() if settings.model.device in ("auto", "cuda") else []
    share = max(1, cores() // count)
    blocks = _core_blocks(count) if 1 < count <= len(devices) else []
    for number in range(count):
        own = {}
        if devices:
            own["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        if blocks:
            own["EARMARK_WORKER__CORES"] = ",".join(map(str, blocks[number]))
        if settings.worker.in_flight_bytes == WorkerSettings().in_flight_bytes:
            room = min(settings.worker.in_flight_bytes, memory() // IN_FLIGHT_PART // count)
            own["EARMARK_WORKER__IN_FLIGHT_BYTES"] = str(room)
        if port := settings.worker.metrics_port:
            own["EARMARK_WORKER__METRICS_PORT"] = str(port + number)
        own["EARMARK_WORKER__DECODERS"] = str(settings.worker.decoders or share)
        own["EARMARK_MODEL__THREADS"] = str(settings.model.threads or share)
        yield own


def _core_blocks(count: int) -> list[list[int]]:
    """Share the cores in blocks of neighbours, which have caches and memory in common."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < count:
        return []
    return list(map(list, divide(count, usable)))


def gpus() -> list[str]:
    """Return the GPUs that may be used here, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [device.strip() for device in visible.split(",") if device.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False
    ).stdout
    count = sum(line.startswith("GPU ") for line in listed.splitlines())
    return list(map(str, range(count)))


def find_broker(settings: Settings) -> Settings:
    """Return settings with their own broker, or with the one that `earmark up` runs here.

    Raises:
        ServiceError: there is neither.
    """
    url = settings.broker.url or broker.embedded_url(settings)
    if url is None:
        raise ServiceError(
            reason="No broker is known: set EARMARK_BROKER__URL, or start `earmark up` here."
        )
    return use_broker(settings, url=url)


def has_broker(settings: Settings) -> bool:
    """Return whether workers may be at work: a broker is set, or `earmark up` runs here."""
    return bool(settings.broker.url or broker.embedded_url(settings))


def use_broker(settings: Settings, **changes: Any) -> Settings:
    """Return settings with a changed broker, which this process uses from now on."""
    changed = settings.changed(broker=changes)
    broker.configure(changed.broker)
    return changed
