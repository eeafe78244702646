"""docs/guides/many_machines.md: each block runs, with Redis and PostgreSQL over TLS."""

from __future__ import annotations

import re
import shlex
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
import trustme

from earmark.demo import EXAMPLES
from tests.end_to_end.conftest import Earmark, wait_until
from tests.servers import answers, behind_tls, free_port, port_of, running_valkey, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.faults.nursery import Nursery

PAGE = Path(__file__).parents[2] / "docs/guides/many_machines.md"


def blocks(language: str) -> list[str]:
    """Return the lines of the page's blocks in this language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return [line for block in found for line in block.splitlines()]


@pytest.fixture
def data(tmp_path: Path, postgres: str, nursery: Nursery) -> Iterator[Earmark]:
    """The machine `data`, set up as the page says, and the environment of every other machine."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    (tmp_path / "redis.conf").write_text("\n".join(blocks("redis")))
    with ExitStack() as stack:
        stack.enter_context(administered(postgres))
        valkey = stack.enter_context(running_valkey(tmp_path, str(tmp_path / "redis.conf")))
        here = {
            "/etc/earmark": str(tmp_path),
            "data:6379": stack.enter_context(behind_tls(port_of(valkey), authority)),
            "data:5432": stack.enter_context(
                behind_tls(port_of(postgres), authority, asked_first=True)
            ),
        }
        said = re.sub(
            "/etc/earmark|data:[0-9]+", lambda found: here[found[0]], "\n".join(blocks("env"))
        )
        settings = dict(line.split("=", 1) for line in said.splitlines())
        # The page's machines can look up names of the internet.
        everywhere = Earmark({**settings, "HF_ENDPOINT": "http://localhost"}, tmp_path, nursery)
        try:
            yield everywhere
        finally:
            everywhere.end()


@contextmanager
def administered(postgres: str) -> Iterator[None]:
    with psycopg.connect(postgres, autocommit=True) as administrator:
        for statement in blocks("sql"):
            administrator.execute(statement)  # type: ignore[call-overload]
        yield
        administrator.execute("DROP DATABASE earmark WITH (FORCE)")
        administrator.execute("DROP ROLE earmark")


def test_every_block_of_the_page_works(data: Earmark) -> None:
    commands = [shlex.split(line)[1:] for line in blocks("sh")]
    assert [words[0] for words in commands] == [
        *("db", "doctor", "worker", "submit", "status", "results", "query", "flower")
    ]
    metrics, port = free_port(), free_port()
    data.settings["EARMARK_WORKER__METRICS_PORT"] = str(metrics)
    with serving(EXAMPLES) as base:
        data.settings |= {
            "EARMARK_FETCH__PORTS": base.rpartition(":")[2],
            "EARMARK_FETCH__ALLOW_NETWORKS": "127.0.0.0/8",
        }
        (data.folder / "list.txt").write_text(f"{base}/dog.ogg\n{base}/siren.wav\n")
        said = {}
        for words in commands:
            if words == ["worker"]:
                data.start("earmark", *words)
                wait_until(lambda: answers(f"http://127.0.0.1:{metrics}/ready"))
            elif words == ["flower"]:
                data.start("earmark", *words, "--port", str(port))
            else:
                said[words[0]] = data(*words)
        wait_until(lambda: bool(answers(f"http://127.0.0.1:{port}/api/workers")))
    assert "2 done" in said["submit"].stderr
    assert "2 done" in said["status"].stderr + said["status"].stdout
    assert {"dog", "siren"} <= set(re.split(r"\W", (data.folder / "march.csv").read_text()))
    assert "siren" in said["query"].stdout


def test_a_certificate_of_another_authority_is_refused(data: Earmark) -> None:
    right = dict(data.settings)
    data("db", "upgrade")
    sentences = {
        "EARMARK_DATABASE__URL": "certificate verify failed",
        "EARMARK_BROKER__URL": "The certificate of Redis is not trusted",
    }
    for name, sentence in sentences.items():
        data.settings = {**right, name: right[name].replace("ca.pem", "other.pem")}
        refused = data("submit", str(EXAMPLES / "dog.ogg"), status=3)
        assert sentence in refused.stderr
