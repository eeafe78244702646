"""Events are cut out of their recordings, sample by sample, into files that nothing can misname."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile

from db import ledger
from db.models import Clip
from db.session import connect, reading
from earmark import cut
from earmark.core import clips as words
from earmark.core.options import RunOptions
from earmark.core.settings import Database, Ledger
from tests.db.builders import add_clips, chunk_of
from tests.earmark.verbs import verb
from tests.servers import upgraded

if TYPE_CHECKING:
    from pathlib import Path

RATE = 8000
EVIL = "../../a/b, \nc"
#: Start, end, label, channel.
WINDOWS = ((0, 2, 0, None), (2, 4, 1, None), (4, 6, 1, None), (2, 4, 0, 2))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray]:
    """A database with a run over one file, and the file's samples."""
    folder = tmp_path_factory.mktemp("cut")
    samples = np.random.default_rng(0).integers(-(2**23), 2**23, (RATE * 7, 2))
    file = folder / "field rec.wav"
    soundfile.write(file, (samples << 8).astype(np.int32), RATE, subtype="PCM_24")
    gone = folder / "gone.wav"
    url = upgraded(f"sqlite:///{folder}/e.db")
    engine = connect(url, Database())
    run_id = ledger.open_run(engine, "march", RunOptions(), queue="clips", chunk_size=16)
    add_clips(engine, run_id, [words.Clip(str(file)), words.Clip(str(gone))])
    with reading(engine) as connection:
        ids = [row.id for row in connection.execute(Clip.__table__.select().order_by(Clip.id))]
    identity = {"name": "m", "revision": "", "sha256": "0", "sample_rate": 16000, "window_s": 2.0}
    model_id, label_ids = ledger.register_model(
        engine, ("dog", EVIL), **identity, function_to_apply="sigmoid"
    )
    ledger.settle_model(engine, run_id, model_id)
    parts = [
        words.WindowPredictions(start, end, (words.Prediction(label, 0.5 + start / 10),), channel)
        for start, end, label, channel in WINDOWS
    ]
    facts = words.AudioFacts(7.0, RATE, 2, "wav/pcm_24")
    best = parts[0].predictions
    outcomes = [
        words.Success(clip_id, words.Source(f"{clip_id:02x}", 7), facts, best, tuple(parts))
        for clip_id in ids
    ]
    claim = ledger.claim(engine, chunk_of(engine, ids), worker="w", limits=Ledger())
    ledger.finish(engine, claim, outcomes, label_ids, Ledger())
    engine.dispose()
    return url, samples


def test_each_event_is_a_file_of_the_samples_that_were_recorded(
    run: tuple[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, samples = run
    monkeypatch.setattr(cut, "AT_ONCE", 1)
    folder = tmp_path / "events"
    ended = verb("cut", "march", "--pad", "0.5", "-o", str(folder), "--db", url)
    assert f"3 rows: {folder}/metadata.csv" in ended.text
    assert "Events of 1 clip are missing, as of " in ended.text
    assert "gone.wav: There is no readable file" in ended.text
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "1-field_rec-0.00-2.00-dog.flac",
        "1-field_rec-2.00-6.00-.._.._a_b___c.flac",
        "1-field_rec-channel2-2.00-4.00-dog.flac",
        "metadata.csv",
    ]
    spans = (slice(0, 2.5), slice(1.5, 6.5), slice(1.5, 4.5))
    for name, span in zip(names[:3], spans, strict=True):
        found, rate = soundfile.read(folder / name, dtype="int32", always_2d=True)
        expected = samples[int(span.start * RATE) : int(span.stop * RATE)]
        if "channel2" in name:
            expected = expected[:, 1:]
        assert rate == RATE
        np.testing.assert_array_equal(found >> 8, expected)
    refused = verb("cut", "march", "-o", str(folder), "--db", url)
    assert (refused.status, "cannot be made as a new folder: File exists." in refused.text) == (
        2,
        True,
    )
    _is_an_audio_folder(folder)


def _is_an_audio_folder(folder: Path) -> None:
    """As the `audiofolder` of Hugging Face datasets is described."""
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all((folder / row["file_name"]).is_file() for row in rows)
    assert [(row["label"], row["channel"]) for row in rows] == [
        ("dog", ""),
        (EVIL, ""),
        ("dog", "2"),
    ]
    assert (rows[0]["start_s"], rows[0]["cut_start_s"], rows[0]["cut_end_s"]) == (
        "0.0",
        "0.0",
        "2.5",
    )


def test_a_file_that_changed_leaves_nothing_behind(
    run: tuple[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = run
    monkeypatch.setattr(cut, "AT_ONCE", 1)
    engine = connect(url, Database())
    with reading(engine) as connection:
        file = connection.scalar(Clip.__table__.select().with_only_columns(Clip.uri).limit(1))
    engine.dispose()
    before, rate = soundfile.read(file)
    soundfile.write(file, before[:, 0], 2 * rate)
    ended = verb("cut", "march", "--sample", "2", "-o", f"{tmp_path}/out", "--db", url)
    assert "Nothing was cut.\nEvents of 1 clip are missing" in ended.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metadata.csv"]


def test_a_sample_has_as_many_events_of_each_tenth_of_the_scores() -> None:
    events: list[dict[str, Any]] = []
    for number in range(2000):
        score = 0.95 if number % 100 == 0 else 0.5 + (number % 97) / 500
        events.append({"clip_id": number, "start_s": 0.0, "score": score})
    found = cut.sampled(events, 20)
    assert len(found) == 20
    assert sum(event["score"] == 0.95 for event in found) >= 4
    assert [event["clip_id"] for event in found] == sorted(event["clip_id"] for event in found)
    assert max(event["clip_id"] for event in found) > 1000
    assert found == cut.sampled(iter(events), 20)
    assert len(cut.sampled(events[:5], 20)) == 5
