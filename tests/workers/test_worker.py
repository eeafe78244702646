"""A worker's parts together, with a model of the test's: loaders, queue, chunks and the ledger."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import sqlalchemy as sa

from db import ledger
from db.models import Clip
from db.session import connect, reading
from earmark.core import clips as records
from earmark.core.options import RunOptions
from earmark.core.settings import Database
from tests.db.builders import add_clips, chunk_of, labels, row
from tests.servers import copied_sqlite
from tests.workers.decoding import bad_audio
from tests.workers.loading.world import settings_for, until
from tests.workers.scoring.test_batcher import Fake
from workers.clip import WindowQueue
from workers.loading.loaders import Loaders
from workers.models import LoadedModel, RunPlan
from workers.scoring.batcher import Batcher
from workers.scoring.best_labels import BEST
from workers.tasks import WorkerState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.slow


class SlowModel(Fake):
    """Takes a while for each window; the score of label 1 is the window's first sample."""

    def __init__(self, window_s: float) -> None:
        super().__init__()
        self._window_s = window_s
        self.windows = 0
        card = {"function_to_apply": "none", "fixed": True, "min_samples": 1, "hop_s": None}
        self.card = SimpleNamespace(  # type: ignore[assignment]
            **card, sample_rate=8000, window_s=1.0, usable_window_s=lambda _wanted: 1.0
        )

    def outcomes(
        self,
        windows: Sequence[np.ndarray],
        function_to_apply: str = "none",
        top_k: int = 0,
        **_: Any,
    ) -> list[Any]:
        time.sleep(self._window_s * len(windows))
        self.windows += len(windows)
        scores = [np.array([0.0, float(window[0])], np.float32) for window in windows]
        if not top_k:
            return scores
        return [np.array([(1, score[1]), (0, 0.0)], BEST)[:top_k] for score in scores]


class World:
    """A worker with a SQLite ledger and one loader."""

    def __init__(self, folder: Path, model: SlowModel, **groups: Any) -> None:
        self.folder = folder
        url = copied_sqlite(folder / "earmark.db")
        self.engine = connect(url, Database())
        settings = settings_for(folder, url, **groups)
        self.loaders = Loaders(settings, WindowQueue())
        self.loaders.wait_until_ready()
        self.batcher = Batcher(model, settings.worker, self.loaders.scored)
        loaded = LoadedModel(model.card, self.batcher, 1, labels(self.engine))
        models = SimpleNamespace(
            take=lambda run_id: RunPlan(RunOptions(), loaded, run_id),
            give_back=lambda _plan: None,
            close=self.batcher.close,
            batchers=[self.batcher],
        )
        self.state = WorkerState(self.engine, settings, models, self.loaders, "worker")  # type: ignore[arg-type]

    def sound(self, name: str, seconds: float) -> str:
        path = self.folder / name
        samples = np.arange(int(8000 * seconds)) // 8000 + 1
        path.write_bytes(bad_audio.wav(samples.astype("<i2").tobytes(), rate=8000))
        return str(path)

    def chunk(self, *uris: str) -> records.Chunk:
        run_id = ledger.open_run(self.engine, None, RunOptions(), queue="clips", chunk_size=16)
        ledger.settle_model(self.engine, run_id, 1)
        add_clips(self.engine, run_id, [records.Clip(uri) for uri in uris])
        with reading(self.engine) as connection:
            ids = connection.scalars(sa.select(Clip.id).where(Clip.run_id == run_id)).all()
        return chunk_of(self.engine, ids)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def start(model: SlowModel, **groups: Any) -> World:
        made.append(World(tmp_path, model, **groups))
        return made[-1]

    yield start
    for world in made:
        world.state.draining.set()
        world.state.close()


def test_a_long_clip_before_a_slow_model_has_one_result_despite_short_deadlines(
    make: Callable[..., World],
) -> None:
    model = SlowModel(0.05)
    world = make(
        model,
        audio={"decode_timeout_s": 1.5},
        worker={"in_flight_bytes": 8 * 32000, "chunk_deadline_s": 1.5},
    )
    chunk = world.chunk(world.sound("long.wav", 80.5))
    world.state.work(chunk)
    ((clip_id, _),) = chunk.clips
    until(lambda: row(world.engine, clip_id).state == "done")
    assert model.windows == 81
    assert row(world.engine, clip_id).attempts == 1
    assert row(world.engine, clip_id).duration_s == 80.5


def test_equal_clips_are_decoded_once_each_and_known_in_the_next_chunk(
    make: Callable[..., World],
) -> None:
    model = SlowModel(0.0)
    world = make(model)
    counts = world.state.work(world.chunk(world.sound("a.wav", 1), world.sound("b.wav", 2.5)))
    assert counts["done"] == 2
    assert model.windows == 4
    again = world.chunk(world.sound("c.wav", 2.5))
    assert world.state.work(again)["done"] == 1
    assert model.windows == 4
    assert row(world.engine, again.clips[0][0]).reused


def test_a_worker_that_stops_gives_long_clips_back_within_its_drain(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers import chunk as chunks

    monkeypatch.setattr(chunks, "DRAIN_S", 0.5)
    world = make(SlowModel(0.2), worker={"in_flight_bytes": 4 * 32000})
    chunk = world.chunk(
        world.sound("long.wav", 600), *[world.sound(f"{n}.wav", 1) for n in range(8)]
    )
    working = threading.Thread(target=world.state.work, args=(chunk,))
    working.start()
    until(lambda: world.batcher.waiting_bytes)
    world.state.draining.set()
    working.join(30)
    assert not working.is_alive()
    states = [row(world.engine, clip_id) for clip_id, _ in chunk.clips]
    assert {clip.state for clip in states} <= {"pending", "done"}
    assert states[0].state == "pending"
    assert [clip.crashes for clip in states] == [0] * 9
