"""Reviews: written, read, undone, exported and imported, and deleted with their run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from pydantic import ValidationError

from db import changes, reviews
from db.models import ReviewLog
from db.reviews import Review
from db.session import reading
from earmark import output, review_files
from earmark.core.errors import UsageError
from tests.db.builders import two_runs

if TYPE_CHECKING:
    from pathlib import Path


def said(clip_id: int, label: str = "siren", verdict: str = "right", **more: Any) -> Review:
    words = {"clip_id": clip_id, "label": label, "verdict": verdict, "reviewer": "ana"}
    return Review.model_validate(words | more)


def seen(engine: sa.Engine, run_id: int = 1) -> list[tuple[Any, ...]]:
    rows = reviews.reviews(engine, run_id)
    return [(row["clip_id"], row["label"], row["verdict"], row["reviewer"]) for row in rows]


def test_the_newest_word_on_a_label_counts_and_undo_takes_it_back(engine: sa.Engine) -> None:
    two_runs(engine)
    reviews.write(engine, 1, [said(1), said(2, "rain", "wrong"), said(2, "dog")])
    reviews.write(engine, 1, [said(1, verdict="wrong", reviewer="ben")])
    reviews.write(engine, 1, [said(1, start_s=2.0, end_s=4.0, channel=2)])
    rain, dog = (2, "rain", "wrong", "ana"), (2, "dog", "right", "ana")
    whole, part = (1, "siren", "wrong", "ben"), (1, "siren", "right", "ana")
    assert seen(engine) == [whole, part, dog, rain]
    assert reviews.undo(engine, 1, "ben") == 1
    assert seen(engine) == [part, part, dog, rain]
    assert reviews.undo(engine, 1, "ana") == 1
    assert reviews.undo(engine, 1, "ana") == 2
    assert reviews.undo(engine, 1, "ana") == 1
    assert (seen(engine), reviews.undo(engine, 1, "ana")) == ([], None)


def test_a_review_is_of_a_clip_of_the_run_and_readable(engine: sa.Engine) -> None:
    two_runs(engine)
    with pytest.raises(UsageError, match="1 of these clips are not in this run"):
        reviews.write(engine, 1, [said(1), said(5)])
    for bad in ({"label": " "}, {"label": "a\0b"}, {"reviewer": "x" * 201}, {"verdict": "maybe"}):
        with pytest.raises(ValidationError):
            said(1, **bad)
    assert seen(engine) == []


def test_what_is_exported_can_be_imported_also_twice_and_elsewhere(
    engine: sa.Engine, tmp_path: Path
) -> None:
    two_runs(engine)
    written = [said(1, "=cmd()", "wrong", sample_low=0.25, sample_high=1.0), said(2, "dog")]
    reviews.write(engine, 1, written)
    file = tmp_path / "reviews.csv"
    output.write(reviews.reviews(engine, 1), None, file)
    before = list(reviews.reviews(engine, 1))
    while reviews.undo(engine, 1, "ana"):
        pass
    file.write_text(file.read_text().replace("\n2,1", "\n77,1"))
    for _ in range(2):
        assert review_files.take(engine, 1, file, "me") == 2
    assert [{**row, "at": ""} for row in reviews.reviews(engine, 1)] == [
        {**row, "at": ""} for row in before
    ]


def test_a_file_names_clips_by_uri_and_is_taken_whole_or_not_at_all(
    engine: sa.Engine, tmp_path: Path
) -> None:
    two_runs(engine)
    file = tmp_path / "reviews.csv"
    head = "uri,label,verdict\nhttps://h0.org/0.wav,siren,right\n"
    for bad, sentence in (
        ("https://h0.org/0.wav,siren,maybe", "row 2: verdict: Input should be 'right'"),
        ("https://h0.org/9.wav,siren,right", "row 2: 0 clips of this run are called"),
        ("https://h0.org/0.wav", "row 2: label: Field required"),
    ):
        file.write_text(f"{head}{bad}\n")
        with pytest.raises(UsageError, match=sentence):
            review_files.take(engine, 1, file, "me")
    file.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="row 1: clip_id: Input should be a valid integer"):
        review_files.take(engine, 1, file, "me")
    file.write_text(head)
    assert review_files.take(engine, 1, file, "me") == 1
    assert seen(engine) == [(1, "siren", "right", "me")]


def test_nobody_is_shown_what_another_person_hears(engine: sa.Engine) -> None:
    two_runs(engine)
    queue: list[Any] = [(1, (0.0, 1.0)), (2, (0.0, 1.0)), (3, ())]

    def handed(who: str, *holding: int) -> int | None:
        return reviews.hand_out(engine, 1, "siren", who, queue, holding)

    assert (handed("ana"), handed("ben"), handed("ana", 1)) == (1, 2, 3)
    assert (handed("ben", 2), handed("ana")) == (None, 1)
    reviews.say(engine, 1, said(1, verdict="wrong"), "dog")
    assert handed("ana") == 3
    rows = [(row["label"], row["verdict"], row["sample_low"]) for row in reviews.reviews(engine, 1)]
    assert rows == [("dog", "right", None), ("siren", "wrong", 0.0)]
    assert reviews.counts(engine, 1) == {"dog": {"right": 1}, "siren": {"wrong": 1}}
    assert (reviews.undo(engine, 1, "ana"), seen(engine)) == (1, [])


def test_reviews_are_deleted_with_their_run(engine: sa.Engine) -> None:
    two_runs(engine)
    reviews.write(engine, 1, [said(1)])
    reviews.write(engine, 2, [said(5)])
    changes.cancel(engine, 1)
    changes.prune(engine, 1)
    with reading(engine) as connection:
        assert list(connection.scalars(sa.select(ReviewLog.run_id))) == [2]
