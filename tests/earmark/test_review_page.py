"""The review page: one key a clip, nothing lost, nobody else's clip, and no other site writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
import sqlalchemy as sa

from db import reviews
from db.models import WindowEmbedding
from db.rows import select
from db.session import connect, writing
from earmark.core.settings import Database
from earmark.demo import EXAMPLES
from tests.db.builders import add_clips, chunk_of
from tests.earmark.conftest import HOSTILE, Watched, serious, untouched
from tests.servers import free_port, upgraded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

LABELS = ("siren", HOSTILE)
COUNT = 40


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Engine]:
    """A run of many sirens, each a span of one file."""
    from db import ledger
    from earmark.core import clips as words
    from earmark.core.options import RunOptions
    from earmark.core.settings import Ledger

    engine = connect(upgraded(f"sqlite:///{tmp_path_factory.mktemp('review')}/e.db"), Database())
    run_id = ledger.open_run(engine, "march", RunOptions(embeddings=True), queue="q", chunk_size=16)
    parts = [words.Part(start_s=n / 20, end_s=n / 20 + 0.5) for n in range(COUNT)]
    listed = [words.Clip(str(EXAMPLES / "siren.wav"), {"n": HOSTILE}, part) for part in parts]
    add_clips(engine, run_id, listed)
    claim = ledger.claim(engine, chunk_of(engine, range(1, COUNT + 1)), worker="w", limits=Ledger())
    facts = words.AudioFacts(0.5, 44100, 1, "wav")
    ended = []
    for clip_id in range(1, COUNT + 1):
        best = words.Prediction(int(clip_id == COUNT), clip_id / COUNT)
        ended.append(words.Success(clip_id, words.Source(f"{clip_id:02x}", 7), facts, (best,)))
    identity = {"name": "m", "revision": "", "sha256": "0", "sample_rate": 16000, "window_s": 5.0}
    model = ledger.register_model(engine, LABELS, **identity, function_to_apply="softmax")
    ledger.settle_model(engine, run_id, model[0])
    ledger.finish(engine, claim, ended, model[1], Ledger())
    with writing(engine) as connection:
        for clip_id in range(1, COUNT + 1):
            vector = bytes([COUNT - clip_id, clip_id] * 4)
            row = {"clip_id": clip_id, "number": 0, "vector": vector}
            connection.execute(sa.insert(WindowEmbedding).values(**row))
    yield engine
    engine.dispose()


class Served:
    """The page in a process of its own, which can be killed and started again."""

    def __init__(self, engine: sa.Engine) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/runs/1/review"
        self._db = engine.url.render_as_string()
        # An index is written there, not in the home of whoever runs the tests.
        data = Path(str(engine.url.database)).with_name("data")
        self._environment = {**os.environ, "EARMARK_DATA_DIR": str(data)}

    def start(self) -> None:
        command = [sys.executable, "-m", "earmark", "review", "1", "--db", self._db]
        self.process = subprocess.Popen([*command, "--port", str(self.port)], env=self._environment)
        while True:
            try:
                assert requests.get(self.url, timeout=30).status_code == 200
            except requests.ConnectionError:
                assert self.process.poll() is None
                time.sleep(0.1)
            else:
                return

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def post(self, path: str = "", **body: Any) -> requests.Response:
        origin = {"Origin": f"http://127.0.0.1:{self.port}"}
        return requests.post(self.url + path, json=body, headers=origin, timeout=30)


@pytest.fixture(scope="module")
def served(engine: sa.Engine) -> Iterator[Served]:
    served = Served(engine)
    served.start()
    yield served
    served.kill()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=str)
def page(request: pytest.FixtureRequest, browser: Browser, served: Served) -> Iterator[Page]:
    width, scheme = request.param
    view: Any = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    with browser.new_context(**view) as context:
        page = context.new_page()
        watched = Watched(page, served.url.partition("/runs")[0])
        page.goto(f"{served.url}?label=siren&queue=random&reviewer=r{width}")
        page.wait_for_selector("#clip .card")
        yield page
        assert serious(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert untouched(page)
        assert [each for each in watched.wrong if "ERR_CONNECTION" not in each] == []


def wait(page: Page, condition: str) -> None:
    """Wait until a condition holds; the page's policy forbids Playwright's own way."""
    while not page.evaluate(condition):
        page.wait_for_timeout(20)


def said(engine: sa.Engine, reviewer: str) -> list[tuple[str, str]]:
    rows = reviews.reviews(engine, 1)
    return [(row["label"], row["verdict"]) for row in rows if row["reviewer"] == reviewer]


def press(page: Page, keys: str) -> None:
    """Press keys, each at another clip than the one before, and wait until all is saved."""
    for key in keys:
        page.wait_for_selector("#clip .card")
        page.keyboard.press(key)
    wait(page, "!unsaved.length && document.querySelector('#told').textContent")


def test_one_key_a_clip(page: Page, engine: sa.Engine) -> None:
    who = str(page.evaluate("asked.reviewer"))
    first = page.locator("[data-clip]").get_attribute("data-clip")
    press(page, "ynj")
    assert sorted(said(engine, who)) == [
        ("siren", "right"),
        ("siren", "unsure"),
        ("siren", "wrong"),
    ]
    press(page, "kkk")
    assert page.locator("[data-clip]").get_attribute("data-clip") == first
    press(page, "n")
    press(page, "u")
    assert page.locator("[data-clip]").get_attribute("data-clip") == first
    press(page, "jj")
    page.keyboard.press("t")
    page.keyboard.type(HOSTILE)
    page.keyboard.press("Enter")
    wait(page, "!unsaved.length")
    assert (HOSTILE, "right") in said(engine, who)
    assert HOSTILE in page.locator("#progress").inner_text()


def test_the_next_clip_sounds_at_once(page: Page) -> None:
    wait(page, "clips.length > 4 && clips[4].querySelector('audio').readyState === 4")
    page.evaluate("document.addEventListener('playing', () => { window.sounding = now; }, true)")
    page.keyboard.press("y")
    wait(page, "window.sounding === now && now > 0")


@pytest.mark.parametrize("page", [(1280, "light")], indirect=True)
def test_a_killed_page_loses_no_review(page: Page, engine: sa.Engine, served: Served) -> None:
    who = str(page.evaluate("asked.reviewer"))
    wait(page, "clips.length > 6")
    before = len(said(engine, who))
    press(page, "y")
    served.kill()
    page.keyboard.press("n")
    page.keyboard.press("y")
    wait(page, "document.querySelector('#told').textContent.includes('2 not saved')")
    assert len(said(engine, who)) == before + 1
    served.start()
    wait(page, "!unsaved.length")
    assert len(said(engine, who)) == before + 3


def test_two_people_do_not_meet(served: Served, engine: sa.Engine) -> None:
    queue = {"label": "siren", "queue": "doubtful", "low": "0.1", "high": "", "holding": []}
    one, other = (served.post("/next", reviewer=who, **queue).text for who in ("ana", "ben"))
    assert one.split("data-clip=")[1][:6] != other.split("data-clip=")[1][:6]


def test_a_queue_may_begin_with_what_sounds_like_a_clip(served: Served, engine: sa.Engine) -> None:
    queue = {"label": "siren", "queue": "nearest", "low": "", "high": "", "reviewer": "cleo"}
    taken = {row["clip_id"] for row in select(engine, "SELECT clip_id FROM review_log")}
    shown = int(served.post("/next", like="39", holding=[], **queue).text.split('"')[1])
    assert {*range(shown + 1, 39)} <= taken
    refused = served.post("/next", like="", holding=[], **queue)
    assert (refused.status_code, refused.text[:31]) == (400, "There is no clip 0 with embeddi")


def test_only_our_own_page_may_write(served: Served, engine: sa.Engine) -> None:
    body = {"clip_id": 1, "label": "siren", "verdict": "right", "reviewer": "mallory"}
    for origin in ({}, {"Origin": "null"}, {"Origin": "http://evil.example"}):
        refused = requests.post(served.url, json=body, headers=origin, timeout=30)
        assert (refused.status_code, refused.text) == (403, "Another site may not write here.")
    assert requests.get(f"{served.url}/next", timeout=30).status_code == 405
    for wrong in ({"verdict": "shown"}, {"label": "x" * 201}, {"clip_id": "x"}, {"reviewer": ""}):
        assert served.post(**(body | wrong)).status_code == 400
    assert served.post(**(body | {"clip_id": 999})).text == "1 of these clips are not in this run."
    assert served.post(**(body | {"label": "x" * 20_000})).status_code == 413
    rows = select(engine, "SELECT * FROM review_log WHERE reviewer = 'mallory'")
    assert json.dumps(list(rows)) == "[]"


def test_the_truth_and_the_clips_behind_a_cell_are_shown(browser: Browser, served: Served) -> None:
    served.post(clip_id=COUNT, label=HOSTILE, verdict="right", reviewer="ana")
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(served.url.replace("review", "evaluation?truth=reviews"))
        page.locator("tr", has_text=HOSTILE).get_by_role("link").first.click()
        page.wait_for_url("**true=**")
        page.locator("summary").first.click()
        page.wait_for_selector(".card .mel")
        assert serious(page) == []
        assert untouched(page)
