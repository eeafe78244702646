"""The commands of docs/start/own_detector.md, from recordings to a detector of one's own."""

from __future__ import annotations

import csv
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from earmark.demo import EXAMPLES
from tests.test_docs import DOCS, commands_of

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Earmark

HEARD = ("dog.ogg", "siren.wav", "mixed.m4a")


def test_the_commands_of_the_page_lead_to_a_detector(earmark: Earmark) -> None:
    prepare(earmark.folder)
    printed = {}
    for line in commands_of((DOCS / "start" / "own_detector.md").read_text()):
        printed[line] = earmark(*shlex.split(line)[1:]).stdout
    shown = {" ".join(line.split()[1:3]): text for line, text in printed.items()}
    written = (earmark.folder / "like-a-siren.csv").read_text()
    nearest = list(csv.DictReader(written.splitlines()))
    assert Path(nearest[0]["uri"]).name == "siren.wav"
    figures = {row["label"]: row for row in csv.DictReader(shown["train labelled"].splitlines())}
    assert float(figures["siren"]["average_precision"]) > 0.8
    found = csv.DictReader(shown["results archive-2"].splitlines())
    assert {Path(row["uri"]).name for row in found} <= {"siren.wav", "mixed.m4a"}
    both = "SELECT run, uri, label, score FROM top_k WHERE run IN ('archive-2', 'new') AND rank = 1"
    rows = csv.DictReader(earmark("query", both, "--format", "csv").stdout.splitlines())
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        scores.setdefault((row["uri"], row["label"]), []).append(float(row["score"]))
    assert {len(pair) for pair in scores.values()} == {2}
    assert all(abs(one - other) < 1e-4 for one, other in scores.values())


def prepare(folder: Path) -> None:
    (folder / "recordings").mkdir()
    for name in HEARD:
        shutil.copy(EXAMPLES / name, folder / "recordings" / name)
    shutil.copy(EXAMPLES / "siren.wav", folder / "siren.wav")
    with (EXAMPLES / "long.csv").open() as file:
        parts = list(csv.DictReader(file))
    with (folder / "labelled.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["url", "sound", "start_s", "end_s"])
        for name, what, end_s in (("siren.wav", "siren", 6), ("dog.ogg", "dog", 5)):
            for start_s in range(end_s):
                rows.writerow([EXAMPLES / name, what, start_s, start_s + 1])
        for part in parts:
            rows.writerow([EXAMPLES / "long.ogg", part["label"], part["start_s"], part["end_s"]])
