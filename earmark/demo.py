"""The ten-line script grown up: the bundled example clips served on loopback, classified by URL, and shown."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earmark import api, local
from earmark.core.options import RunOptions
from earmark.database import open_database

if TYPE_CHECKING:
    from collections.abc import Iterator

    from earmark.api import Finished
    from earmark.core.settings import Settings

EXAMPLES = Path(__file__).with_name("examples")
CLIPS = (
    "dog.ogg",
    "siren.wav",
    "piano.flac",
    "music.mp3",
    "speech.wav",
    "mixed.m4a",
    "broken.wav",
    "missing.wav",
)
#: The window in which the mixed clip's two sounds are apart.
WINDOW_S = 5.0


def demo(settings: Settings, report: Path | None = None) -> Finished:
    """Classify the example clips over HTTP, two of them bad on purpose; write the run's page while they are served."""
    with _served(EXAMPLES) as port:
        allowed = {"fetch__allow_networks": f"{local.LOOPBACK}/32", "fetch__ports": str(port)}
        urls = [f"http://{local.LOOPBACK}:{port}/{name}" for name in CLIPS]
        finished = api.run(urls, settings, options=RunOptions(window_s=WINDOW_S), changes=allowed)
        if report:
            _write_report(finished, settings, port, report)
        return finished


def _write_report(finished: Finished, settings: Settings, port: int, file: Path) -> None:
    from earmark.web import report

    allowed = settings.changed(fetch={"allow_networks": f"{local.LOOPBACK}/32", "ports": str(port)})
    report.write(open_database(settings), finished.run, allowed, file)


@contextmanager
def _served(folder: Path) -> Iterator[int]:
    server = ThreadingHTTPServer((local.LOOPBACK, 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing: the terminal belongs to the progress bar."""
