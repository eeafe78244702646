"""Every setting, with its default and the reason; read from EARMARK_* variables and `.env`."""

from __future__ import annotations

import json
import os
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar
from urllib.parse import quote

from platformdirs import user_data_path
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    SettingsConfigDict,
)

from earmark.core import broker_url, credentials
from earmark.core.errors import ServiceError
from earmark.core.spelling import did_you_mean


def _split(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.startswith("["):
        return json.loads(value)
    return [part.strip() for part in value.split(",") if part.strip()]


def _core_numbers(value: Any) -> Any:
    """Return the numbers of cores such as `0-3,8`."""
    numbers: list[int] = []
    for part in _split(value):
        first, _, last = str(part).partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _broker_url(value: str | None) -> str | None:
    return broker_url.usable(value) if value else None


PREFIX = "EARMARK_"
#: How alike a name must be to a setting's to be taken for a misspelt one; 1 is equal.
ALIKE = 0.8
#: A file of variables, mounted by Docker or Kubernetes: no container description shows passwords.
SECRETS = "/run/secrets/earmark.env"

Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, BeforeValidator(_split)]
Ports = Annotated[tuple[int, ...], NoDecode, BeforeValidator(_split)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Cores = Annotated[tuple[int, ...], NoDecode, BeforeValidator(_core_numbers)]
Folders = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split)]
V = TypeVar("V")
#: JSON with a value for each host pattern.
ByHost = Annotated[dict[str, V], NoDecode, BeforeValidator(credentials.by_host), Field(repr=False)]


class Group(BaseModel):
    """A group of settings, passed as a whole to the code that uses it."""

    # The input may hold a password.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Broker(Group):
    #: Redis or Valkey URL; unset: the embedded Valkey of `run` and `up`.
    url: Annotated[str | None, AfterValidator(_broker_url)] = None
    #: Name of the queue; unset: the ledger's own. So ledgers can share a Redis.
    queue: str | None = None
    #: Chunks kept in Redis: 1,000 clips ahead of the workers, 4,000 with GPUs; at most 2 MB of
    #: memory.
    high_water: int = 64
    #: Connections to Redis: Flower inspects workers in parallel and needs 10.
    pool_limit: int = 16
    #: Time until Redis repeats a chunk: long, as leases recover lost clips sooner.
    visibility_timeout_s: int = 7200
    #: Time to reach Redis: on the same network, milliseconds are enough.
    connect_timeout_s: float = 5.0


class Database(Group):
    #: SQLAlchemy URL; unset: a SQLite file in the user data folder.
    url: str | None = None
    #: Time that one SQLite writer waits for another.
    busy_timeout_s: float = 30.0
    #: Time to reach PostgreSQL: it accepts within this, even when busy.
    connect_timeout_s: int = 10
    #: Connections: each chunk, the lease renewal and the feeder use one.
    pool_size: int = 12


class Ledger(Group):
    #: A dead worker's clips are taken back after this; renewed at a third.
    lease_s: float = 60.0
    #: Tries per clip: a third catches most passing faults; more load the host.
    max_attempts: int = 3
    #: First pause (backoff) after a transient failure; it doubles each time.
    retry_base_s: float = 5.0
    #: Longest pause, also for a server's Retry-After.
    retry_cap_s: float = 900.0
    #: Time between the feeder's looks at the queue, which holds seconds of work.
    feed_every_s: float = 0.5
    #: A queued clip that no worker claims within this is sent again.
    queue_lease_s: float = 600.0
    #: Queued clips older than this are sent again if the queue is empty.
    lost_after_s: float = 10.0
    #: After a database outage, workers have this long to renew their leases.
    settle_s: float = 5.0
    #: Results wait this long for a database that is out of reach.
    outage_s: float = 60.0


