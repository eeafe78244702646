"""`earmark demo`: the bundled example clips, served on loopback and classified by URL."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earmark.core.options import RunOptions
from earmark.core.settings import Settings
from earmark.ports import LOOPBACK
from earmark.run_here import run_here

if TYPE_CHECKING:
    from earmark.run_object import Run

EXAMPLES = Path(__file__).with_name("examples")
CLIPS = (
    "dog.ogg", "siren.wav", "piano.flac", "music.mp3", "speech.wav", "mixed.m4a", "broken.wav",
    "missing.wav",
)  # fmt: skip
#: The window in which the mixed clip's two sounds are apart.
WINDOW_S = 5.0


def demo(settings: Settings, report: Path | None = None) -> Run:
    """Classify the example clips over HTTP; write the run's page while they are served.

    Two of them are bad on purpose.
    """
    with _served(EXAMPLES) as port:
        allowed = settings.changed(fetch={"allow_networks": f"{LOOPBACK}/32", "ports": str(port)})
        urls = [f"http://{LOOPBACK}:{port}/{name}" for name in CLIPS]
        run = run_here(urls, allowed, [RunOptions(window_s=WINDOW_S)])
        if report:
            # Imported here because it loads a template engine.
            from earmark.web.report import write

            write(run.engine, run.row, allowed, report)
        return run


@contextmanager
def _served(folder: Path) -> Iterator[int]:
    server = ThreadingHTTPServer((LOOPBACK, 0), partial(_Quiet, directory=str(folder)))
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
