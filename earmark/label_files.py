"""Write windows as files that Audacity and Raven show as labels over the sound."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from earmark import files, terminal


class LabelFormat(StrEnum):
    """The program that a label file is for."""

    audacity = "audacity"
    raven = "raven"


RAVEN_COLUMNS = (
    "Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)",
    "High Freq (Hz)", "Begin Path", "Begin File", "File Offset (s)", "Label", "Score",
)  # fmt: skip
#: Raven wants a box. We know no frequencies, so it spans what people hear.
BOX_HZ = (0, 20_000)
#: Bytes of a clip's name that its label file keeps: file systems allow 255.
LONGEST_NAME = 120


def write(rows: Iterable[dict[str, Any]], format: LabelFormat, place: Path) -> None:
    """Write one table for Raven, or for Audacity a folder with a file for each clip.

    Args:
        rows: windows in the order of their clips, each with the `file_begin_s` of its file.
    """
    with terminal.screen.status("Writing label files"):
        match format:
            case LabelFormat.raven:
                count, noun = _write_raven(rows, place), "row"
            case LabelFormat.audacity:
                count, noun = _write_audacity(rows, place), "file"
    terminal.tell(f"{terminal.count_of(count, noun)}: {place}")


def _write_raven(rows: Iterable[dict[str, Any]], file: Path) -> int:
    number = 0
    with files.opened(file) as out:
        out.write("\t".join(RAVEN_COLUMNS) + "\n")
        for number, row in enumerate(rows, 1):
            # Raven plays the files of a table one after the other, and counts on.
            begin_s = row["file_begin_s"] + row["start_s"]
            end_s = row["file_begin_s"] + row["end_s"]
            path = _on_one_line(row["uri"])
            cells = [number, "Spectrogram 1", row["channel"] or 1, begin_s, end_s, *BOX_HZ, path]
            cells += [path.rpartition("/")[2], row["start_s"]]
            cells += [_on_one_line(row["label"]), row["score"]]
            out.write("\t".join(map(str, cells)) + "\n")
    return number


def _write_audacity(rows: Iterable[dict[str, Any]], folder: Path) -> int:
    count = 0
    with files.whole(folder) as part:
        part.mkdir()
        for clip_id, windows in groupby(rows, itemgetter("clip_id")):
            name, lines = "", ""
            for row in windows:
                name = file_name(row["uri"].rpartition("/")[2])
                span = f"{row['start_s']:.3f}\t{row['end_s']:.3f}"
                where = f" channel {row['channel']}" if row["channel"] else ""
                lines += f"{span}\t{_on_one_line(row['label'])} {row['score']:.2f}{where}\n"
            part.joinpath(f"{clip_id}-{name}.txt").write_text(lines, encoding="utf-8")
            count += 1
    return count


def file_name(text: str, longest: int = LONGEST_NAME) -> str:
    """Return a text as a part of what a file can be called, anywhere."""
    name = re.sub(r"[^\w.-]", "_", text)
    return name.encode()[:longest].decode(errors="ignore")


def _on_one_line(text: str) -> str:
    # A tab or the end of a line would begin another cell or row.
    return " ".join(text.split())
