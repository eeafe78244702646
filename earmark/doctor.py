"""`earmark doctor`: check all that a run needs here, and name the cure for each part that fails."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pydantic import ByteSize

from db import access, schema, urls
from db.dialects import now
from db.identity import ledger_id, own_queue
from db.session import prepares, reading
from earmark import folders, local_cluster, machine_speed, valkey
from earmark.core import broker
from earmark.core.credentials import Proxy
from earmark.core.errors import EarmarkError, ServiceError
from earmark.core.options import RunOptions
from earmark.core.settings import Settings, cores
from earmark.database import connect_to
from earmark.demo import EXAMPLES

if TYPE_CHECKING:
    from workers.scoring.classifier import Classifier

#: Older ones lack what kombu asks for.
OLDEST_REDIS = (6, 2)
#: Five round trips a chunk: slower than this, the database is what a worker waits for.
SLOW_MS = 20.0
SLOW_DNS_S = 0.5
#: A few downloads of the largest size, or two million rows.
LEAST_FREE = ByteSize(1024**3)
PROBES = 20
LOUD = "dog.ogg"


@dataclass(frozen=True, slots=True)
class Check:
    """One part that a run needs: what it is like, or what to do about it."""

    name: str
    ok: bool
    sentence: str


def examine(settings: Settings) -> Iterator[Check]:
    """Check each part that a run needs."""
    for check in (_settings, _broker, _database, _dns, _proxy, _model, _file_roots, _disk):
        name = check.__name__.strip("_").replace("_", " ")
        try:
            yield Check(name, ok=True, sentence=check(settings))
        except EarmarkError as error:
            yield Check(name, ok=False, sentence=str(error))


def _settings(settings: Settings) -> str:
    if misspelt := settings.misspelt():
        raise ServiceError(reason=" ".join(misspelt))
    if _is_alone(settings):
        return "for this machine alone: `run` brings a queue, a database and workers"
    return "for many machines, which share a broker or a database"


def _is_alone(settings: Settings) -> bool:
    """Return whether `run` or `up` do all the work, here."""
    return settings.broker.url is None and "postgresql" not in settings.database_url


def _broker(settings: Settings) -> str:
    if not local_cluster.has_broker(settings):
        return f"EARMARK_BROKER__URL is not set; `run` and `up` start {valkey.program()}"
    local_cluster.find_broker(_with_own_queue(settings))
    broker.check()
    info = broker.server_info()
    if not info:
        return f"Redis of unknown version, as its user may not run INFO; {_waiting()}"
    version = str(info["redis_version"])
    if tuple(map(int, version.split(".")[:2])) < OLDEST_REDIS:
        raise ServiceError(reason=f"Redis {version} is too old; Celery needs 6.2 or newer.")
    policy = info.get("maxmemory_policy", "unknown")
    if policy not in ("noeviction", "unknown"):
        cure = (
            "set maxmemory-policy to noeviction, or a full Redis drops chunks, each found again"
            " only after minutes"
        )
        raise ServiceError(reason=f"Redis evicts keys ({policy}): {cure}.")
    kept = "no append-only file: the database refills the queue"
    if info.get("aof_enabled"):
        kept = "append-only file"
    return f"Redis {version}, {policy}, {kept}; {_waiting()}"


def _waiting() -> str:
    return f"{broker.queue_length()} chunks waiting, {broker.chunks_in_hand()} in hand"


def _with_own_queue(settings: Settings) -> Settings:
    """Name the queue after the ledger, as far as the database can tell."""
    engine = connect_to(settings)
    file = urls.file_of(engine.url)
    if settings.broker.queue or (file and not file.is_file()):
        return settings
    try:
        return local_cluster.use_broker(settings, queue=own_queue(ledger_id(engine)))
    except EarmarkError:  # which the database's own line tells
        return settings


def _database(settings: Settings) -> str:
    engine = connect_to(settings)
    where, file = urls.shown(engine.url), urls.file_of(engine.url)
    if file and broker.is_elsewhere(settings):
        cure = "set EARMARK_DATABASE__URL to the PostgreSQL that the other machines use"
        raise ServiceError(
            reason=f"{where} is a file of this machine alone, and the broker is elsewhere: {cure}."
        )
    if file and not file.is_file():
        return f"{where} is not there yet; the first run makes it"
    if file and schema.current(engine) in schema.versions()[:-1]:
        return f"{where} is of an earlier version; the next run upgrades it"
    access.check_writable(engine)
    schema.check(engine)
    with reading(engine) as connection:
        took = [_ms(lambda: connection.scalar(now().select())) for _ in range(PROBES)]
        pooled = not (file or prepares(connection))
    speed = f"{median(took):.1f} ms a question"
    if median(took) > SLOW_MS:
        raise ServiceError(
            reason=f"{where} takes {speed}: bring the workers nearer to it, or give it more room."
        )
    pooler = ", through a pooler: statements are not prepared" if pooled else ""
    return f"{where}, schema {schema.versions()[-1]}, {speed}{pooler}"


def _dns(settings: Settings) -> str:
    from earmark.core import resolver

    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or ""
    began = time.monotonic()
    try:
        resolver.resolve(host, 443, 5.0)
    except EarmarkError as error:
        return _without_names(str(error), settings)
    except TimeoutError:
        return _without_names(f"{host} was not resolved within 5 s.", settings)
    took = time.monotonic() - began
    slow = ""
    if took > SLOW_DNS_S:
        slow = "; slow: a caching resolver on this machine helps"
    return f"{host} resolved in {took * 1000:.0f} ms{slow}"


def _without_names(reason: str, settings: Settings) -> str:
    if _is_alone(settings):
        return f"{reason} Files and models on this machine need no names."
    raise ServiceError(
        reason=f"{reason} Without names no URL can be fetched: see /etc/resolv.conf."
    )


def _proxy(settings: Settings) -> str:
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    names = ", ".join(sorted(name for name in os.environ if name.lower() in proxies))
    parts = []
    if names:
        parts.append(f"{names}: used for models only")
    if settings.fetch.proxy:
        proxy = Proxy.parse(settings.fetch.proxy)
        parts.append(f"clips are fetched through {proxy.host}:{proxy.port}")
    elif names:
        parts.append(
            "clips are fetched directly, so workers need a way out or EARMARK_FETCH__PROXY"
        )
    return "; ".join(parts) or "no proxy variables"


def _model(settings: Settings) -> str:
    from earmark import explain
    from earmark.in_process import classified

    options = RunOptions(model=settings.model.name, revision=settings.model.revision)
    allowed = settings.changed(fetch={"file_roots": (EXAMPLES,)})
    began = time.monotonic()
    with classified(str(EXAMPLES / LOUD), allowed, options) as ended:
        took_s = time.monotonic() - began
        model = ended.batcher.classifier
        try:
            best = explain.in_words(ended.named(ended.success.predictions[:1]))
        except EarmarkError as error:
            raise ServiceError(
                reason=f"{options.model} does not classify the bundled {LOUD}: {error}"
            ) from error
        device = f"{options.model} on {model.device}, {model.dtype}"
        heard = f"{device}, ready in {took_s:.0f} s; hears {best} in {LOUD}"
        return f"{heard}; {_feeding(model, settings)}"


def _feeding(model: Classifier, settings: Settings) -> str:
    """Say what a core decodes, and how many cores the device wants, if that is a GPU."""
    decode_ms = machine_speed.decoding_ms(settings.audio) * machine_speed.SAMPLE_S
    decodes = f"a core decodes {1000 / decode_ms:.0f} such clips/s"
    if model.device == "cpu":
        return decodes
    clips_s = 1000 / machine_speed.scoring_ms(model)
    wanted = machine_speed.cores_wanted(clips_s, decode_ms)
    return f"{decodes}, and the device scores {clips_s:.0f}: it wants {wanted} cores of {cores()}"


def _file_roots(settings: Settings) -> str:
    roots = settings.fetch.file_roots
    for root in roots:
        if not os.access(root, os.R_OK | os.X_OK) or not root.is_dir():
            raise ServiceError(
                reason=f"{root} in EARMARK_FETCH__FILE_ROOTS is no folder that can be read here."
            )
    if roots:
        return ", ".join(map(str, roots))
    if _is_alone(settings):
        return "not needed: `run` may read what you name, `up` the folders of --files"
    return "none, so a worker here fetches URLs only; files need EARMARK_FETCH__FILE_ROOTS"


def _disk(settings: Settings) -> str:
    folders.check_temporary()
    parts = []
    for use, folder in (("downloads", Path(tempfile.gettempdir())), ("data", settings.data_dir)):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = ByteSize(shutil.disk_usage(there).free)
        if free < LEAST_FREE:
            least = LEAST_FREE.human_readable()
            room = f"{free.human_readable()} free"
            raise ServiceError(reason=f"{folder} ({use}) has {room}: give it {least} or more.")
        parts.append(f"{free.human_readable()} free in {folder} ({use})")
    return ", ".join(parts)


def _ms(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return (time.perf_counter() - began) * 1000
