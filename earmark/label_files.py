"""Write windows as files that Audacity and Raven show as labels over the sound."""

from __future__ import annotations

import csv
import re
from enum import StrEnum
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from earmark import output

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class LabelFormat(StrEnum):
    """The program that a label file is for."""

    audacity = "audacity"
    raven = "raven"


RAVEN_COLUMNS = (
    "Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)",
    "High Freq (Hz)", "Begin Path", "Label", "Score",
)  # fmt: skip
#: Raven wants a box. We know no frequencies, so it spans what people hear.
BOX_HZ = (0, 20_000)
#: Characters of a clip's name that its label file keeps.
LONGEST_NAME = 80


def write(rows: Iterable[dict[str, Any]], format: LabelFormat, place: Path) -> None:
    """Write one table for Raven, or for Audacity a folder with a file for each clip."""
    if format is LabelFormat.raven:
        _write_raven(rows, place)
    else:
        _write_audacity(rows, place)


def _write_raven(rows: Iterable[dict[str, Any]], file: Path) -> None:
    with output.opened(file) as out:
        table = csv.writer(out, delimiter="\t", lineterminator="\n")
        table.writerow(RAVEN_COLUMNS)
        for number, row in enumerate(rows, 1):
            span = (row["start_s"], row["end_s"], *BOX_HZ)
            table.writerow(
                (number, "Spectrogram 1", 1, *span, row["uri"], row["label"], row["score"])
            )


def _write_audacity(rows: Iterable[dict[str, Any]], folder: Path) -> None:
    with output.whole(folder) as part:
        part.mkdir()
        for clip_id, windows in groupby(rows, itemgetter("clip_id")):
            name, lines = "", ""
            for row in windows:
                name = re.sub(r"[^\w.-]", "_", row["uri"].rpartition("/")[2])[:LONGEST_NAME]
                span = f"{row['start_s']:.3f}\t{row['end_s']:.3f}"
                lines += f"{span}\t{row['label']} {row['score']:.2f}\n"
            part.joinpath(f"{clip_id}-{name}.txt").write_text(lines, encoding="utf-8")
