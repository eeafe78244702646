"""The cluster of the README: Redis, PostgreSQL, workers, a producer and Flower."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import psycopg
import pytest

from earmark.demo import EXAMPLES
from tests.end_to_end.conftest import (
    TIMEOUT_S,
    Earmark,
    finished_chunks,
    get_json,
    scalar,
    wait_until,
)
from tests.faults.nursery import HOOKS
from tests.servers import answers, free_port

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

CLIPS = 200
#: Small, so that a worker that dies has some clips left to do.
CHUNK = ("--chunk-size", "8")
LEASE_S = 4.0


@pytest.fixture
def cluster(cluster: Earmark) -> Earmark:
    """A cluster with short leases, so that clips of a dead worker are soon taken back."""
    cluster.settings |= {
        "EARMARK_LEDGER__LEASE_S": str(LEASE_S),
        "EARMARK_LEDGER__LOST_AFTER_S": "2",
    }
    return cluster


def write_list(cluster: Earmark, base: str) -> str:
    cluster.settings["EARMARK_FETCH__TIMEOUT_S"] = str(2 * TIMEOUT_S)
    cluster.settings["EARMARK_FETCH__PORTS"] = base.rpartition(":")[2]
    urls = [
        f"{base}/{('dog.ogg', 'siren.wav', 'piano.flac')[number % 3]}?{number}"
        for number in range(CLIPS)
    ]
    (cluster.folder / "list.txt").write_text("# sounds\n" + "\n".join(urls) + "\n")
    return "list.txt"


def worker_at_work(cluster: Earmark, base: str) -> subprocess.Popen[str]:
    """Start a worker, submit the list, and return once clips are running."""
    words = write_list(cluster, base)
    worker = cluster.start("earmark", "worker")
    cluster("submit", words, *CHUNK)
    wait_until(lambda: scalar(cluster, "SELECT count(*) FROM leases WHERE token IS NOT NULL") > 0)
    return worker


def test_two_workers_and_flower_finish_a_list(cluster: Earmark, serve: Callable[..., str]) -> None:
    words = write_list(cluster, serve(EXAMPLES, delay_s=0.3))
    port = free_port()
    cluster.start(
        "celery",
        "-A",
        "workers.app",
        "worker",
        "--pool",
        "threads",
        "-c",
        "2",
        "-E",
        "-l",
        "INFO",
        "-n",
        "one@%h",
    )
    cluster.start("earmark", "worker", "--concurrency", "2")
    cluster.start("earmark", "flower", "--port", str(port))
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/healthcheck"))
    cluster.wait_for_workers(2)
    cluster("submit", words, *CHUNK, "--watch")
    assert scalar(cluster, "SELECT string_agg(error, '; ') FROM failures") is None
    assert scalar(cluster, "SELECT count(*) FROM results") == CLIPS
    assert scalar(cluster, "SELECT count(DISTINCT worker) FROM results") == 2
    assert scalar(cluster, "SELECT count(*) FROM top_k WHERE rank = 1") == CLIPS
    wait_until(lambda: finished_chunks(port) >= CLIPS // 8)
    tasks = list(get_json(f"http://127.0.0.1:{port}/api/tasks").values())
    assert {task["state"] for task in tasks} == {"SUCCESS"}
    # On a busy machine some clips end after their chunk's message.
    assert all("'done'" in task["result"] or "'late'" in task["result"] for task in tasks)
    assert all(
        "8 clips: http://127.0.0.1" in task["args"] and "?" not in task["args"] for task in tasks
    )


def test_kill_9_of_the_only_worker_loses_and_doubles_no_clip(
    cluster: Earmark, serve: Callable[..., str]
) -> None:
    words = write_list(cluster, serve(EXAMPLES, delay_s=0.05))
    first = cluster.start("earmark", "worker", "--concurrency", "2")
    cluster("submit", words, *CHUNK)
    wait_until(lambda: scalar(cluster, "SELECT count(*) FROM clips WHERE state = 'done'") >= 20)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert scalar(cluster, "SELECT count(*) FROM leases WHERE token IS NOT NULL") > 0
    cluster.start("earmark", "worker")
    finished = "SELECT count(*) FROM clips WHERE state = 'done'"
    wait_until(lambda: scalar(cluster, finished) == CLIPS)
    assert scalar(cluster, "SELECT count(*) FROM top_k WHERE rank = 1") == CLIPS
    assert scalar(cluster, "SELECT max(attempts) FROM clips") == 1


def test_sigterm_gives_waiting_clips_back_and_ends_in_time(
    cluster: Earmark, serve: Callable[..., str]
) -> None:
    worker = worker_at_work(cluster, serve(EXAMPLES, delay_s=0.3))
    worker.terminate()
    assert worker.wait(TIMEOUT_S) == 0
    assert scalar(cluster, "SELECT count(*) FROM clips WHERE state = 'done'") < CLIPS
    assert scalar(cluster, "SELECT count(*) FROM leases WHERE token IS NOT NULL") == 0
    assert scalar(cluster, "SELECT max(crashes) FROM clips") == 0


def test_sigterm_does_not_wait_for_a_silent_server(
    cluster: Earmark, serve: Callable[..., str]
) -> None:
    worker = worker_at_work(cluster, serve(EXAMPLES, delay_s=2 * TIMEOUT_S))
    worker.terminate()
    assert worker.wait(TIMEOUT_S) == 0
    assert scalar(cluster, "SELECT count(*) FROM leases WHERE token IS NOT NULL") == 0
    assert scalar(cluster, "SELECT max(crashes) + max(attempts) FROM clips") == 0


def test_a_worker_without_schema_or_model_claims_no_clips(cluster: Earmark) -> None:
    cluster("worker", "--model", "./nowhere", status=3)
    cluster.settings["EARMARK_DATABASE__URL"] = (
        cluster.settings["EARMARK_DATABASE__URL"].rpartition("/")[0] + "/postgres"
    )
    refused = cluster("worker", status=3)
    assert "earmark db upgrade" in refused.stderr


def test_a_worker_without_write_permission_exits(cluster: Earmark) -> None:
    owner = cluster.settings["EARMARK_DATABASE__URL"]
    name = owner.rpartition("/")[2]
    with psycopg.connect(owner, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE reader_of_{name} LOGIN")  # type: ignore[call-overload]
        connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader_of_{name}")  # type: ignore[call-overload]
        cluster.settings["EARMARK_DATABASE__URL"] = owner.replace("postgres@", f"reader_of_{name}@")
        sentence = last_sentence_of_a_worker(cluster)
        assert "GRANT it UPDATE on clips, INSERT on leases" in sentence
        connection.execute(f"DROP OWNED BY reader_of_{name}; DROP ROLE reader_of_{name}")  # type: ignore[call-overload]
        connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")  # type: ignore[call-overload]
    cluster.settings["EARMARK_DATABASE__URL"] = owner
    assert "is read-only" in last_sentence_of_a_worker(cluster)


def test_a_worker_with_an_unexpected_start_error_exits(cluster: Earmark) -> None:
    cluster.settings |= {"PYTHONPATH": str(HOOKS), "FAULT_START": "1"}
    assert "The worker cannot start: ZeroDivisionError" in last_sentence_of_a_worker(cluster)


def last_sentence_of_a_worker(cluster: Earmark) -> str:
    """Start a worker that cannot work, and return the last line of its output."""
    worker = cluster.start("earmark", "worker")
    assert worker.wait(120) == 3
    log = max(
        cluster.folder.glob("earmark-*.log"), key=lambda file: int(file.stem.rpartition("-")[2])
    )
    return log.read_text().splitlines()[-1]
