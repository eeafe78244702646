"""Reads reviews from a CSV file, such as `earmark review RUN -o FILE` writes it."""

from __future__ import annotations

import csv
from pathlib import Path

import sqlalchemy as sa
from pydantic import ValidationError

from db import reviews
from db.rows import select
from earmark.core.errors import UsageError

SELECT_URIS = "SELECT id, coalesce(display_uri, uri) AS uri FROM clips WHERE run_id = :run_id"


def take(engine: sa.Engine, run_id: int, file: Path, reviewer: str) -> int:
    """Add the reviews of a file to a run, all or none; return how many.

    Args:
        reviewer: who said what has no `reviewer` of its own.

    Raises:
        UsageError: the file cannot be read, or a line is wrong.
    """
    ids: dict[str, list[int]] = {}
    for row in select(engine, SELECT_URIS, run_id=run_id):
        ids.setdefault(row["uri"], []).append(row["id"])
    said: list[reviews.Review] = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            for row in csv.DictReader(text, strict=True):
                given = {name: _plain(value) for name, value in row.items() if name and value}
                clip_id = _clip_id(given, ids)
                if clip_id != given.get("clip_id"):
                    # Clips were drawn by their ids: here it is no random sample.
                    given = {k: v for k, v in given.items() if not k.startswith("sample_")}
                given["clip_id"] = clip_id
                said.append(reviews.Review.model_validate({"reviewer": reviewer, **given}))
    except ValidationError as error:
        wrong = error.errors()[0]
        reason = f"{file}, row {len(said) + 1}: {wrong['loc'][0]}: {wrong['msg']}."
        raise UsageError(reason=reason) from error
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise UsageError(reason=f"{file}, row {len(said) + 1}: {error}") from error
    reviews.write(engine, run_id, said)
    return len(said)


def _clip_id(row: dict[str, str], ids: dict[str, list[int]]) -> str:
    """Return the clip that a row names; where its file is of another database, by URI."""
    named = ids.get(row.get("uri", ""), [])
    clip_id = row.get("clip_id", "")
    if "uri" not in row or clip_id in map(str, named):
        return clip_id
    if len(named) != 1:
        raise ValueError(f"{len(named)} clips of this run are called {row['uri']!r}.")
    return str(named[0])


def _plain(text: str) -> str:
    # Our CSV has an apostrophe before what a spreadsheet would take for a formula.
    return text[1:] if text[:1] == "'" and text[1:2] in tuple("=+-@\t\r") else text
