"""`earmark plan`: classifies a sample of a list and keeps nothing."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING
from zipfile import ZipFile

import pytest

from earmark.demo import EXAMPLES
from earmark.plan import Plan, sentences
from tests.workers.scoring import graphs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.end_to_end.conftest import Earmark


def test_a_plan_estimates_the_list_and_leaves_no_files(
    earmark: Earmark, serve: Callable[..., str], tmp_path: Path
) -> None:
    base = serve(EXAMPLES, delay_s=0.1)
    earmark.settings["EARMARK_FETCH__ALLOW_NETWORKS"] = "127.0.0.1/32"
    earmark.settings["EARMARK_FETCH__PORTS"] = base.rpartition(":")[2]
    earmark.settings["TMPDIR"] = str(tmp_path / "temporary")
    (tmp_path / "temporary").mkdir()
    urls = [f"{base}/{'dog.ogg' if number % 4 else 'gone.ogg'}?{number}" for number in range(1000)]
    (earmark.folder / "list.csv").write_text("url\n" + "\n".join(urls) + "\n")
    words = ("plan", "list.csv", "--sample", "160", "--within", "2s", "--format", "json")
    planned = json.loads(earmark(*words).stdout)
    size = (EXAMPLES / "dog.ogg").stat().st_size
    assert (planned["clips"], planned["sampled"]) == (1000, 160)
    assert planned["done"] + planned["errors"][0]["clips"] == 160
    assert 90 < planned["done"] < 150
    assert planned["errors"][0]["code"] == "not_found"
    assert planned["bytes"] == pytest.approx(1000 * planned["done"] / 160 * size, rel=0.01)
    assert planned["hosts"][0]["host"] == base.partition("://")[2]
    assert planned["eta_s"] == pytest.approx(1000 / planned["clips_per_s"])
    assert planned["workers"] == -(-planned["eta_s"] // 2)
    assert planned["gpu_cores"] == math.ceil(1000 / planned["core_clips_s"] + 1.5)
    # The lock is the worker's name, which the next worker of this machine has.
    left = {file.suffix for file in (tmp_path / "temporary").glob("earmark*")}
    assert left <= {".lock"}
    assert not (earmark.folder / "data").exists()
    assert earmark.left_running() == []


def test_a_plan_of_a_few_clips_and_a_container_has_no_speed(earmark: Earmark) -> None:
    with ZipFile(earmark.folder / "two.zip", "w") as container:
        for name in ("dog.ogg", "piano.flac"):
            container.write(EXAMPLES / name, name)
    graphs.save(earmark.folder / "other")
    models = ("--model", "starter", "--model", "./other")
    shown = earmark("plan", str(EXAMPLES), "two.zip", *models).stdout
    assert "licence of the model: not stated, mit" in shown
    assert "12 clips, 12 of them tried" in shown
    assert "speed: 12 clips are too few" in shown
    assert shown.count("not_audio") == 1


@pytest.mark.parametrize("span", ["soon", "0h", "8", "-1h"])
def test_an_invalid_time_span_is_refused(earmark: Earmark, span: str) -> None:
    assert (
        "say 90s, 30min, 8h or 2d"
        in earmark("plan", str(EXAMPLES), "--within", span, status=2).stderr
    )


def test_a_plan_of_an_empty_list_is_refused(earmark: Earmark) -> None:
    (earmark.folder / "empty.txt").write_text("\n# nothing\n")
    assert "no clip" in earmark("plan", "empty.txt", status=2).stderr


def test_a_sample_without_failures_still_has_a_margin() -> None:
    found = Plan(
        clips=1_000_000, refused_lines=2, sampled=200, done=200, bytes=10**11, audio_s=5e6,
        clips_per_s=12.5, eta_s=80_000.0, workers=3, core_clips_s=142.4, gpu_cores=9,
        hosts=[], errors=[],
    )  # fmt: skip
    assert list(sentences(found, "8h")) == [
        "1000000 clips (2 lines refused), 200 of them tried on this machine; nothing is kept.",
        "success: 100.0%, give or take 1.4%",
        "licence of the model: not stated",
        "volume: 100.0GB, 1388.9 hours of audio",
        "decoding: 142 clips/s by a core, as Ogg Vorbis; a GPU of 1000 clips/s needs 9 cores",
        "speed: 12.5 clips/s by one worker here, 22 h 13 min for all",
        "within 8h: 3 such workers",
    ]
