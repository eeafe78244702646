"""Reads reviews from a CSV file, such as `earmark reviews RUN -o FILE` writes it."""

from __future__ import annotations

import csv
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from more_itertools import first

from db import reviews
from db.reviews import Review, Verdict
from earmark.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import sqlalchemy as sa

NUMBERS = ("start_s", "end_s", "sample_low", "sample_high")


def take(engine: sa.Engine, run_id: int, file: Path, reviewer: str) -> int:
    """Add the reviews of a file to a run, all or none; return how many are new.

    Args:
        reviewer: who said what has no `reviewer` of its own.

    Raises:
        UsageError: the file cannot be read, or a line is wrong.
    """
    rows = _rows(file)
    by_uri: dict[str, list[int]] = {}
    if any(row.get("uri") for _, row in rows):
        by_uri = reviews.ids_by_uri(engine, run_id)
    said = []
    for line, row in rows:
        try:
            review = _review(row, by_uri, reviewer)
            review.check()
        except (ValueError, UsageError) as error:
            raise UsageError(reason=f"{file}, line {line}: {error}") from error
        said.append(review)
    return reviews.write(engine, run_id, said)


def _rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            lines = csv.DictReader(text, strict=True, restval="")
            rows = [(lines.line_num, row) for row in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(reason=f"{file} cannot be read as CSV: {error}") from error
    if not {"label", "verdict"} <= {*(lines.fieldnames or ())}:
        raise UsageError(
            reason=f"{file} needs the columns label, verdict, and clip_id or uri, such as `earmark"
            " reviews RUN -o reviews.csv` writes them."
        )
    return rows


def _review(row: Mapping[str, str], by_uri: Mapping[str, list[int]], reviewer: str) -> Review:
    verdict = row["verdict"]
    if verdict not in ("right", "wrong", "unsure"):
        raise ValueError(f"the verdict is right, wrong or unsure, not {verdict!r}.")
    return Review(
        clip_id=_clip_id(row, by_uri),
        label=_plain(row["label"]),
        verdict=Verdict(verdict),
        reviewer=_plain(row.get("reviewer") or reviewer),
        at=_time(row.get("at") or ""),
        channel=int(row["channel"]) if row.get("channel") else None,
        **{name: float(row[name]) for name in NUMBERS if row.get(name)},
    )


def _clip_id(row: Mapping[str, str], by_uri: Mapping[str, list[int]]) -> int:
    clip_id = int(row["clip_id"]) if row.get("clip_id") else None
    if clip_id and not row.get("uri"):
        return clip_id
    # The file may be of another database, where ids are others.
    uri = _plain(row.get("uri", ""))
    ids = by_uri.get(uri, [])
    if clip_id in ids:
        return clip_id
    if len(ids) != 1:
        raise ValueError(f"{len(ids)} clips of this run are called {uri!r}: give the clip_id.")
    return first(ids)


def _time(text: str) -> float | None:
    if not text:
        return None
    time = datetime.fromisoformat(text)
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _plain(text: str) -> str:
    # Our CSV has an apostrophe before what a spreadsheet would take for a formula.
    return text[1:] if text[:1] == "'" and text[1:2] in tuple("=+-@\t\r") else text
