"""A small run of the example clips in a database, with hostile words in every outside text."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
import sqlalchemy as sa

from db import ledger, runs
from db.models import Clip
from db.session import connect, reading
from earmark.core import clips as words
from earmark.core.errors import NotAudio, NotFound
from earmark.core.options import RunOptions
from earmark.core.settings import Database, Ledger, Settings
from earmark.demo import EXAMPLES
from tests.db.builders import add_clips, chunk_of
from tests.servers import upgraded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
#: Where no clip is left: at a host that does not exist.
GONE = f"https://gone.invalid/{HOSTILE}.wav?signature=SECRET"
LABELS = ("dog", "siren", "speech", HOSTILE)
MIXED = ((0, 5, 2), (5, 10, 2), (10, 15, 1), (12, 17, 1))


class Heard(NamedTuple):
    """A database with one run in it, named with hostile words too."""

    engine: sa.Engine
    run: runs.RunRow
    settings: Settings


@pytest.fixture(scope="session")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Heard]:
    url = upgraded(f"sqlite:///{tmp_path_factory.mktemp('heard')}/e.db")
    engine = connect(url, Database())
    run_id = ledger.open_run(
        engine, f"march {HOSTILE}", RunOptions(window_s=5.0), queue="clips", chunk_size=16
    )
    uris = [str(EXAMPLES / name) for name in ("dog.ogg", "mixed.m4a", "siren.wav")]
    uris += [GONE, "https://a.org/missing.wav", "https://a.org/page.wav"]
    add_clips(engine, run_id, [words.Clip(uri, {"note": HOSTILE, "city": "Rome"}) for uri in uris])
    with reading(engine) as connection:
        ids = list(connection.scalars(sa.select(Clip.id).order_by(Clip.id)))
    claim = ledger.claim(engine, chunk_of(engine, ids), worker=HOSTILE, limits=Ledger())
    outcomes = [
        _success(ids[0], [(0, 0.98), (1, 0.01)], 5),
        _success(ids[1], [(1, 0.49), (2, 0.41)], 17, MIXED),
        _success(ids[2], [(1, 0.94)], 6),
        _success(ids[3], [(3, 0.5)], 9),
        words.Failure(ids[4], NotFound(status=404)),
        words.Failure(ids[5], NotAudio(kind=HOSTILE)),
    ]
    identity = {"name": "m", "revision": "", "sha256": "0", "sample_rate": 16000, "window_s": 5.0}
    model_id, label_ids = ledger.register_model(
        engine, LABELS, **identity, function_to_apply="softmax"
    )
    ledger.settle_model(engine, run_id, model_id)
    ledger.finish(engine, claim, outcomes, label_ids, Ledger())
    yield Heard(engine, runs.get_run(engine, run_id), Settings(database=Database(url=url)))
    engine.dispose()


def _success(
    clip_id: int,
    scores: list[tuple[int, float]],
    seconds: float,
    windows: tuple[tuple[int, int, int], ...] = (),
) -> words.Success:
    facts = words.AudioFacts(seconds, 44100, 1, "vorbis")
    parts = tuple(
        words.WindowPredictions(start, end, (words.Prediction(best, 0.9),))
        for start, end, best in windows
    )
    predictions = tuple(words.Prediction(*score) for score in scores)
    return words.Success(clip_id, words.Source(f"{clip_id:02x}", 7), facts, predictions, parts)


class Watched:
    """What a browser did that a quiet page that is all there would not have it do."""

    def __init__(self, page: Page, allowed: str) -> None:
        self.wrong: list[str] = []
        page.on("console", lambda message: self.wrong.append(message.text))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((allowed, "data:")) or self.wrong.append(request.url)
            ),
        )


def serious(page: Page) -> list[str]:
    """Return what axe finds to be serious or critical, with where it is."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    bad = [each for each in found if each["impact"] in ("serious", "critical")]
    return [
        f"{each['id']}: {node['target']} {node['failureSummary']}"
        for each in bad
        for node in each["nodes"]
    ]


def untouched(page: Page) -> bool:
    """Whether no word from outside became part of the page's code."""
    return bool(
        page.evaluate("window.hacked === undefined && !document.querySelector('img[src=x]')")
    )
