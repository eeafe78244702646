"""Several models in one pass: `--model A --model B`, each with a run of its own."""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

from earmark.demo import EXAMPLES
from tests.workers.scoring import graphs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.end_to_end.conftest import Earmark

PAGE = Path(__file__).parents[2] / "docs/guides/models.md"
NAMES = ("dog.ogg", "siren.wav", "piano.flac", "rain.ogg")
BEST = "SELECT uri || label FROM results WHERE run = '{}'"
STATES = "SELECT run, done, failed, total FROM run_progress ORDER BY run_id"


class Server(ThreadingHTTPServer):
    """Serves sounds, and counts the requests for each; `busy` fails once."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: Counter[str] = Counter()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        _, kind, number = self.path.split("/")
        status = {"gone": 404, "busy": 500}.get(kind, 200)
        if kind == "busy" and self.server.asked[self.path] > 1:
            status = 200
        # A byte more at the end makes each file another one.
        sound = (EXAMPLES / NAMES[int(number) % len(NAMES)]).read_bytes() + bytes(int(number))
        self.send_response(status)
        self.send_header("Content-Length", str(len(sound)))
        self.end_headers()
        self.wfile.write(sound)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(earmark: Earmark) -> Iterator[Server]:
    with Server() as running:
        Thread(target=running.serve_forever, daemon=True).start()
        earmark.settings["EARMARK_FETCH__ALLOW_NETWORKS"] = "127.0.0.1/32"
        earmark.settings["EARMARK_FETCH__PORTS"] = str(running.server_port)
        earmark.settings["EARMARK_DATABASE__URL"] = f"sqlite:///{earmark.folder}/x.db"
        earmark.settings["EARMARK_LEDGER__RETRY_BASE_S"] = "0.1"
        yield running
        running.shutdown()


def rows(folder: Path, statement: str) -> list[Any]:
    with closing(sqlite3.connect(folder / "x.db")) as database:
        return database.execute(statement).fetchall()


def test_each_clip_is_fetched_once_for_three_models_of_two_rates(
    earmark: Earmark, server: Server
) -> None:
    clips = [("ok", number) for number in range(12)] + [("gone", 1), ("busy", 2)]
    urls = [f"http://127.0.0.1:{server.server_port}/{kind}/{number}" for kind, number in clips]
    (earmark.folder / "list.txt").write_text("\n".join(urls))
    graphs.save(earmark.folder / "same")
    graphs.save(earmark.folder / "slow", rate=8000)
    models = ("--model", "starter", "--model", "./same", "--model", "./slow")
    words = ("run", "list.txt", "--name", "march", *models)
    shown = earmark(*words)
    assert "march/slow: 14 clips, 13 done, 1 failed" in shown.stderr
    assert server.asked == {f"/{kind}/{number}": 1 + (kind == "busy") for kind, number in clips}
    expected = [(f"march/{name}", 13, 1, 14) for name in ("starter", "same", "slow")]
    assert rows(earmark.folder, STATES) == expected
    codes = "SELECT error_code, count(*) FROM failures GROUP BY 1"
    assert rows(earmark.folder, codes) == [("not_found", 3)]
    # Their scores are of the energy, which a rate does not change.
    same, slow = (
        {row[0] for row in rows(earmark.folder, BEST.format(run))}
        for run in ("march/same", "march/slow")
    )
    assert same == slow

    # A retry of one run asks for its clips only, and leaves the others as they are.
    server.asked.clear()
    hint = earmark("retry", "march/slow").stderr
    assert f"`earmark {' '.join(words).replace('list.txt', 'YOUR_LIST')}`" in hint
    earmark(*words)
    assert server.asked == {"/gone/1": 1}
    assert rows(earmark.folder, STATES) == expected


def test_a_model_that_fails_leaves_the_other_run_whole(earmark: Earmark, server: Server) -> None:
    urls = [f"http://127.0.0.1:{server.server_port}/ok/{number}" for number in range(40)]
    (earmark.folder / "list.txt").write_text("\n".join(urls))
    graphs.save(earmark.folder / "broken", graphs.only_short(20_000))
    graphs.describe(earmark.folder / "broken", window_s=2)
    models = ("--model", "./broken", "--model", "starter")
    # It fails each clip, which exits with 1.
    earmark("run", "list.txt", "--name", "march", *models, "--stop-at", "off", status=1)
    assert rows(earmark.folder, STATES) == [
        ("march/broken", 0, 40, 40),
        ("march/starter", 40, 0, 40),
    ]
    attempts = "SELECT run_id, max(attempts), max(crashes) FROM clips GROUP BY 1"
    assert rows(earmark.folder, attempts) == [(1, 1, 0), (2, 1, 0)]
    assert rows(earmark.folder, "SELECT DISTINCT error_code FROM failures") == [("model_error",)]


def test_what_cannot_be_for_several_models_is_refused_before_the_run(earmark: Earmark) -> None:
    graphs.save(earmark.folder / "mute")
    graphs.describe(earmark.folder / "mute", embeddings=None)
    both = ("run", str(EXAMPLES), "--model", "starter", "--model", "./mute")
    assert "--labels belongs to one model" in earmark(*both, "--labels", "a,b", status=2).stderr
    refused = earmark(*both, "--embeddings", status=3).stderr
    assert "./mute gives no embeddings: its earmark.json names no such output." in refused
    twice = ("run", str(EXAMPLES), "--model", "./mute", "--model", "./mute")
    assert "would be called the same: mute, mute" in earmark(*twice, status=2).stderr


THEN = ("--then-label", "dog", "--then-label", "rain", "--then-min-score", "0.5")
#: A run's clips by the file's name: its best label, and whether it was not heard.
HEARD = "SELECT uri, label, score, unheard FROM results WHERE run = '{}' ORDER BY uri"


@pytest.mark.parametrize("rate", [16_000, 8000])
def test_a_model_hears_only_what_the_first_one_lets_through(
    earmark: Earmark, server: Server, rate: int
) -> None:
    clips = [("ok", number) for number in range(12)] + [("gone", 1), ("busy", 2)]
    urls = [f"http://127.0.0.1:{server.server_port}/{kind}/{number}" for kind, number in clips]
    (earmark.folder / "list.txt").write_text("\n".join(urls))
    graphs.save(earmark.folder / "second", rate=rate)
    words = ("run", "list.txt", "--name", "march", "--then", "./second", *THEN)
    shown = earmark(*words)
    assert server.asked == {f"/{kind}/{number}": 1 + (kind == "busy") for kind, number in clips}
    expected = [("march/starter", 13, 1, 14), ("march/second", 13, 1, 14)]
    assert rows(earmark.folder, STATES) == expected
    codes = "SELECT run, error_code FROM failures ORDER BY run_id"
    assert rows(earmark.folder, codes) == [(run, "not_found") for run, *_ in expected]

    earmark("run", "list.txt", "--name", "alone", "--model", "./second")
    first, second, alone = (
        {row[0]: row[1:] for row in rows(earmark.folder, HEARD.format(run))}
        for run in ("march/starter", "march/second", "alone")
    )
    through = [uri for uri, (label, *_) in first.items() if label in ("dog", "rain")]
    assert 0 < len(through) < len(first)
    for uri, heard in second.items():
        assert heard == (alone[uri] if uri in through else (None, None, 1))
    assert f"  {len(first) - len(through)} not heard: none of" in shown.stderr

    # A retry of the first run lets the second one follow.
    server.asked.clear()
    hint = earmark("retry", "march/starter").stderr
    (again,) = re.findall("`earmark (.*)`", hint)
    assert again == (
        "run YOUR_LIST --name march --model starter --then ./second --then-label dog,rain"
        " --then-min-score 0.5"
    )
    earmark(*again.replace("YOUR_LIST", "list.txt").split())
    assert server.asked == {"/gone/1": 1}
    assert rows(earmark.folder, STATES)[:2] == expected


def test_the_command_of_the_guide_tells_what_was_not_heard(earmark: Earmark) -> None:
    (command,) = re.findall(r"^\$ earmark (run .*--then .*)$", PAGE.read_text(), re.M)
    sounds = ("dog.ogg", "music.mp3", "rain.ogg", "siren.wav", "speech.wav")
    (earmark.folder / "clips").mkdir()
    for name in sounds:
        shutil.copy(EXAMPLES / name, earmark.folder / "clips")
    graphs.save(earmark.folder / "dnsmos")
    shown = earmark(*command.split())
    not_heard = re.findall(r"^(\S+) +not heard", shown.stdout, re.M)
    assert not_heard == re.findall(r"^(\S+) +not heard", PAGE.read_text(), re.M) == list(sounds[:4])
    assert "4 not heard: none of these reached 0.5: speech, baby_cry." in shown.stderr
    misspelt = earmark("run", "clips", "--then", "./dnsmos", "--then-label", "speach", status=2)
    assert "starter has no label speach. Did you mean speech?" in misspelt.stderr
    alone = earmark("run", "clips", "--then", "./dnsmos", status=2).stderr
    assert "--then and --then-label go together" in alone
