"""Monitoring: Flower in a browser, metrics, readiness and JSON logs."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from earmark import flower
from earmark.core.errors import BY_CODE, UsageError
from earmark.demo import EXAMPLES
from tests.end_to_end.conftest import TIMEOUT_S, Earmark, finished_chunks, get_json, wait_until
from tests.servers import answers, free_port, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

DEPLOY = Path(__file__).parents[2] / "deploy"
SOUNDS = ("dog.ogg", "siren.wav", "piano.flac", "broken.wav", "mixed.m4a")
CLIPS, CHUNK = 40, 8
SECRET = "sig=do-not-tell"


class Watched:
    """A machine with `earmark up`, after one run of good and bad clips."""

    def __init__(self, folder: Path, base: str) -> None:
        self.folder = folder
        self.flower, self.metrics = free_port(), free_port()
        settings = {
            "EARMARK_FETCH__ALLOW_NETWORKS": "127.0.0.0/8",
            "EARMARK_FETCH__PORTS": base.rpartition(":")[2],
            "EARMARK_WORKER__METRICS_PORT": str(self.metrics),
            "EARMARK_WORKER__LOG_JSON": "true",
        }
        urls = [
            f"{base}/{SOUNDS[number % len(SOUNDS)]}?{SECRET}{number}" for number in range(CLIPS)
        ]
        (folder / "list.txt").write_text("\n".join(urls) + "\n")
        self.earmark = Earmark(settings, folder)

    def work(self) -> None:
        self.earmark.start("earmark", "up", "--flower-port", str(self.flower))
        wait_until(lambda: answers(f"{self.worker}/ready") and answers(f"{self.page}/healthcheck"))
        # Flower would never see a chunk that began before Flower listens.
        wait_until(lambda: bool(get_json(f"{self.page}/api/workers?refresh=1")))
        self.earmark("submit", "list.txt", "--chunk-size", str(CHUNK), "--watch")
        wait_until(lambda: finished_chunks(self.flower) >= CLIPS // CHUNK)

    @property
    def page(self) -> str:
        return f"http://127.0.0.1:{self.flower}"

    @property
    def worker(self) -> str:
        return f"http://127.0.0.1:{self.metrics}"

    @property
    def log(self) -> list[dict[str, Any]]:
        (log,) = self.folder.glob("data/clips-*/worker-1.log")  # named after the queue
        return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with serving(EXAMPLES) as base:
        watched = Watched(tmp_path_factory.mktemp("watched"), base)
        try:
            watched.work()
            yield watched
        finally:
            watched.earmark.end()


def samples(watched: Watched) -> dict[str, float]:
    with urllib.request.urlopen(f"{watched.worker}/metrics", timeout=TIMEOUT_S) as answer:
        lines = answer.read().decode().splitlines()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


def test_flower_shows_the_worker_and_every_chunk_as_done(watched: Watched) -> None:
    assert list(get_json(f"{watched.page}/api/workers?status=1").values()) == [True]
    tasks = list(get_json(f"{watched.page}/api/tasks").values())
    assert len(tasks) == CLIPS // CHUNK
    assert {task["state"] for task in tasks} == {"SUCCESS"}
    results = [json.loads(task["result"].replace("'", '"')) for task in tasks]
    for result in results:
        # On a busy machine some clips end after their chunk's message. Errors are told by code.
        ways = {"done", "failed", "late"}
        assert sum(result.get(way, 0) for way in ways) == CHUNK
        codes = set(result) - ways
        assert codes <= BY_CODE.keys()
        assert sum(result[code] for code in codes) == result.get("failed", 0)
    assert all(
        task["args"].startswith(f"(run-1, {CHUNK} clips: http://127.0.0.1") for task in tasks
    )
    assert all(SECRET not in json.dumps(task) for task in tasks)


def test_flower_shows_every_chunk_in_a_browser_as_finished(
    watched: Watched, browser: Browser
) -> None:
    page = browser.new_page(viewport={"width": 1500, "height": 700})
    page.goto(f"{watched.page}/tasks")
    rows = page.locator("#tasks-table tbody tr")
    rows.nth(CLIPS // CHUNK - 1).wait_for()
    shown = rows.all_inner_texts()
    page.screenshot(path=watched.folder / "flower.png")
    page.close()
    assert len(shown) == CLIPS // CHUNK
    assert all(
        "SUCCESS" in row and "run-1, 8 clips" in row and ("'done'" in row or "'late'" in row)
        for row in shown
    )
    assert not any("RECEIVED" in row for row in shown)


def test_flower_is_read_only(watched: Watched) -> None:
    asked = urllib.request.Request(
        f"{watched.page}/api/task/async-apply/earmark.classify", data=b'{"args": []}'
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(asked, timeout=TIMEOUT_S)


def test_a_worker_exports_outcomes_and_stage_times_to_prometheus(
    watched: Watched,
) -> None:
    found = samples(watched)
    assert found['earmark_clips_total{outcome="done"}'] == CLIPS * 4 / 5
    assert found['earmark_clips_total{outcome="failed"}'] == CLIPS / 5
    assert found['earmark_errors_total{code="not_audio"}'] == CLIPS / 5
    # Copies of a sound share its result; each of the four is classified once at least.
    assert found["earmark_audio_seconds_total"] > 20
    assert found["earmark_batch_windows_sum"] >= found["earmark_batch_windows_count"] > 0
    assert all(found[f'earmark_stage_seconds_total{{stage="{stage}"}}'] > 0 for stage in STAGES)
    # The windows of one clip may be on all lanes at once.
    most = found["earmark_model_lanes"] * found['earmark_stage_seconds_total{stage="classify"}']
    assert 0 < found["earmark_model_seconds_total"] <= most
    assert found["earmark_model_wait_seconds_total"] > 0
    assert found["earmark_queue_chunks"] == found["earmark_waiting_audio_bytes"] == 0


STAGES = ("fetch", "decode", "classify", "store")


@pytest.mark.parametrize("name", ["grafana-dashboard.json", "prometheus-alerts.yml"])
def test_dashboard_and_alerts_use_only_exported_metrics(watched: Watched, name: str) -> None:
    told = {sample.partition("{")[0] for sample in samples(watched)}
    asked = set(re.findall(r"\bearmark_\w+", (DEPLOY / name).read_text()))
    assert len(asked) > 4
    assert asked - told <= {name for name in asked if name.startswith("earmark_gpu_")}


def test_flower_exports_its_chunks_to_prometheus(watched: Watched) -> None:
    with urllib.request.urlopen(f"{watched.page}/metrics", timeout=TIMEOUT_S) as answer:
        told = answer.read().decode()
    succeeded = re.findall(
        r'flower_events_total\{task="earmark.classify",type="task-succeeded".*\} ([\d.]+)', told
    )
    assert [float(count) for count in succeeded] == [CLIPS / CHUNK]


def test_a_worker_logs_one_json_line_a_chunk(watched: Watched) -> None:
    chunks = [line for line in watched.log if line.get("action") == "chunk_done"]
    tasks = set(get_json(f"{watched.page}/api/tasks"))
    assert {line["chunk_id"] for line in chunks} == tasks
    assert {line["run_id"] for line in chunks} == {1}
    assert sum(line["done"] for line in chunks) == CLIPS * 4 // 5
    assert all(
        line["level"] == "info" and line[f"{stage}_s"] >= 0 for line in chunks for stage in STAGES
    )
    assert SECRET not in json.dumps(watched.log)


@pytest.mark.parametrize(
    ("address", "basic_auth"), [("0.0.0.0", None), ("", None), ("0.0.0.0", "someone:")]
)
def test_flower_needs_a_password_on_other_addresses(address: str, basic_auth: str | None) -> None:
    with pytest.raises(UsageError, match="USER:PASSWORD"):
        flower.arguments(5555, address, basic_auth)


def test_each_alert_has_a_summary_and_a_duration() -> None:
    groups = yaml.safe_load((DEPLOY / "prometheus-alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 4
    assert all(rule["annotations"]["summary"] and rule["for"] for rule in rules)