class Fetch(Group):
    #: Largest download; an hour of 48 kHz WAV is 345 MB. Local files have no limit.
    max_bytes: ByteSize = ByteSize(1024**3)
    #: Largest container that has to be unpacked as a whole; a worker keeps two.
    max_container_bytes: ByteSize = ByteSize(8 * 1024**3)
    #: Time for a whole download: 60 MB at 1 MB/s.
    timeout_s: float = 60.0
    #: Time to connect: enough after two lost SYN packets.
    connect_timeout_s: float = 10.0
    #: Redirects followed: storage hosts need one or two.
    max_redirects: int = 5
    #: Longest URL: signed storage URLs reach 2,000.
    max_url_chars: int = 4096
    #: Networks (CIDR) that may be dialled although they are not public.
    allow_networks: Networks = ()
    #: Networks (CIDR) that are never dialled, such as your own ranges.
    deny_networks: Networks = ()
    #: Ports that may be dialled: others are mostly internal services.
    ports: Ports = (80, 443)
    #: Requests a second to one host, all workers together; 0: no limit.
    host_rate: float = 0.0
    #: Connections of one worker to one host, as browsers have.
    host_concurrency: int = 8
    #: Downloads from one host at once, all workers together; 0: no limit.
    host_slots: int = 0
    #: Object stores to read, such as s3,gs,hf; unset: none.
    stores: Names = ()
    #: Obey robots.txt. Off, because a list is no crawl: its clips are chosen.
    robots: bool = False
    #: Folders a worker may read; unset: none.
    file_roots: Folders = ()
    #: Headers by host, as JSON; a host means https unless it begins with http://.
    headers: ByHost[Annotated[dict[str, str], AfterValidator(credentials.check_headers)]] = {}
    #: Bearer tokens by host, as JSON.
    tokens: ByHost[Annotated[str, AfterValidator(credentials.check_header)]] = {}
    #: USER:PASSWORD by host, as JSON.
    basic_auth: ByHost[Annotated[str, AfterValidator(credentials.check_login)]] = {}
    #: HTTP proxy for clips, as http://HOST:PORT; it must allow CONNECT.
    proxy: Annotated[str | None, AfterValidator(credentials.check_proxy)] = Field(None, repr=False)
    #: The proxy resolves names, and must itself refuse private addresses.
    proxy_resolves: bool = False
    #: An address or URL for site owners, sent in the User-Agent.
    contact: str = ""


class Audio(Group):
    #: Longest clip: a day's recording; the longest day has 25 hours.
    max_duration_s: float = 90_000.0
    #: Shortest clip: models hear nothing in a shorter click.
    min_duration_s: float = 0.05
    #: Samples of all channels: a day of 96 kHz stereo.
    max_samples: int = 20_000_000_000
    #: Windows of a clip: eleven days side by side, a day 0.9 s apart.
    max_windows: int = 100_000
    #: Channels: the widest microphone arrays in public data.
    max_channels: int = 32
    #: Seismic and infrasound recorders go down to this.
    min_sample_rate: int = 100
    #: Bat detectors reach 576 kHz; a higher rate is a false header.
    max_sample_rate: int = 1_000_000
    #: A decoder ends if it gives nothing for this long; half an hour of Opus takes 30 s on a slow
    #: core.
    decode_timeout_s: float = 60.0
    #: Address space of a decoder: several times what any real file takes.
    decode_memory: ByteSize = ByteSize(2 * 1024**3)
    #: A decoder process is replaced after this, so that leaks stay small.
    clips_per_decoder: int = 2000


class Model(Group):
    #: Model that a worker loads at its start: a hub id, a folder or `starter`.
    name: str = "starter"
    #: Branch, tag or commit of a hub model.
    revision: str | None = None
    #: auto, cpu, cuda, cuda:1 or mps; auto takes the best one available.
    device: str = "auto"
    #: auto, float32, bfloat16 or float16; auto: bfloat16 on CUDA that supports it.
    dtype: str = "auto"
    #: Models kept loaded: one fits every device; more serve mixed runs.
    keep: int = 1
    #: Windows scored at once on a CPU, one per core; 0: all cores.
    threads: int = 0
    #: Padded seconds of audio in a batch; 0: 640 on a GPU, a few on a CPU.
    batch_s: float = 0.0
    #: Windows in a batch; 0: 64 on a GPU, 8 on a CPU: more gain nothing, and take memory.
    batch_windows: int = 0


