"""A data set's list, run as it is: labels at the file's times, and the cure for what is wrong."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from earmark.demo import EXAMPLES

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Earmark

#: long.ogg of the examples: rain, from 10 s on a dog.
AUDIOSET = (
    "# Segments csv created Sun Mar  5 10:54:31 2017\n"
    "# YTID, start_seconds, end_seconds, positive_labels\n"
    'long, 0.000, 10.000, "/m/06mb1,/t/dd00038"\n'
    'long, 10.000, 15.000, "/m/0bt9lr"\n'
    'gone, 2.000, 4.000, "/m/0bt9lr"\n'
)


def test_audiosets_csv_runs_as_it_is_with_an_odd_file_beside_it(earmark: Earmark) -> None:
    shutil.copy(EXAMPLES / "long.ogg", earmark.folder / "long.ogg")
    (earmark.folder / "Thumbs.db").write_bytes(bytes(range(256)))
    (earmark.folder / "eval.csv").write_text(AUDIOSET)
    ended = earmark("run", "eval.csv", "Thumbs.db", "--template", "{YTID}.ogg", "--name", "mine")
    assert "Thumbs.db: neither audio nor a list" in ended.stderr
    assert f"the first at {earmark.folder}/gone.ogg" in ended.stderr
    labels = {}
    for line in earmark("results", "mine", "--format", "jsonl").stdout.splitlines():
        result = json.loads(line)
        labels[result["start_s"], result["end_s"]] = result["label"]
    assert labels == {(0.0, 10.0): "rain", (10.0, 15.0): "dog"}
    windows = earmark("query", "SELECT min(start_s), max(end_s) FROM windows", "--format", "csv")
    assert windows.stdout.split()[1] == "0.0,15.0"
    assert "Back to work: 3 clips" in earmark("retry", "mine", "--done").stderr
