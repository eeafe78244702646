"""Every setting, with its default and the reason; read from EARMARK_* variables and `.env`."""

from __future__ import annotations

import json
import os
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Self
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

Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], BeforeValidator(_split)]
Ports = Annotated[tuple[int, ...], BeforeValidator(_split)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Cores = Annotated[tuple[int, ...], BeforeValidator(_core_numbers)]
Folders = Annotated[tuple[Path, ...], BeforeValidator(_split)]
HostHeaders = Annotated[
    dict[str, dict[str, str]],
    BeforeValidator(credentials.by_host),
    AfterValidator(credentials.check_headers),
]
HostTokens = Annotated[
    dict[str, str],
    BeforeValidator(credentials.by_host),
    AfterValidator(credentials.check_tokens),
]
HostLogins = Annotated[
    dict[str, str],
    BeforeValidator(credentials.by_host),
    AfterValidator(credentials.check_logins),
]


class Group(BaseModel):
    """A group of settings, passed as a whole to the code that uses it."""

    # The input may hold a password.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Broker(Group):
    url: Annotated[str | None, AfterValidator(_broker_url)] = Field(
        None, description="Redis or Valkey URL; unset: the embedded Valkey of `run` and `up`."
    )
    queue: str | None = Field(
        None,
        description="Name of the queue; unset: the ledger's own. So ledgers can share a Redis.",
    )
    high_water: int = Field(
        64,
        description="Chunks kept in Redis: 1,000 clips ahead of the workers, 4,000 with GPUs; at"
        " most 2 MB of memory.",
    )
    pool_limit: int = Field(
        16, description="Connections to Redis: Flower inspects workers in parallel and needs 10."
    )
    visibility_timeout_s: int = Field(
        7200,
        description="Time until Redis repeats a chunk: long, as leases recover lost clips sooner.",
    )
    connect_timeout_s: float = Field(
        5.0, description="Time to reach Redis: on the same network, milliseconds are enough."
    )


class Database(Group):
    url: str | None = Field(
        None, description="SQLAlchemy URL; unset: a SQLite file in the user data folder."
    )
    busy_timeout_s: float = Field(
        30.0, description="Time that one SQLite writer waits for another."
    )
    connect_timeout_s: int = Field(
        10, description="Time to reach PostgreSQL: it accepts within this, even when busy."
    )
    pool_size: int = Field(
        12, description="Connections: each chunk, the lease renewal and the feeder use one."
    )


class Ledger(Group):
    lease_s: float = Field(
        60.0, description="A dead worker's clips are taken back after this; renewed at a third."
    )
    max_attempts: int = Field(
        3, description="Tries per clip: a third catches most passing faults; more load the host."
    )
    retry_base_s: float = Field(
        5.0, description="First pause (backoff) after a transient failure; it doubles each time."
    )
    retry_cap_s: float = Field(900.0, description="Longest pause, also for a server's Retry-After.")
    feed_every_s: float = Field(
        0.5,
        description="Time between the feeder's looks at the queue, which holds seconds of work.",
    )
    queue_lease_s: float = Field(
        600.0, description="A queued clip that no worker claims within this is sent again."
    )
    lost_after_s: float = Field(
        10.0, description="Queued clips older than this are sent again if the queue is empty."
    )
    settle_s: float = Field(
        5.0, description="After a database outage, workers have this long to renew their leases."
    )
    outage_s: float = Field(
        60.0, description="Results wait this long for a database that is out of reach."
    )


class Fetch(Group):
    max_bytes: ByteSize = Field(
        ByteSize(1024**3),
        description="Largest download; an hour of 48 kHz WAV is 345 MB. Local files have no limit.",
    )
    max_container_bytes: ByteSize = Field(
        ByteSize(8 * 1024**3),
        description="Largest container that has to be unpacked as a whole; a worker keeps two.",
    )
    timeout_s: float = Field(60.0, description="Time for a whole download: 60 MB at 1 MB/s.")
    connect_timeout_s: float = Field(
        10.0, description="Time to connect: enough after two lost SYN packets."
    )
    max_redirects: int = Field(5, description="Redirects followed: storage hosts need one or two.")
    max_url_chars: int = Field(4096, description="Longest URL: signed storage URLs reach 2,000.")
    allow_networks: Annotated[Networks, NoDecode] = Field(
        (), description="Networks (CIDR) that may be dialled although they are not public."
    )
    deny_networks: Annotated[Networks, NoDecode] = Field(
        (), description="Networks (CIDR) that are never dialled, such as your own ranges."
    )
    ports: Annotated[Ports, NoDecode] = Field(
        (80, 443), description="Ports that may be dialled: others are mostly internal services."
    )
    host_rate: float = Field(
        0.0, description="Requests a second to one host, all workers together; 0: no limit."
    )
    host_concurrency: int = Field(
        8, description="Connections of one worker to one host, as browsers have."
    )
    host_slots: int = Field(
        0, description="Downloads from one host at once, all workers together; 0: no limit."
    )
    stores: Annotated[Names, NoDecode] = Field(
        (), description="Object stores to read, such as s3,gs,hf; unset: none."
    )
    robots: bool = Field(
        False, description="Obey robots.txt. Off, because a list is no crawl: its clips are chosen."
    )
    file_roots: Annotated[Folders, NoDecode] = Field(
        (), description="Folders a worker may read; unset: none."
    )
    headers: Annotated[HostHeaders, NoDecode] = Field(
        {},
        repr=False,
        description="Headers by host, as JSON; a host means https unless it begins with http://.",
    )
    tokens: Annotated[HostTokens, NoDecode] = Field(
        {}, repr=False, description="Bearer tokens by host, as JSON."
    )
    basic_auth: Annotated[HostLogins, NoDecode] = Field(
        {}, repr=False, description="USER:PASSWORD by host, as JSON."
    )
    proxy: Annotated[str | None, AfterValidator(credentials.check_proxy)] = Field(
        None,
        repr=False,
        description="HTTP proxy for clips, as http://HOST:PORT; it must allow CONNECT.",
    )
    proxy_resolves: bool = Field(
        False,
        description="The proxy resolves names, and must itself refuse private addresses.",
    )
    contact: str = Field(
        "", description="An address or URL for site owners, sent in the User-Agent."
    )


class Audio(Group):
    max_duration_s: float = Field(
        90_000.0, description="Longest clip: a day's recording; the longest day has 25 hours."
    )
    min_duration_s: float = Field(
        0.05, description="Shortest clip: models hear nothing in a shorter click."
    )
    max_samples: int = Field(
        20_000_000_000, description="Samples of all channels: a day of 96 kHz stereo."
    )
    max_windows: int = Field(
        100_000, description="Windows of a clip: eleven days side by side, a day 0.9 s apart."
    )
    max_channels: int = Field(
        32, description="Channels: the widest microphone arrays in public data."
    )
    min_sample_rate: int = Field(
        100, description="Seismic and infrasound recorders go down to this."
    )
    max_sample_rate: int = Field(
        1_000_000, description="Bat detectors reach 576 kHz; a higher rate is a false header."
    )
    decode_timeout_s: float = Field(
        60.0,
        description="A decoder ends if it gives nothing for this long; half an hour of Opus takes"
        " 30 s on a slow core.",
    )
    decode_memory: ByteSize = Field(
        ByteSize(2 * 1024**3),
        description="Address space of a decoder: several times what any real file takes.",
    )
    clips_per_decoder: int = Field(
        2000, description="A decoder process is replaced after this, so that leaks stay small."
    )


class Model(Group):
    name: str = Field(
        "starter",
        description="Model that a worker loads at its start: a hub id, a folder or `starter`.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    device: str = Field(
        "auto", description="auto, cpu, cuda, cuda:1 or mps; auto takes the best one available."
    )
    dtype: str = Field(
        "auto",
        description="auto, float32, bfloat16 or float16; auto: bfloat16 on CUDA that supports it.",
    )
    keep: int = Field(
        1, description="Models kept loaded: one fits every device; more serve mixed runs."
    )
    threads: int = Field(
        0, description="Windows scored at once on a CPU, one per core; 0: all cores."
    )
    batch_s: float = Field(
        0.0, description="Padded seconds of audio in a batch; 0: 640 on a GPU, a few on a CPU."
    )
    batch_windows: int = Field(
        0, description="Windows in a batch; 0: 64 on a GPU, 16 on a CPU: more gain nothing."
    )


class Worker(Group):
    concurrency: int = Field(
        8, description="Chunks in progress, so that one downloads while another is scored."
    )
    cores: Annotated[Cores, NoDecode] = Field(
        (),
        description="Cores that the worker and its children keep to, such as 0-7 (Linux); unset:"
        " all.",
    )
    decoders: int = Field(
        0, description="Decoder processes; 0: one per core, as more would compete for cores."
    )
    loaders: int = Field(
        0, description="Processes that fetch and hand over clips; 0: one for each 4 decoders."
    )
    clips_in_flight: int = Field(
        32, description="Clips fetched at once, by all loaders together: 8 by each on 16 cores."
    )
    in_flight_bytes: ByteSize = Field(
        ByteSize(512 * 1024**2),
        description="Memory for decoded audio that waits for the model, of all loaders together.",
    )
    chunk_deadline_s: float = Field(
        600.0, description="A clip that makes no progress for this long is given back."
    )
    metrics_port: int = Field(
        0,
        description="Port for /metrics, /ready and /health, and of `up` the first one; 0: none.",
    )
    metrics_address: str = Field(
        "127.0.0.1", description="No authentication: bind it to a private address."
    )
    log_json: bool = Field(False, description="Log one JSON object per line, for log collectors.")
    idle_s: float = Field(
        120.0, description="A worker ends if chunks wait but none reaches it for this long."
    )
    silent_batcher_s: float = Field(
        120.0, description="A model that does not answer for this long hangs: the worker ends."
    )


class Flower(Group):
    basic_auth: str | None = Field(
        None, description="USER:PASSWORD. Without it, Flower listens on this machine only."
    )


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

    data_dir: Path = Field(
        default_factory=lambda: user_data_path("earmark", appauthor=False),
        description="Folder of the SQLite file and the embedded Valkey.",
    )
    ui_token: str | None = Field(
        None, description="Password of `ui`. Without it, the page is for this machine only."
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

    @classmethod
    def misspelt(cls) -> list[str]:
        """Return a sentence for each variable that seems meant for a setting, and names none."""
        known = {"UI_TOKEN"}  # Only `ui` reads it.
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
            name = "EARMARK_" + "__".join(str(part) for part in first["loc"][:2]).upper()
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
