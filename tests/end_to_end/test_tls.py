"""Redis and PostgreSQL behind TLS: believed with the authority's certificate, refused without."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
import trustme

from console.demo import EXAMPLES
from tests.end_to_end.conftest import Earmark, wait_until
from tests.end_to_end.test_cluster import answers
from tests.servers import free_port, serving

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def behind_tls(port: int, authority: trustme.CA, *, asked_first: bool = False) -> Iterator[int]:
    """Yield the port of a server that ends TLS and passes on to another port.

    Args:
        asked_first: the client asks for TLS in eight bytes of plain text, as PostgreSQL's does.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
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
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.fixture
def encrypted(cluster: Earmark) -> Iterator[Earmark]:
    """A cluster whose Redis and PostgreSQL are reached through TLS, with the authority in ca.pem."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(cluster.folder / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(cluster.folder / "other.pem"))
    redis_port = int(cluster.settings["EARMARK_BROKER__URL"].rpartition(":")[2].partition("/")[0])
    server, _, database = cluster.settings["EARMARK_DATABASE__URL"].rpartition("/")
    with ExitStack() as stack:
        redis = stack.enter_context(behind_tls(redis_port, authority))
        postgres = stack.enter_context(behind_tls(int(server.rpartition(":")[2]), authority, asked_first=True))
        trust = {
            "EARMARK_BROKER__URL": f"rediss://localhost:{redis}/0?ssl_cert_reqs=required&ssl_ca_certs={{}}",
            "EARMARK_DATABASE__URL": (
                f"postgresql://postgres@localhost:{postgres}/{database}?sslmode=verify-full&sslrootcert={{}}"
            ),
        }
        cluster.settings |= {name: url.format(cluster.folder / "ca.pem") for name, url in trust.items()}
        yield cluster


def test_a_list_is_done_through_tls(encrypted: Earmark) -> None:
    port = free_port()
    with serving(EXAMPLES) as base:
        encrypted.settings |= {
            "EARMARK_FETCH__PORTS": base.rpartition(":")[2],
            "EARMARK_WORKER__METRICS_PORT": str(port),
        }
        encrypted.start("console.cli", "worker")
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/ready"), 60)
        shown = encrypted("submit", f"{base}/dog.ogg", f"{base}/siren.wav", "--watch", "--strict")
    assert "2 done" in shown.stderr


def test_a_certificate_of_another_authority_is_refused_with_a_sentence(encrypted: Earmark) -> None:
    for name in ("EARMARK_DATABASE__URL", "EARMARK_BROKER__URL"):
        right = encrypted.settings[name]
        encrypted.settings[name] = right.replace("ca.pem", "other.pem")
        refused = encrypted("submit", str(EXAMPLES / "dog.ogg"), status=3)
        assert "certificate verify failed" in refused.stderr
        encrypted.settings[name] = right
