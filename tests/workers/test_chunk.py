"""A chunk in progress: patience, late clips, drain, and those that are given back."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from db.claims import Claim, Claimed
from earmark.core.clips import Failure, Postponed, Source, Success, Timings
from earmark.core.errors import Corrupt, DecoderCrashed, NotFound
from earmark.core.options import RunOptions
from tests.db.builders import success
from tests.workers.loading.world import until
from workers import chunk as chunks
from workers.chunk import ChunkInProgress
from workers.loading.cutter import Shape
from workers.loading.process import Facts, Job, Known, LoadedWindow, Suspected
from workers.models import RunPlan
from workers.scoring.best_labels import BEST

if TYPE_CHECKING:
    from workers.clip import ClipInWork

NEVER = threading.Event()

JOB = Job(1, Shape(1000, 1000, 1000, 1), by_url=False)


class Work:
    """Notes what a chunk asks for; the test ends clips itself."""

    def __init__(self) -> None:
        self.loaded: list[ClipInWork] = []
        self.alone: list[int] = []
        self.forgotten: list[int] = []
        self.drains = 0
        self.result: Any = None
        #: What the first run says of clips that another one follows, by their ids.
        self.verdicts: dict[int, Any] = {}
        #: Clips whose kept file is heard, and those that nobody wants.
        self.released: list[int] = []
        self.cancelled: list[int] = []

    def load(self, clips: list[ClipInWork], *, join: bool) -> None:
        self.loaded += clips
        self.joining = join
        for clip in clips:
            dealt = SimpleNamespace(
                clip=clip,
                job=replace(JOB, held=clip.held),
                release=partial(self.released.append, clip.clip_id),
                cancel=partial(self.cancelled.append, clip.clip_id),
            )
            clip.begin(dealt)  # type: ignore[arg-type]

    def quarantine(self, clip: ClipInWork) -> None:
        self.alone.append(clip.clip_id)

    def result_of(self, _known: Known, clip: ClipInWork) -> Any:
        return self.result and success(clip.clip_id)

    def in_work(self, clip_id: int) -> ClipInWork | None:
        return next((clip for clip in self.loaded if clip.clip_id == clip_id), None)

    def verdict(self, clip: ClipInWork) -> Any:
        return self.verdicts[clip.clip_id]

    def forget(self, clips: list[ClipInWork]) -> None:
        self.forgotten += [clip.clip_id for clip in clips]

    def drain(self) -> None:
        self.drains += 1

    def end(self, clip_id: int, end: Any) -> None:
        """End a clip, as a loader does from its thread."""
        clip = [clip for clip in self.loaded if clip.clip_id == clip_id][-1]
        assert clip._dealt is not None
        clip.ended(clip._dealt, end)


@pytest.fixture
def work() -> Work:
    return Work()


def begun(work: Work, clips: int = 3, crashes: int = 0, deadline_s: float = 600) -> ChunkInProgress:
    return begun_at(work, *range(1, clips + 1), crashes=crashes, deadline_s=deadline_s)


def begun_at(work: Work, *ids: int, crashes: int = 0, deadline_s: float = 600) -> ChunkInProgress:
    claimed = tuple(Claimed(number, f"/{number}", 1, crashes) for number in ids)
    plan = RunPlan(RunOptions(), None)  # type: ignore[arg-type]
    return ChunkInProgress(Claim(7, claimed), {0: plan}, deadline_s, work)


def test_a_chunk_is_over_when_its_last_clip_ends(work: Work) -> None:
    chunk = begun(work)
    outcomes = [success(1), Failure(2, NotFound(status=404)), success(3)]

    def end_all() -> None:
        for outcome in outcomes:
            work.end(outcome.clip_id, outcome)

    threading.Timer(0.05, end_all).start()
    chunk.run(60, NEVER)
    assert not chunk.unfinished
    assert chunk.collect() == outcomes
    assert chunk.given_back == {}


def test_patience_ends_before_slow_clips_which_go_on(work: Work) -> None:
    chunk = begun(work)
    work.end(1, success(1))
    chunk.run(0.01, NEVER)
    assert [outcome.clip_id for outcome in chunk.collect()] == [1]
    assert chunk.unfinished
    work.end(2, success(2))
    work.end(3, success(3))
    chunk.run(60, NEVER)
    assert [outcome.clip_id for outcome in chunk.collect()] == [2, 3]


def test_a_clip_whose_host_wants_a_pause_is_given_back_with_it(work: Work) -> None:
    chunk = begun(work, 1)
    work.end(1, Postponed(1, 30.0))
    chunk.run(60, NEVER)
    assert chunk.given_back == {1: 30.0}
    assert chunk.collect() == []


def test_a_clip_without_progress_is_given_back_and_one_with_it_is_not(work: Work) -> None:
    chunk = begun(work, 2, deadline_s=0.3)
    ended = threading.Event()

    def make_progress() -> None:
        _, moving = work.loaded
        while not ended.wait(0.02):
            moving.progressed_at = chunks.monotonic()

    thread = threading.Thread(target=make_progress)
    thread.start()
    try:
        chunk.run(2.0, NEVER)
    finally:
        ended.set()
        thread.join()
    assert chunk.given_back == {1: 0.0}
    assert work.forgotten == [1]
    assert chunk.unfinished


def test_a_stopping_worker_lets_begun_clips_end_and_gives_back_the_rest(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "DRAIN_S", 0.5)
    chunk = begun(work)
    stopping = threading.Event()
    stopping.set()
    work.end(1, Postponed(1, 0.0))
    work.end(2, success(2))
    chunk.run(60, stopping)
    chunk.give_back()
    assert work.drains == 1
    assert [outcome.clip_id for outcome in chunk.collect()] == [2]
    assert chunk.given_back == {1: 0.0, 3: 0.0}


def test_a_clip_that_was_given_back_has_no_outcome_afterwards(work: Work) -> None:
    chunk = begun(work, 1)
    (clip,) = work.loaded
    dealt = clip._dealt
    chunk.give_back()
    assert dealt is not None
    clip.ended(dealt, success(1))
    assert chunk.collect() == []
    assert not clip.wanted


def test_suspects_go_to_the_quarantine_at_once_or_when_loaders_die_of_them(work: Work) -> None:
    begun(work, 1, crashes=2)
    assert (work.alone, work.loaded) == ([1], [])
    chunk = begun(work, 1)
    work.end(1, Suspected())
    chunk.run(0.01, NEVER)
    assert work.alone == [1, 1]
    assert chunk.unfinished


def test_a_known_result_is_taken_and_one_that_is_gone_is_made_again(work: Work) -> None:
    chunk = begun(work, 1)
    known = Known(99, None, success(1).timings)
    work.end(1, known)
    chunk.run(0.01, NEVER)
    assert len(work.loaded) == 2
    work.result = True
    work.end(1, known)
    chunk.run(60, NEVER)
    assert [outcome.clip_id for outcome in chunk.collect()] == [1]


# copies of a clip at work ------------------------------------------------------------------------

COPY = Known(1, success(1).source, Timings(fetch_ms=5.0))


def score(work: Work, clip_id: int) -> None:
    """Have a clip of one window decoded and scored."""
    clip = work.in_work(clip_id)
    assert clip is not None
    dealt = clip._dealt
    assert dealt is not None
    first = success(clip_id)
    clip.decoded(dealt, Facts(first.source, first.facts, first.timings, 1, 0.0))
    window = LoadedWindow(dealt, 0, np.empty(1, np.float32), 0, 1)
    clip.scored(window, np.array([(1, 0.75)], BEST))


def test_copies_wait_for_the_first_one_and_share_its_result(work: Work) -> None:
    chunk, other = begun(work), begun_at(work, 4)
    work.end(2, COPY)
    chunk.run(0.01, NEVER)
    work.end(4, COPY)
    other.run(0.01, NEVER)
    assert chunk.collect() == other.collect() == []
    score(work, 1)
    work.end(3, COPY)
    chunk.run(60, NEVER)
    other.run(60, NEVER)
    first, *copies = [*chunk.collect(), *other.collect()]
    assert isinstance(first, Success)
    assert [copy.clip_id for copy in copies] == [2, 3, 4]
    for copy in copies:
        assert copy == replace(first, clip_id=copy.clip_id, timings=COPY.timings, reused=True)
    assert len(work.loaded) == 4


def test_a_copy_of_damaged_bytes_fails_alike_and_other_bytes_share_nothing(work: Work) -> None:
    chunk = begun(work)
    damaged = Failure(1, Corrupt(reason="its end is missing"), COPY.source)
    work.end(2, COPY)
    work.end(3, Known(1, Source("other", 7), COPY.timings))
    chunk.run(0.01, NEVER)
    work.end(1, damaged)
    chunk.run(0.01, NEVER)
    assert chunk.collect() == [damaged, replace(damaged, clip_id=2, timings=COPY.timings)]
    assert [clip.clip_id for clip in work.loaded] == [1, 2, 3, 3]
    assert not work.joining


@pytest.mark.parametrize(
    "end",
    [
        Failure(1, DecoderCrashed(), COPY.source),
        Failure(1, NotFound(status=404)),
        Postponed(1, 9.0),
        Suspected(),
        Known(99, COPY.source, COPY.timings),
        None,
    ],
)
def test_a_copy_goes_on_by_itself_if_the_first_one_has_no_result(work: Work, end: Any) -> None:
    """None: the chunk of the first one gives it back."""
    first, chunk = begun(work, 1), begun_at(work, 2)
    work.end(2, COPY)
    chunk.run(0.01, NEVER)
    assert [clip.clip_id for clip in work.loaded] == [1, 2]
    if end is None:
        first.give_back()
    else:
        work.end(1, end)
    chunk.run(0.01, NEVER)
    assert [clip.clip_id for clip in work.loaded] == [1, 2, 2]
    assert not work.joining
    work.end(2, success(2))
    chunk.run(60, NEVER)
    assert [outcome.clip_id for outcome in chunk.collect()] == [2]


def test_a_copy_is_not_stuck_while_the_first_one_makes_progress(work: Work) -> None:
    first, chunk = begun(work, 1), begun_at(work, 2)
    work.end(2, COPY)
    chunk.run(0.01, NEVER)
    clip, copy = work.loaded
    copy.progressed_at = -math.inf
    clip._note_progress()
    chunk.run(0.01, NEVER)
    assert chunk.unfinished
    copy.progressed_at = -math.inf
    chunk.run(0.01, NEVER)
    assert chunk.given_back == {2: 0.0}
    score(work, 1)
    chunk.run(0.01, NEVER)
    assert chunk.collect() == []
    assert len(first.collect()) == 1


# runs that follow another one --------------------------------------------------------------------


def following(work: Work, *, firsts: int = 2, others: int = 0) -> ChunkInProgress:
    """Begin clips from 1 up of a run, and the same from 11 up of one that follows it.

    The first run's clips from 21 up, which those from 31 up follow, are not in the chunk.
    """
    claimed = []
    for number in range(1, firsts + 1):
        claimed.append(Claimed(number, f"/{number}", 1, 0))
        claimed.append(Claimed(10 + number, f"/{number}", 1, 0, run_id=1, first=number))
    claimed += [
        Claimed(30 + number, f"/3{number}", 1, 0, run_id=1, first=20 + number)
        for number in range(1, others + 1)
    ]
    card = SimpleNamespace(labels=("dog", "siren"))
    first = RunPlan(RunOptions(), SimpleNamespace(card=card))  # type: ignore[arg-type]
    options = RunOptions(then_label=("siren",), then_min_score=0.75)
    then = RunPlan(options, None, run_id=1)  # type: ignore[arg-type]
    return ChunkInProgress(Claim(7, tuple(claimed)), {0: first, 1: then}, 600, work)


def test_a_clip_is_heard_once_the_first_run_lets_it_through(work: Work) -> None:
    chunk = following(work)
    assert [clip.held for clip in work.loaded] == [False, True, False, True]
    quiet = replace(success(2), predictions=success(2).predictions[1:])
    work.end(1, success(1))
    work.end(2, quiet)
    chunk.run(0.01, NEVER)
    assert (work.released, work.cancelled) == ([11], [12])
    unheard = Success(12, quiet.source, quiet.facts, (), unheard=True)
    assert chunk.collect() == [success(1), quiet, unheard]
    assert chunk.unfinished
    work.end(11, success(11))
    chunk.run(60, NEVER)
    assert chunk.collect() == [success(11)]
    assert not chunk.unfinished


def test_verdicts_come_as_soon_as_the_first_clips_have_ended(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHECK_EVERY_S", 600)
    chunk = following(work)
    thread = threading.Thread(target=chunk.run, args=(60, NEVER), daemon=True)
    thread.start()
    work.end(1, success(1))
    work.end(2, success(2))
    until(lambda: work.released == [11, 12])
    work.end(11, success(11))
    work.end(12, success(12))
    thread.join(60)
    assert not chunk.unfinished


@pytest.mark.parametrize("end", [NotFound(status=404), Corrupt(reason="its end is missing"), 9.0])
def test_a_clip_ends_as_that_of_the_first_run_does(work: Work, end: Any) -> None:
    chunk = following(work, firsts=1)
    if isinstance(end, float):
        work.end(1, Postponed(1, end))
        expected: tuple[Any, ...] = ([], {1: end, 11: end})
    else:
        work.end(1, Failure(1, end))
        expected = ([Failure(1, end), Failure(11, end)], {})
    chunk.run(60, NEVER)
    assert (chunk.collect(), chunk.given_back) == expected
    assert work.cancelled == [11]


def test_a_kept_file_that_loaders_die_of_is_given_back(work: Work) -> None:
    chunk = following(work, firsts=1)
    work.end(11, Suspected())
    work.end(1, success(1))
    chunk.run(60, NEVER)
    assert (work.alone, chunk.given_back) == ([], {11: 0.0})


def test_clips_that_the_first_run_has_decided_end_or_begin_at_once(work: Work) -> None:
    failed = Failure(32, NotFound(status=404))
    work.verdicts = {31: None, 32: failed, 33: Postponed(33, 5.0)}
    chunk = following(work, firsts=0, others=3)
    assert [(clip.clip_id, clip.held) for clip in work.loaded] == [(31, False)]
    assert (chunk.collect(), chunk.given_back) == ([failed], {33: 5.0})
    work.end(31, success(31))
    chunk.run(60, NEVER)
    assert chunk.collect() == [success(31)]
