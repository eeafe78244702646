"""docker-compose.yml: its services' settings, and its commands run as local processes."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
import urllib.request
from configparser import ConfigParser
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import redis
import yaml

from earmark.demo import EXAMPLES
from tests.end_to_end.conftest import Earmark, get_json, wait_until
from tests.servers import answers, free_port, running_valkey

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.nursery import Nursery

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("migrate", "worker", "worker-gpu", "worker-gpu-1", "flower", "ui", "producer")
AUDIO = "${AUDIO:-./audio}:/audio:ro"
WORKERS = OURS[1:4]
STORES = ("redis", "postgres")


def test_the_compose_file_is_valid() -> None:
    schema = (
        files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text()
    )
    jsonschema.validate(COMPOSE, json.loads(schema))


@pytest.mark.parametrize("name", OURS)
def test_earmark_services_run_with_least_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["secrets"] == ["earmark.env"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", STORES)
def test_redis_and_postgresql_are_persistent_and_private(name: str) -> None:
    service = SERVICES[name]
    assert "ports" not in service
    assert service["networks"] == ["stores"]
    assert service["cap_drop"] == ["ALL"]
    assert service["healthcheck"]["test"]
    assert service["volumes"] == [
        f"{name}:{'/data' if name == 'redis' else '/var/lib/postgresql/data'}"
    ]
    assert COMPOSE["networks"]["stores"] == {"internal": True}


def test_the_compose_file_holds_no_password() -> None:
    assert "assword" not in re.sub(
        "(/run/secrets/|FILE: |secrets: .|  |/)(postgres_)?password|_PASSWORD_FILE", "", TEXT
    )
    mounted = {secret["file"].rpartition("/")[2] for secret in COMPOSE["secrets"].values()}
    assert mounted == set(COMPOSE["secrets"]) == {"earmark.env", "valkey.conf", "postgres_password"}


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_memory_and_process_limits(name: str) -> None:
    assert {"memory", "pids"} <= set(SERVICES[name]["deploy"]["resources"]["limits"])


@pytest.mark.parametrize("name", [*STORES, *WORKERS, "flower", "ui"])
def test_long_running_services_have_restarts_and_health_checks(name: str) -> None:
    assert SERVICES[name]["restart"] == "unless-stopped"
    # A worker's health check is in its image.
    assert "disable" not in SERVICES[name]["healthcheck"]


@pytest.mark.parametrize("name", WORKERS)
def test_workers_wait_for_the_migration_and_have_time_to_drain(name: str) -> None:
    assert SERVICES[name]["depends_on"]["migrate"] == {
        "condition": "service_completed_successfully"
    }
    assert SERVICES[name]["stop_grace_period"] == "60s"
    assert SERVICES[name]["volumes"] == ["models:/models", AUDIO]


@pytest.mark.parametrize("name", [*WORKERS, "ui", "producer"])
def test_a_folder_of_audio_is_mounted_wherever_it_is_read(name: str) -> None:
    assert AUDIO in SERVICES[name]["volumes"]
    if name != "producer":
        assert SERVICES[name]["environment"]["EARMARK_FETCH__FILE_ROOTS"] == "/audio"


@pytest.mark.parametrize("name", SERVICES)
def test_logs_are_rotated_and_images_of_others_pinned_by_digest(name: str) -> None:
    assert SERVICES[name]["logging"]["options"]["max-size"]
    image = SERVICES[name]["image"]
    assert image.startswith("earmark") or re.search("@sha256:[0-9a-f]{64}$", image)


def test_each_gpu_worker_has_a_gpu_of_its_own() -> None:
    assert all(
        "profiles" not in SERVICES[name] for name in ("worker", "flower", "migrate", *STORES)
    )
    assert [SERVICES[name]["profiles"] for name in WORKERS[1:]] == [["gpu", "gpus"], ["gpus"]]
    reserved = [
        SERVICES[name]["deploy"]["resources"]["reservations"]["devices"][0] for name in WORKERS[1:]
    ]
    assert [device["device_ids"] for device in reserved] == [["0"], ["1"]]
    assert all(
        SERVICES[name]["build"]["args"]["TORCH_INDEX"].endswith("/cu128") for name in WORKERS[1:]
    )


def test_the_image_is_small_and_runs_as_an_ordinary_user() -> None:
    build, final = (ROOT / "Dockerfile").read_text().split("\nFROM ")[-2:]
    assert "ARG TORCH_INDEX" in build
    assert "$(grep '^torch==' constraints.txt)" in build
    assert "COPY --from=build /venv /venv" in final
    assert {"USER 10001", "VOLUME /models", 'ENTRYPOINT ["earmark"]'} <= set(final.splitlines())
    assert re.search(r"HF_HOME=/models .*METRICS_PORT=9100", final)
    # The root is read-only.
    assert re.search(r"NUMBA_CACHE_DIR=/tmp/.* MPLCONFIGDIR=/tmp/", final)
    assert re.search(r"HEALTHCHECK [^\n]*\\\n.*127.0.0.1:9100/ready", final)


def test_systemd_restarts_a_worker_and_gives_it_time_to_drain() -> None:
    unit = ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "deploy/systemd/earmark-worker@.service")
    service = unit["Service"]
    command = service["ExecStart"].replace("%i", "12").replace("$$", "$")
    assert "exec /opt/earmark/bin/earmark worker --log-json" in command
    # The thirteenth worker of a machine has a port of its own as well.
    shown = shlex.split(command.replace("/opt/earmark/bin/earmark worker --log-json", "env"))
    environment = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
    assert "EARMARK_WORKER__METRICS_PORT=9112\n" in environment
    assert (service["Restart"], unit["Unit"]["StartLimitIntervalSec"]) == ("always", "0")
    assert (service["KillMode"], service["TimeoutStopSec"]) == ("mixed", "60")
    assert (service["NoNewPrivileges"], service["CapabilityBoundingSet"]) == ("yes", "")


def test_a_slurm_job_restarts_its_worker_except_after_exit_0_and_3(
    tmp_path: Path,
) -> None:
    ask, end = 'echo "$EARMARK_BROKER__URL $@" >> asked', "exit $(sed -n $(wc -l < asked)p ends)"
    for name, line in {"srun": f"cd {tmp_path}; {ask}; {end}", "sleep": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "worker.env").write_text("EARMARK_BROKER__URL=redis://here\n")
    here = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "EARMARK_ENV": str(tmp_path / "worker.env"),
    }
    for ends, status in (("70\n137\n0\n", 0), ("70\n3\n", 3)):
        (tmp_path / "asked").unlink(missing_ok=True)
        (tmp_path / "ends").write_text(ends)
        assert (
            subprocess.run(["sh", ROOT / "deploy/slurm/workers.sh"], env=here).returncode == status
        )
        asked = (tmp_path / "asked").read_text().splitlines()
        assert asked == ["redis://here earmark worker --log-json"] * len(ends.split())


def test_the_commands_of_the_compose_file_finish_a_list(
    tmp_path: Path, empty_postgres_url: str, serve: Callable[..., str], nursery: Nursery
) -> None:
    base = serve(EXAMPLES)
    subprocess.run(
        ["sh", ROOT / "deploy/secrets.sh", tmp_path / "secrets"], check=True, capture_output=True
    )
    secrets = dict(
        line.split("=", 1) for line in (tmp_path / "secrets/earmark.env").read_text().splitlines()
    )
    words = SERVICES["redis"]["command"]
    assert words[:2] == ["valkey-server", "/run/secrets/valkey.conf"]
    port, metrics_port = free_port(), free_port()
    with running_valkey(tmp_path, str(tmp_path / "secrets/valkey.conf"), *words[2:]) as url:
        here = {
            **secrets,
            "EARMARK_BROKER__URL": secrets["EARMARK_BROKER__URL"].replace(
                "redis:6379/0", url.rpartition("//")[2]
            ),
            "EARMARK_DATABASE__URL": empty_postgres_url,
            "EARMARK_FETCH__ALLOW_NETWORKS": "127.0.0.1/32",
            "EARMARK_FETCH__PORTS": base.rpartition(":")[2],
            "EARMARK_WORKER__METRICS_PORT": str(metrics_port),
        }
        stack = Earmark(here, tmp_path, nursery)
        # Flower asks a worker nothing from a forked process.
        (tmp_path / "flower").mkdir()
        watching = Earmark(here, tmp_path / "flower")
        try:
            stack(*SERVICES["migrate"]["command"])
            stack.start("earmark", *SERVICES["worker"]["command"])
            flower = [
                word.replace("0.0.0.0", "127.0.0.1") for word in SERVICES["flower"]["command"]
            ]
            watching.start(
                "earmark", *flower, "--port", str(port), "--keep", str(tmp_path / "seen")
            )
            wait_until(lambda: answers(f"http://127.0.0.1:{metrics_port}/ready"))
            shown = stack("submit", f"{base}/dog.ogg", f"{base}/siren.wav", "--watch", "--strict")
            assert "2 done" in shown.stderr
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/healthcheck"))
            assert not answers(f"http://127.0.0.1:{port}/api/workers")
            known = base64.b64encode(secrets["EARMARK_FLOWER__BASIC_AUTH"].encode()).decode()
            asked = urllib.request.Request(
                f"http://127.0.0.1:{port}/api/workers?refresh=1",
                headers={"Authorization": f"Basic {known}"},
            )
            # On a busy machine a worker does not answer the first time.
            wait_until(lambda: len(get_json(asked)) == 1)
            keys = {
                key.partition(b":")[0]
                for key in redis.Redis.from_url(here["EARMARK_BROKER__URL"]).scan_iter()
            }
            assert keys == {b"earmark"}
        finally:
            watching.end()
            stack.end()
    password = urlsplit(here["EARMARK_BROKER__URL"]).password
    assert password
    assert list(tmp_path.glob("seen*")), "Flower has kept what it saw"
    assert all(password not in log.read_text() for log in tmp_path.rglob("*.log"))


def test_the_redis_user_can_neither_administer_the_server_nor_read_other_keys(
    tmp_path: Path,
) -> None:
    subprocess.run(
        ["sh", ROOT / "deploy/secrets.sh", tmp_path / "secrets"], check=True, capture_output=True
    )
    (broker, *_) = (tmp_path / "secrets/earmark.env").read_text().splitlines()
    with running_valkey(tmp_path, str(tmp_path / "secrets/valkey.conf")) as url:
        user = redis.Redis.from_url(
            broker.partition("=")[2].replace("redis:6379/0", url.rpartition("//")[2])
        )
        assert user.set("earmark:key", 1)
        for refused in (
            ["FLUSHALL"],
            ["CONFIG", "GET", "*"],
            ["SET", "other", "1"],
            ["KEYS", "*"],
            ["SHUTDOWN"],
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                user.execute_command(*refused)
        with pytest.raises(redis.exceptions.AuthenticationError):
            redis.Redis.from_url(url).get("earmark:key")
