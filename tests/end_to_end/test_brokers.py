"""Brokers that Earmark cannot use: one sentence for each, with a real server."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from earmark.demo import EXAMPLES
from tests.end_to_end.conftest import TIMEOUT_S
from tests.servers import running_valkey, upgraded

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Earmark


def test_submit_refuses_an_unusable_broker_url_before_it_writes(earmark: Earmark) -> None:
    earmark.settings["EARMARK_BROKER__URL"] = "amqp://guest:seCret@localhost"
    refused = earmark("submit", str(EXAMPLES / "dog.ogg"), status=3).stderr
    assert refused.startswith(
        "earmark: The setting EARMARK_BROKER__URL is wrong: the queue needs Redis or Valkey"
    )
    assert "seCret" not in refused
    assert not (earmark.folder / "data").exists()


def test_celery_itself_shows_a_wrong_setting_in_one_sentence(earmark: Earmark) -> None:
    earmark.settings["EARMARK_BROKER__URL"] = "amqp://guest:seCret@localhost"
    worker = earmark.start("celery", "-A", "workers.app", "worker")
    assert worker.wait(TIMEOUT_S) == 3
    refused = (earmark.folder / "celery-0.log").read_text()
    assert refused.startswith("The setting EARMARK_BROKER__URL is wrong: the queue needs Redis")
    assert refused.count("\n") == 1
    assert "seCret" not in refused


def test_submit_and_worker_refuse_a_redis_cluster(earmark: Earmark) -> None:
    with running_valkey(earmark.folder, "--cluster-enabled", "yes") as url:
        earmark.settings["EARMARK_BROKER__URL"] = url
        for words in (["submit", str(EXAMPLES / "dog.ogg")], ["worker"]):
            assert "This Redis is a cluster" in earmark(*words, status=3).stderr
    assert earmark("query", "SELECT count(*) AS runs FROM run_progress").stdout.split() == [
        "runs",
        "0",
    ]


@pytest.mark.parametrize("verb", ["flower", "ui"])
def test_a_port_in_use_is_one_sentence(earmark: Earmark, verb: str) -> None:
    earmark.settings["EARMARK_BROKER__URL"] = "redis://localhost"
    upgraded(f"sqlite:///{earmark.folder}/labels.db")
    earmark.settings["EARMARK_DATABASE__URL"] = f"sqlite:///{earmark.folder}/labels.db"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = earmark(verb, "--port", str(port), status=2).stderr
    assert (
        refused == f"earmark: Port {port} of 127.0.0.1 cannot be used (Address already in use):"
        " choose another.\n"
    )
