"""Make the pictures of README and site: `python -m docs.pictures`, with /usr/bin/chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.request import urlopen

from PIL import Image
from playwright.sync_api import sync_playwright
from rich.console import Console as Terminal
from rich.text import Text

import earmark

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

PICTURES = Path(__file__).with_name("pictures")
EARMARK = [sys.executable, "-m", "earmark"]
COLUMNS = 84
PORT = 5597
FLOWER_HEARS_S = 3.0
#: A picture in so many colours is a third of the size, and nobody sees it.
COLOURS = 128
TRUTHS = {
    "dog.ogg": "dog",
    "mixed.m4a": "speech",
    "music.mp3": "music",
    "piano.flac": "piano",
    "rain.ogg": "rain",
    "siren.wav": "siren",
    "speech.wav": "speech",
}
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def main() -> None:
    """Run the demo in an empty folder; picture its output, its report, the live page and Flower."""
    PICTURES.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        report = Path(folder, "report.html")
        text = _earmark(folder, "demo", "--report", str(report))
        _terminal(text, PICTURES / "demo.svg")
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM)
        _page(browser, report.as_uri(), PICTURES / "report.png", height=1180)
        with _live_page(folder) as url:
            _page(browser, f"{url}/runs/1", PICTURES / "ui.png", height=1180, scheme="dark")
        _decisions(browser, folder)
        with _flower(folder) as url:
            _page(browser, f"{url}/tasks", PICTURES / "flower.png", height=440)
        browser.close()


def _environment(folder: str) -> dict[str, str]:
    return {**os.environ, "EARMARK_DATA_DIR": folder, "FORCE_COLOR": "1", "COLUMNS": str(COLUMNS)}


def _earmark(folder: str, *words: str) -> str:
    command = [*EARMARK, *words]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(
        command, env=_environment(folder), cwd=folder, text=True, check=True, **both
    ).stdout  # type: ignore[call-overload,no-any-return]


def _terminal(text: str, picture: Path) -> None:
    terminal = Terminal(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    # What moved, the progress bar, is left out.
    lines = [line for line in text.splitlines() if "━" not in line and line.strip()]
    terminal.print(Text.from_ansi("\n".join(lines)))
    picture.write_text(terminal.export_svg(title="make demo"), encoding="utf-8")


def _page(browser: Browser, url: str, picture: Path, *, height: int, scheme: str = "light") -> None:
    page = browser.new_page(viewport={"width": 1280, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(url, wait_until="networkidle")
    image = Image.open(BytesIO(page.screenshot()))
    image.convert("RGB").quantize(COLOURS).save(picture, optimize=True)
    page.close()


def _decisions(browser: Browser, folder: str) -> None:
    """Picture the review page and an evaluation, of a list that names its truths."""
    examples = Path(earmark.__file__).with_name("examples")
    truths = Path(folder, "truths.csv")
    lines = [f"{examples / name},{truth}" for name, truth in TRUTHS.items()]
    truths.write_text("\n".join(["file,truth", *lines]), encoding="utf-8")
    _earmark(folder, "run", str(truths), "--name", "march")
    with _live_page(folder) as url:
        page = f"{url}/runs/march"
        _page(browser, f"{page}/review?label=siren", PICTURES / "review.png", height=1000)
        _page(browser, f"{page}/evaluation?truth=truth", PICTURES / "evaluation.png", height=860)


@contextmanager
def _live_page(folder: str) -> Iterator[str]:
    with _running(folder, "ui", "--port", str(PORT)) as url:
        yield url


@contextmanager
def _flower(folder: str) -> Iterator[str]:
    sounds = str(
        shutil.copytree(Path(earmark.__file__).with_name("examples"), Path(folder, "sounds"))
    )
    with _running(folder, "up", "--flower-port", str(PORT), "--files", sounds) as url:
        _earmark(folder, "submit", sounds, "--name", "examples", "--chunk-size", "2", "--watch")
        time.sleep(FLOWER_HEARS_S)
        yield url


@contextmanager
def _running(folder: str, *words: str) -> Iterator[str]:
    process = subprocess.Popen([*EARMARK, *words], env=_environment(folder), cwd=folder)
    url = f"http://127.0.0.1:{PORT}"
    try:
        for _ in range(60):
            try:
                urlopen(url, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