class Worker(Group):
    #: Chunks in progress, so that some download while others are scored. More take more clips to a
    #: worker that can do none: three such try 384 of 800 before their run pauses.
    concurrency: int = 4
    #: Cores that the worker and its children keep to, such as 0-7 (Linux); unset: all.
    cores: Cores = ()
    #: Decoder processes; 0: one per core, as more would compete for cores.
    decoders: int = 0
    #: Processes that fetch and hand over clips; 0: one for each 4 decoders.
    loaders: int = 0
    #: Clips fetched at once, by all loaders together: 8 by each on 16 cores.
    clips_in_flight: int = 32
    #: Memory for decoded audio that waits for the model, of all loaders together.
    in_flight_bytes: ByteSize = ByteSize(512 * 1024**2)
    #: A clip that makes no progress for this long is given back.
    chunk_deadline_s: float = 600.0
    #: Port for /metrics, /ready and /health, and of `up` the first one; 0: none.
    metrics_port: int = 0
    #: No authentication: bind it to a private address.
    metrics_address: str = "127.0.0.1"
    #: Log one JSON object per line, for log collectors.
    log_json: bool = False
    #: A worker ends if chunks wait but none reaches it for this long.
    idle_s: float = 120.0
    #: A model that does not answer for this long hangs: the worker ends.
    silent_batcher_s: float = 120.0


class Flower(Group):
    #: USER:PASSWORD. Without it, Flower listens on this machine only.
    basic_auth: str | None = None


class Settings(BaseSettings):
    """All groups; `Settings()` reads the environment and `.env`, the environment first."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_file=(".env", SECRETS),
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,
    )

    #: Folder of the SQLite file and the embedded Valkey.
    data_dir: Path = Field(default_factory=lambda: user_data_path("earmark", appauthor=False))
    #: Password of `ui`. Without it, the page is for this machine only.
    ui_token: str | None = None
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

    @classmethod
    def misspelt(cls) -> list[str]:
        """Return a sentence for each variable that seems meant for a setting, and names none."""
        known: set[str] = set()
        for name, field in cls.model_fields.items():
            keys = getattr(field.annotation, "model_fields", None)
            known |= {f"{name}__{key}".upper() for key in keys} if keys else {name.upper()}
        given = set()
        for source in (EnvSettingsSource(cls), DotEnvSettingsSource(cls)):
            given |= {name.upper() for name in source.env_vars}
        unknown = {name.removeprefix(PREFIX) for name in given if name.startswith(PREFIX)} - known
        sentences = []
        for name in sorted(unknown):
            meant = did_you_mean(name, known, cutoff=ALIKE).replace("mean ", f"mean {PREFIX}")
            # Kubernetes names the address of a service called earmark EARMARK_PORT and so on.
            if meant or "__" in name:
                sentences.append(f"{PREFIX}{name} is no setting.{meant}")
        return sentences

    @classmethod
    def read(cls) -> Self:
        """Return the settings of the environment.

        Raises:
            ServiceError: one of them cannot be used; the sentence names it, and not its value.
        """
        try:
            return cls()
        except ValidationError as error:
            first = error.errors()[0]
            name = "EARMARK_" + "__".join(map(str, first["loc"][:2])).upper()
            reason = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                reason = "there is no such setting"
            raise ServiceError(reason=f"The setting {name} is wrong: {reason}.") from error
        except RuntimeError as error:
            raise ServiceError(
                reason="This user has no home folder: set EARMARK_DATA_DIR."
            ) from error

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
    """Return the URL of a SQLite file, with any character in its name."""
    return f"sqlite:///{quote(str(file))}"


def cores() -> int:
    """Return how many cores this process may use, by its CPU affinity and its container's quota."""
    bound = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        bound = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return bound
    if quota == "max":
        return bound
    return max(1, min(bound, int(quota) // int(period)))


def memory() -> int:
    """Return the bytes of memory of this machine, or of its container if that has a limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return machine
