"""Each reason why a Redis cannot be used has its sentence, with the cure and without a password."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import redis
import trustme
from flower.utils.broker import Broker as FlowerBroker

from earmark import doctor
from earmark.core import broker
from earmark.core.errors import ServiceError
from earmark.core.settings import Broker, Settings
from tests.servers import behind_tls, free_port, port_of, running_valkey
from workers import app as worker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = "on >seCret ~earmark:* +@all -@admin -@dangerous"
ACL = f"""
user default off
user earmark {RULES} &* +info
user silent {RULES} &*
user narrow {RULES} &earmark:* +info
user reader on >seCret ~earmark:* &* +@read
"""


def refusal(url: str) -> str:
    """Return why a broker cannot be used."""
    broker.configure(Broker(url=url))
    with pytest.raises(ServiceError) as refused:
        broker.check()
    assert "seCret" not in str(refused.value)
    return str(refused.value)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a Valkey with users."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "valkey.conf").write_text(ACL)
    with running_valkey(folder, str(folder / "valkey.conf")) as url:
        yield url.partition("//")[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URL of a Valkey in cluster mode that has every slot."""
    with running_valkey(tmp_path_factory.mktemp("cluster"), "--cluster-enabled", "yes") as url:
        redis.Redis.from_url(url).execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        yield url


@pytest.mark.parametrize(
    ("user", "cure"),
    [
        ("", "wants a password: set EARMARK_BROKER__URL"),
        ("earmark:wrong@", "correct them in EARMARK_BROKER__URL"),
        ("nobody:seCret@", "correct them in EARMARK_BROKER__URL"),
        ("narrow:seCret@", "&* allows all channels"),
        ("reader:seCret@", "Give it the rules of docs/guides/operators.md"),
    ],
)
def test_a_missing_redis_right_is_named(guarded: str, user: str, cure: str) -> None:
    assert cure in refusal(f"redis://{user}{guarded}")


def test_a_user_without_info_can_work(guarded: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, broker=Broker(url=f"redis://silent:seCret@{guarded}"))
    assert doctor._broker(settings).startswith(
        "Redis of unknown version, as its user may not run INFO; 0 chunks"
    )


def test_a_redis_cluster_is_refused_by_name(cluster: str) -> None:
    assert "is a cluster, which Celery cannot use" in refusal(cluster)


def test_a_worker_exits_if_its_broker_can_never_work(cluster: str, guarded: str) -> None:
    for url in (cluster, f"redis://narrow:seCret@{guarded}"):
        broker.configure(Broker(url=url))
        with pytest.raises(ServiceError):
            worker._check_broker()


def test_a_worker_keeps_trying_after_a_wrong_password(
    guarded: str, caplog: pytest.LogCaptureFixture
) -> None:
    broker.configure(Broker(url=f"redis://earmark:wrong@{guarded}"))
    worker._check_broker()
    (line,) = caplog.messages
    assert "correct them in EARMARK_BROKER__URL" in line
    assert line.endswith("The worker tries again until it can.")


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ("", "set ssl_ca_certs in EARMARK_BROKER__URL"),
        ("?ssl_ca_certs={folder}/ca.pem", "set ssl_certfile and ssl_keyfile"),
        (
            "?ssl_ca_certs={folder}/none.pem",
            "A certificate file named in EARMARK_BROKER__URL cannot be read",
        ),
    ],
)
def test_a_failed_tls_connection_names_its_cure(tmp_path: Path, options: str, cure: str) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with (
        running_valkey(tmp_path) as url,
        behind_tls(port_of(url), authority, client_wanted=True) as address,
    ):
        assert cure in refusal(f"rediss://:seCret@{address}/0{options.format(folder=tmp_path)}")


def test_flowers_broker_page_trusts_a_private_authority(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with running_valkey(tmp_path) as url, behind_tls(port_of(url), authority) as address:
        app = broker.configure(Broker(url=f"rediss://{address}/0?ssl_ca_certs={tmp_path}/ca.pem"))
        broker.client().lpush("earmark:clips", "a chunk")
        options = {
            "broker_options": app.conf.broker_transport_options,
            "broker_use_ssl": app.conf.broker_use_ssl,
        }
        page = FlowerBroker(f"rediss://{address}/0", **options)
        # In a thread of its own: a browser's tests leave an event loop in this one.
        with ThreadPoolExecutor(1) as thread:
            queues = thread.submit(asyncio.run, page.queues(["clips"])).result()
        assert queues == [{"name": "clips", "messages": 1}]


def test_plain_text_to_a_tls_port_suggests_rediss(tmp_path: Path) -> None:
    with running_valkey(tmp_path) as url, behind_tls(port_of(url), trustme.CA()) as address:
        assert "rediss://" in refusal(f"redis://{address}/0")


@pytest.mark.parametrize(
    ("options", "database", "cure"),
    [
        (
            ["--replicaof", "127.0.0.1", "1"],
            0,
            "read-only replica: set EARMARK_BROKER__URL to its primary",
        ),
        ([], 99, "has no database of that number"),
    ],
)
def test_a_replica_or_a_missing_database_number_is_named(
    tmp_path: Path, options: list[str], database: int, cure: str
) -> None:
    with running_valkey(tmp_path, *options) as url:
        broker.configure(Broker(url=url.replace("/0", f"/{database}")))
        with pytest.raises(ServiceError, match=cure):
            broker.mark_queue("a ledger")


def test_an_unreachable_redis_is_to_be_started() -> None:
    assert "Start Redis" in refusal(f"redis://:seCret@127.0.0.1:{free_port()}/0")
