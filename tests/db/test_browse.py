"""Pages of clips have each clip once and in order, with any filter; samples are even."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from db import browse, charts, runs
from db.browse import Wanted
from earmark.core.errors import UsageError
from tests.db.builders import two_runs

if TYPE_CHECKING:
    import sqlalchemy as sa


def every(engine: sa.Engine, wanted: Wanted) -> list[str]:
    """Return the scores, or the error codes, of the clips of all pages of `march`."""
    run_id, found, after = runs.find_run(engine, "march").id, [], ""
    for _ in range(9):
        page = browse.page(engine, run_id, wanted, after)
        found += [clip.error_code or f"{clip.score:.2f}" for clip in page.clips]
        assert "oslo" not in wanted.text or {clip.meta["city"] for clip in page.clips} <= {"Oslo"}
        if page.next is None:
            return found
        after = page.next
    raise AssertionError(found)


ALL = [
    (Wanted(), ["0.45", "0.80", "0.95", "not_found"]),
    (Wanted(label="rain"), ["0.95", "0.45"]),
    (Wanted(label="rain", min_score=0.5), ["0.95"]),
    (Wanted(max_score=0.6), ["0.45"]),
    (Wanted(error="failed"), ["not_found"]),
    (Wanted(error="dns"), []),
    (Wanted(text="H0.org/", min_score=0.99), []),
]


def test_pages_have_each_clip_once(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    two_runs(engine)
    monkeypatch.setattr(browse, "READ_FOR_PAGE", 2)
    for page in (1, 2, 50):
        monkeypatch.setattr(browse, "PAGE", page)
        assert len(every(engine, Wanted(text="oslo"))) == 2
        for wanted, clips in ALL:
            found = every(engine, wanted)
            assert (found if wanted.label else sorted(found)) == clips, (page, wanted)


def test_an_invalid_page_key_is_refused(engine: sa.Engine) -> None:
    two_runs(engine)
    for after in ("x", "1", "1~2~3", "~"):
        with pytest.raises(UsageError):
            browse.page(engine, 1, Wanted(), after)


def test_a_sample_is_spread_over_the_run_and_its_charts_count_every_clip(engine: sa.Engine) -> None:
    two_runs(engine)
    march = runs.find_run(engine, "march").id
    assert len(browse.sample(engine, march, 4)) == 4
    first, third = browse.sample(engine, march, 2)
    assert third - first in (1, 2)
    assert charts.score_histogram(engine, march, 10) == [0, 0, 0, 0, 1, 0, 0, 0, 1, 1]
    seconds, counts = charts.throughput(engine, march, 4)
    assert (seconds, counts) == (0.0, []) or sum(counts) == 4


def test_details_of_a_clip(engine: sa.Engine) -> None:
    two_runs(engine)
    first, *_ = browse.details(engine, browse.sample(engine, runs.find_run(engine, "march").id, 4))
    assert [label for label, _ in first["top"]] == ["siren", "dog"]
    assert [(start, label) for _, start, _, label, _ in first["windows"]] == [
        (0, "siren"), (4, "siren"), (8, "dog"), (12, "siren"),
    ]  # fmt: skip
    assert (first["label"], first["meta"]) == ("siren", {"city": "Rome"})
