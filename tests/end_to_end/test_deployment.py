"""docker-compose.yml: what its services promise, and its very commands, run as local processes."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from console.demo import EXAMPLES
from tests.end_to_end.conftest import Earmark, wait_until
from tests.end_to_end.test_cluster import answers
from tests.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("migrate", "worker", "worker-gpu", "flower", "producer")


@pytest.mark.parametrize("name", OURS)
def test_our_services_run_with_the_least_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", ["redis", "postgres", "worker", "worker-gpu", "flower"])
def test_what_must_live_is_started_again(name: str) -> None:
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_the_stores_keep_what_they_are_given_and_are_not_published() -> None:
    assert " ".join(SERVICES["redis"]["command"]).endswith("--appendonly yes --maxmemory-policy noeviction")
    for name, folder in (("redis", "/data"), ("postgres", "/var/lib/postgresql/data")):
        assert "ports" not in SERVICES[name]
        assert SERVICES[name]["healthcheck"]["test"]
        assert SERVICES[name]["volumes"] == [f"{name}:{folder}"]


def test_workers_wait_for_the_schema_and_have_time_to_stop() -> None:
    for name in ("worker", "worker-gpu"):
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
        assert SERVICES[name]["stop_grace_period"] == "60s"
        assert SERVICES[name]["environment"]["EARMARK_WORKER__HEALTH_FILE"] in SERVICES[name]["healthcheck"]["test"][1]
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"]


def test_a_worker_under_systemd_is_started_again_and_has_time_to_stop() -> None:
    unit = ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "deploy/systemd/earmark-worker@.service")
    service = unit["Service"]
    assert service["ExecStart"].split()[1:] == ["worker"]
    assert (service["Restart"], unit["Unit"]["StartLimitIntervalSec"]) == ("always", "0")
    assert (service["KillMode"], service["TimeoutStopSec"]) == ("mixed", "60")
    assert service["NoNewPrivileges"] == "yes"


def test_the_commands_of_the_file_bring_the_stack_up_and_do_a_list(
    tmp_path: Path, valkey_url: str, empty_postgres_url: str, serve: Callable[..., str]
) -> None:
    base = serve(EXAMPLES)
    here = {
        "EARMARK_BROKER__URL": valkey_url,
        "EARMARK_DATABASE__URL": empty_postgres_url,
        "FLOWER_BASIC_AUTH": "someone:secret",
        "EARMARK_WORKER__HEALTH_FILE": str(tmp_path / "alive"),
        "EARMARK_FETCH__ALLOW_NETWORKS": "127.0.0.1/32",
        "EARMARK_FETCH__PORTS": base.rpartition(":")[2],
    }
    assert set(SERVICES["flower"]["environment"]) == {*list(here)[:3]}
    stack, port = Earmark(here, tmp_path), free_port()
    try:
        stack(*SERVICES["migrate"]["command"])
        stack.start("console.cli", *SERVICES["worker"]["command"])
        flower = [word.replace("0.0.0.0", "127.0.0.1") for word in SERVICES["flower"]["command"]]
        stack.start("console.cli", *flower, "--port", str(port))
        wait_until((tmp_path / "alive").exists, 60)
        shown = stack("submit", f"{base}/dog.ogg", f"{base}/siren.wav", "--watch", "--strict")
        assert "2 done" in shown.stderr
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/healthcheck"), 30)
        assert not answers(f"http://127.0.0.1:{port}/api/workers")
    finally:
        stack.end()
