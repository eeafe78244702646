"""Every setting and number that matters, with its reason; read from EARMARK_* variables and `.env` at the edges."""

from __future__ import annotations

import json
import os
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import quote

from platformdirs import user_data_path
from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from earmark.core import broker_url


def _split(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return (
        json.loads(value)
        if value.startswith("[")
        else [part.strip() for part in value.split(",") if part.strip()]
    )


def _broker_url(value: str | None) -> str | None:
    return broker_url.usable(value) if value else None


#: A file of variables that Docker or Kubernetes mounts, so that passwords are in no container's description.
SECRETS = "/run/secrets/earmark.env"

Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], BeforeValidator(_split)]
Ports = Annotated[tuple[int, ...], BeforeValidator(_split)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Folders = Annotated[tuple[Path, ...], BeforeValidator(_split)]


class Group(BaseModel):
    """One family of settings; handed whole to the code that needs it."""

    # An input may hold a password.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Broker(Group):
    url: Annotated[str | None, AfterValidator(_broker_url)] = Field(
        None, description="Redis or Valkey URL; unset: the embedded Valkey of `run` and `up`."
    )
    queue: str | None = Field(
        None,
        description="Name of the queue; unset: one named after the ledger, so that databases can share a Redis.",
    )
    high_water: int = Field(
        64, description="Chunks kept in Redis: 1,000 clips ahead of the workers, 100 kB of memory."
    )
    pool_limit: int = Field(
        16, description="Connections; fewer than 10 deadlocks Flower's parallel inspection."
    )
    visibility_timeout_s: int = Field(
        7200,
        description="Far above any chunk's time: a short one runs waiting chunks twice. Leases recover, not this.",
    )
    connect_timeout_s: float = Field(
        5.0, description="A broker on the same network answers in milliseconds."
    )


class Database(Group):
    url: str | None = Field(
        None, description="SQLAlchemy URL; unset: a SQLite file in the user data folder."
    )
    busy_timeout_s: float = Field(30.0, description="How long one SQLite writer waits for another.")
    connect_timeout_s: int = Field(
        10, description="A reachable PostgreSQL accepts within this, even when busy."
    )
    pool_size: int = Field(
        12, description="Chunk threads, lease renewal and feeder each hold one at most."
    )


class Ledger(Group):
    lease_s: float = Field(
        60.0, description="A dead worker's clips are taken back after this; renewed each third."
    )
    max_attempts: int = Field(
        3, description="A third try catches nearly all passing faults; more burns the host."
    )
    retry_base_s: float = Field(
        5.0, description="First pause after a transient failure; doubles each time."
    )
    retry_cap_s: float = Field(900.0, description="Longest pause, also for a server's Retry-After.")
    feed_every_s: float = Field(
        0.5, description="The queue holds seconds of work, so half a second keeps it full."
    )
    queue_lease_s: float = Field(
        600.0, description="A queued clip nobody claimed by then is sent again."
    )
    lost_after_s: float = Field(
        10.0, description="Queued clips this old are lost when the queue is empty."
    )
    settle_s: float = Field(
        5.0, description="After a database outage workers renew leases before any is taken back."
    )
    outage_s: float = Field(
        60.0, description="Results wait this long for a database that is out of reach."
    )


class Fetch(Group):
    max_bytes: ByteSize = Field(
        ByteSize(200 * 1024**2),
        description="An hour of compressed audio fits; an hour of WAV needs more.",
    )
    timeout_s: float = Field(
        60.0, description="Total, headers and body: a clip at 1 MB/s fits with room."
    )
    connect_timeout_s: float = Field(10.0, description="Two lost SYN packets still connect.")
    max_redirects: int = Field(5, description="Real storage hosts need one or two.")
    max_url_chars: int = Field(4096, description="Signed storage URLs reach 2,000.")
    allow_networks: Annotated[Networks, NoDecode] = Field(
        (), description="CIDRs dialled though not public."
    )
    deny_networks: Annotated[Networks, NoDecode] = Field(
        (), description="CIDRs never dialled, such as our own ranges."
    )
    ports: Annotated[Ports, NoDecode] = Field(
        (80, 443), description="Other ports are internal services as a rule."
    )
    host_rate: float = Field(
        0.0, description="Requests a second to one host, all workers together; 0: no limit."
    )
    host_concurrency: int = Field(
        8, description="Connections one worker opens to one host, as browsers do."
    )
    host_slots: int = Field(
        0, description="Downloads from one host at once, all workers together; 0: no limit."
    )
    stores: Annotated[Names, NoDecode] = Field(
        (), description="Object stores to read, as s3,gs,hf; unset: none."
    )
    robots: bool = Field(
        False, description="Obey robots.txt; off, as a list is no crawl: somebody chose each clip."
    )
    file_roots: Annotated[Folders, NoDecode] = Field(
        (), description="Folders a worker may read; unset: none."
    )
    contact: str = Field(
        "", description="An address or URL for site owners, sent in the User-Agent."
    )


class Audio(Group):
    max_duration_s: float = Field(
        3600.0, description="An hour is the longest recording people submit as one clip."
    )
    min_duration_s: float = Field(
        0.05, description="Shorter audio is a click, and no model hears anything in it."
    )
    max_samples: int = Field(
        700_000_000, description="All channels together: an hour of 96 kHz stereo."
    )
    max_channels: int = Field(32, description="The widest microphone arrays in public data.")
    min_sample_rate: int = Field(
        1000, description="Below it a header lies: resampling would multiply the samples."
    )
    max_sample_rate: int = Field(
        384_000, description="Ultrasonic recorders; above it a header lies."
    )
    decode_timeout_s: float = Field(
        60.0, description="An hour of Opus takes about 30 s on a slow core."
    )
    decode_memory: ByteSize = Field(
        ByteSize(2 * 1024**3), description="A decoder's address space; an hour takes half."
    )
    clips_per_decoder: int = Field(
        2000, description="A decoder is renewed after this, so that leaks stay small."
    )


class Model(Group):
    name: str = Field(
        "starter",
        description="What a worker loads before its first clip: id, directory or `starter`.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    device: str = Field(
        "auto", description="auto, cpu, cuda, cuda:1 or mps; auto takes the best there is."
    )
    dtype: str = Field(
        "auto",
        description="auto, float32, bfloat16 or float16; auto is bf16 only on CUDA that has it.",
    )
    keep: int = Field(
        1, description="Idle models kept loaded: one fits every device, more serve mixed runs."
    )
    threads: int = Field(
        0, description="Windows scored at once on CPU, a core each; 0: the cores there are."
    )
    batch_s: float = Field(
        0.0, description="Padded seconds of audio in a batch; 0: 640 on a GPU, a few on CPU."
    )
    batch_windows: int = Field(
        0, description="Windows a batch may hold; 0: 64 on a GPU, 16 on CPU: more gain nothing."
    )


class Worker(Group):
    concurrency: int = Field(
        8, description="Chunks in progress: enough that downloads of one hide behind others."
    )
    decoders: int = Field(
        0, description="Decoder processes; 0: one a core, as more would only compete."
    )
    clips_in_flight: int = Field(
        32, description="Clips being fetched, decoded or scored at once, all chunks together."
    )
    in_flight_bytes: ByteSize = Field(
        ByteSize(512 * 1024**2),
        description="Decoded audio waiting for the model: two one-hour clips.",
    )
    chunk_deadline_s: float = Field(
        600.0, description="A chunk not done by then gives its clips back."
    )
    metrics_port: int = Field(
        0, description="Serves /metrics, /ready and /health; `up` counts on from it; 0: no."
    )
    metrics_address: str = Field(
        "127.0.0.1", description="Whoever reaches it reads the metrics, without a password."
    )
    log_json: bool = Field(
        False, description="Log a JSON object a line, for machines that gather logs."
    )
    idle_s: float = Field(
        120.0, description="A worker that no chunk reaches for so long while some wait is cut off."
    )
    silent_batcher_s: float = Field(
        120.0, description="A model silent this long with work waiting is hung."
    )


class Flower(Group):
    basic_auth: str | None = Field(
        None, description="USER:PASSWORD; Flower is opened to other machines only with one."
    )


class Settings(BaseSettings):
    """All groups; `Settings()` reads the environment and `.env`, the environment first."""

    model_config = SettingsConfigDict(
        env_prefix="EARMARK_",
        env_nested_delimiter="__",
        env_file=(".env", SECRETS),
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,
    )

    data_dir: Path = Field(
        default_factory=lambda: user_data_path("earmark", appauthor=False),
        description="Where the SQLite file and the embedded Valkey live.",
    )
    broker: Broker = Broker()
    database: Database = Database()
    ledger: Ledger = Ledger()
    fetch: Fetch = Fetch()
    audio: Audio = Audio()
    model: Model = Model()
    worker: Worker = Worker()
    flower: Flower = Flower()

    @property
    def database_url(self) -> str:
        return self.database.url or sqlite_url(self.data_dir / "earmark.db")

    def changed(self, **changes: Any) -> Self:
        """Return these settings with some changed, such as `changed(fetch={"ports": (8080,)})`.

        The values of a group are checked like those of the environment.
        """
        values = dict(self)
        for name, change in changes.items():
            current = values[name]
            if isinstance(current, Group):
                values[name] = type(current).model_validate({**dict(current), **change})
            else:
                values[name] = change
        return self.model_copy(update=values)


def sqlite_url(file: Path) -> str:
    """Return the URL of a SQLite file, whatever signs its name has."""
    return f"sqlite:///{quote(str(file))}"


def cores() -> int:
    """Return how many processors this process may use: those it is bound to, within its container's quota."""
    bound = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return bound
    return bound if quota == "max" else max(1, min(bound, int(quota) // int(period)))
