"""`earmark doctor`: what is well is told, what is not comes with its cure and exit 3."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from db import schema
from db.session import connect, writing
from earmark import doctor, machine_speed
from earmark.core import broker
from earmark.core.errors import ServiceError
from earmark.core.settings import Database, Settings, cores
from tests.end_to_end.conftest import Earmark
from tests.servers import free_port, running_valkey

if TYPE_CHECKING:
    from pathlib import Path

    from tests.faults.nursery import Nursery
    from tests.servers import PgBouncer


def told(
    tmp_path: Path, nursery: Nursery, status: int, **settings: str
) -> dict[str, tuple[bool, str]]:
    """Run the verb with these settings; its lookups of names stay on this machine."""
    given = {f"EARMARK_{name}": value for name, value in settings.items()}
    earmark = Earmark(
        {"HF_ENDPOINT": "http://localhost", "HTTPS_PROXY": "http://proxy:3128", **given},
        tmp_path,
        nursery,
    )
    rows = json.loads(earmark("doctor", "--format", "json", status=status).stdout)
    return {row["check"]: (row["ok"], row["found"]) for row in rows}


def test_a_sound_machine_is_told_as_such(
    tmp_path: Path, postgres_url: str, nursery: Nursery
) -> None:
    with running_valkey(tmp_path) as url:
        found = told(
            tmp_path,
            nursery,
            0,
            BROKER__URL=url,
            DATABASE__URL=postgres_url,
            FETCH__FILE_ROOTS=str(tmp_path),
        )
    assert all(well for well, _ in found.values()), found
    assert "noeviction, no append-only file" in found["broker"][1]
    assert "ms a question" in found["database"][1]
    assert "HTTPS_PROXY" in found["proxy"][1]
    assert re.search(r"hears dog .*; a core decodes \d+ such clips/s$", found["model"][1])
    assert list(found) == [
        "settings",
        "broker",
        "database",
        "dns",
        "proxy",
        "model",
        "file roots",
        "disk",
    ]


def test_what_is_wrong_comes_with_its_cure(
    tmp_path: Path, empty_postgres_url: str, nursery: Nursery
) -> None:
    settings = {
        "DATABASE__URL": empty_postgres_url,
        "FETCH__FILE_ROOTS": "/nowhere",
        "MODEL__NAME": "./no-model",
    }
    with running_valkey(tmp_path, "--maxmemory-policy", "allkeys-lru") as url:
        found = told(tmp_path, nursery, 3, BROKER__URL=url, **settings)
    wrong = {name: sentence for name, (well, sentence) in found.items() if not well}
    assert "set maxmemory-policy to noeviction" in wrong.pop("broker")
    assert "run `earmark db upgrade`" in wrong.pop("database")
    assert "check the model's path" in wrong.pop("model")
    assert "/nowhere in EARMARK_FETCH__FILE_ROOTS" in wrong.pop("file roots")
    assert wrong == {}


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_pooler_in_front_of_the_database_is_told(
    tmp_path: Path, pooler: PgBouncer, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled = connect(pooler.url_of(engine.url.render_as_string()), Database())
    for opened, told in ((pooled, True), (engine, False)):
        monkeypatch.setattr(doctor, "connect_to", lambda _, opened=opened: opened)
        assert (
            "through a pooler: statements are not prepared"
            in doctor._database(settings_with(tmp_path))
        ) is told
    pooled.dispose()


def test_a_broker_elsewhere_beside_a_file_of_this_machine_is_told(tmp_path: Path) -> None:
    with running_valkey(tmp_path) as url:
        here = settings_with(tmp_path, broker={"url": url})
        assert "is not there yet" in doctor._database(here)
        elsewhere = settings_with(tmp_path, broker={"url": url.replace("127.0.0.1", "127.0.0.2")})
        with pytest.raises(ServiceError, match="set EARMARK_DATABASE__URL to the PostgreSQL"):
            doctor._database(elsewhere)


def settings_with(tmp_path: Path, **groups: Any) -> Settings:
    return Settings(data_dir=tmp_path).changed(**groups)


def test_servers_that_do_not_answer_are_sentences(tmp_path: Path) -> None:
    place = f"127.0.0.1:{free_port()}"
    settings = settings_with(
        tmp_path, broker={"url": f"redis://{place}/0"}, database={"url": f"postgresql://{place}/x"}
    )
    with pytest.raises(ServiceError, match="The broker does not answer"):
        doctor._broker(settings)
    with pytest.raises(ServiceError, match="Is it running"):
        doctor._database(settings)


def test_a_laptop_without_any_setting_is_well(tmp_path: Path) -> None:
    settings = settings_with(tmp_path)
    assert "`run` and `up` start" in doctor._broker(settings)
    assert "the first run makes it" in doctor._database(settings)
    assert "not needed" in doctor._file_roots(settings)
    assert "for this machine alone" in doctor._settings(settings)
    shared = settings_with(tmp_path, broker={"url": "redis://redis.internal"})
    assert "EARMARK_FETCH__FILE_ROOTS" in doctor._file_roots(shared)
    assert "for many machines" in doctor._settings(shared)


@pytest.mark.slow
def test_the_cores_that_a_gpu_wants_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []
    gpu: Any = SimpleNamespace(
        device="cuda:0",
        card=SimpleNamespace(window_s=10.24, sample_rate=16_000, min_samples=400),
        limits=SimpleNamespace(windows=64),
        choose=lambda lengths: list(range(len(lengths))),
        outcomes=lambda windows: scored.append(len(windows)),
    )
    monkeypatch.setattr(machine_speed, "decoding_ms", lambda _: 1.7)
    told = doctor._feeding(gpu, Settings())
    assert "a core decodes 118 such clips/s, and the device scores " in told
    assert told.endswith(f"cores of {cores()}")
    assert scored == [64] * (1 + machine_speed.BATCHES)
    assert machine_speed.cores_wanted(1340, 8.5) == 14


def test_an_old_redis_and_a_full_disk_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "check", lambda: None)
    monkeypatch.setattr(broker, "server_info", lambda: {"redis_version": "5.0.14"})
    with pytest.raises(ServiceError, match="is too old"):
        doctor._broker(settings_with(tmp_path, broker={"url": "redis://localhost"}))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 10**10, 10**6))
    with pytest.raises(ServiceError, match=r"has 976.6KiB free: give it 1.0GiB"):
        doctor._disk(settings_with(tmp_path))


def test_a_machine_that_resolves_no_names_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://no.such.host.invalid")
    monkeypatch.setattr(
        "socket.getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(OSError("no name"))
    )
    with pytest.raises(ServiceError, match=r"no\.such\.host\.invalid cannot be resolved"):
        doctor._dns(settings_with(tmp_path, broker={"url": "redis://redis.internal"}))
    assert "Files and models on this machine need no names" in doctor._dns(settings_with(tmp_path))


def test_a_file_of_an_earlier_version_is_well_on_one_machine(tmp_path: Path) -> None:
    settings = settings_with(tmp_path)
    engine = connect(settings.database_url, Database())
    schema.upgrade(engine)
    with writing(engine) as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'v0_1_0'"))
    engine.dispose()
    assert "the next run upgrades it" in doctor._database(settings)


def test_a_variable_that_is_no_setting_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EARMARK_FETCHES__ROBOTS", "true")
    with pytest.raises(ServiceError, match="EARMARK_FETCHES__ROBOTS is no setting"):
        doctor._settings(settings_with(tmp_path))
