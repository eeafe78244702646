"""Downloads of a cluster: signatures do not leak, and a bad host delays no other."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import psutil
import psycopg
import pytest
import redis

from earmark.demo import EXAMPLES
from tests.end_to_end.conftest import Earmark, scalar, wait_until
from tests.servers import answers, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SECRET = "CANARY0123456789"
HOSTS, CLIPS_PER_HOST = 50, 20
RATE_LIMITED, SLOW, DEAD = 1, 2, 3
SLOW_S = 3.0


@pytest.fixture
def cluster(cluster: Earmark) -> Earmark:
    cluster.settings["EARMARK_LEDGER__RETRY_BASE_S"] = "1"
    return cluster


def test_signatures_are_only_in_the_uri_column_and_tokens_nowhere(
    cluster: Earmark, serve: Callable[..., str], tmp_path: Path
) -> None:
    base = serve(EXAMPLES)
    cluster.settings["EARMARK_FETCH__PORTS"] = base.rpartition(":")[2]
    cluster.settings["EARMARK_FETCH__TOKENS"] = json.dumps({base: SECRET})
    cluster.settings["EARMARK_FETCH__HEADERS"] = json.dumps({base: {"X-Key": SECRET}})
    cluster.settings["EARMARK_FETCH__BASIC_AUTH"] = json.dumps({"h.test": f"me:{SECRET}"})
    urls = [
        f"{base}/{name}?X-Amz-Signature={SECRET}#{SECRET}"
        for name in ("dog.ogg", "gone.wav", "broken.wav")
    ]
    (tmp_path / "list.txt").write_text(
        "\n".join([*urls, f"http://me:{SECRET}@127.0.0.1/a", f"http://[bad/?{SECRET}"])
    )
    port = free_port()
    cluster.start("earmark", "flower", "--port", str(port))
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/healthcheck"))
    shown = cluster("submit", "list.txt")
    with redis.Redis.from_url(cluster.settings["EARMARK_BROKER__URL"]) as client:
        queues = client.keys("earmark:clips-*")
        assert len(queues) == 1
        queued = b"".join(client.lrange(queues[0], 0, -1))
        assert queued
        assert not leaks(queued)
        cluster.start("earmark", "worker")
        ended = cluster("status", "--watch")
        titles = [title for process in psutil.process_iter() for title in command_line(process)]
        kept = b"".join(client.dump(key) or b"" for key in client.scan_iter())
    assert any("earmark" in title for title in titles)
    assert not leaks("".join(titles))
    assert not leaks(shown.stdout + shown.stderr + ended.stderr)
    assert not leaks(kept)
    import urllib.request

    tasks = urllib.request.urlopen(f"http://127.0.0.1:{port}/api/tasks").read()
    assert b"SUCCESS" in tasks
    assert not leaks(tasks)
    for table in tables(cluster):
        for (row,) in rows(cluster, f"SELECT to_jsonb({table}) - 'uri' FROM {table}"):
            assert not leaks(str(row))
    cluster.end()
    assert not leaks("".join(log.read_text() for log in tmp_path.glob("*.log")))


def tables(cluster: Earmark) -> list[str]:
    names = rows(
        cluster, "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
    )
    assert len(names) > 5
    return [name for (name,) in names]


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended
        return []


def leaks(text: str | bytes) -> bool:
    return SECRET in (text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


@pytest.mark.chaos
def test_a_slow_a_dead_and_a_rate_limiting_host_delay_no_other_host(
    cluster: Earmark, tmp_path: Path
) -> None:
    with many_hosts() as port:
        cluster.settings["EARMARK_FETCH__PORTS"] = str(port)
        cluster.start("earmark", "worker")
        urls = [
            url(port, host, number) for number in range(CLIPS_PER_HOST) for host in range(HOSTS)
        ]
        (tmp_path / "list.txt").write_text("\n".join(urls))
        cluster("submit", "list.txt", "--watch")
    states = dict(rows(cluster, "SELECT error_code, count(*) FROM failures GROUP BY 1"))
    assert states == {"connect": CLIPS_PER_HOST}
    assert (
        scalar(cluster, "SELECT count(*) FROM clips WHERE state = 'done'")
        == (HOSTS - 1) * CLIPS_PER_HOST
    )
    assert scalar(cluster, "SELECT max(attempts) FROM clips") == 3


def url(port: int, host: int, number: int) -> str:
    return f"http://127.0.{2 if host == DEAD else 1}.{host}:{port}/{number}"


def rows(cluster: Earmark, query: str) -> list[Any]:
    with psycopg.connect(cluster.settings["EARMARK_DATABASE__URL"]) as connection:
        return connection.execute(query).fetchall()  # type: ignore[call-overload]


@contextmanager
def many_hosts() -> Iterator[int]:
    """Serve a sound on 127.0.1.x: one host is slow, one answers 429 at first; 127.0.2.x is dead."""
    sound = (EXAMPLES / "dog.ogg").read_bytes()
    willing_after = time.monotonic() + 3600

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            nonlocal willing_after
            host = int(self.server.server_address[0].rpartition(".")[2])  # type: ignore[union-attr]
            if host == SLOW:
                time.sleep(SLOW_S)
            if host == RATE_LIMITED and time.monotonic() < willing_after:
                willing_after = min(willing_after, time.monotonic() + 3)
                self.send_response(429)
                self.send_header("Retry-After", "3")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(sound)))
            self.end_headers()
            self.wfile.write(sound)

        def log_message(self, *_: Any) -> None:
            pass

    port = free_port()
    servers = [
        ThreadingHTTPServer((f"127.0.1.{host}", port), Handler)
        for host in range(HOSTS)
        if host != DEAD
    ]
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield port
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
