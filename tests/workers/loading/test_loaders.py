"""Clips dealt to real loaders: their windows come once, whatever dies or hangs on the way."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

from earmark.core.clips import EACH, Part, Postponed
from earmark.core.settings import Settings
from tests.servers import copied_sqlite
from tests.workers.decoding import bad_audio
from tests.workers.loading.world import (
    SHAPE,
    Clip,
    Queue,
    deal,
    job,
    score_all,
    settings_for,
    until,
)
from workers.loading import loaders as loading
from workers.loading import process
from workers.loading.cutter import Shape
from workers.loading.loaders import Loaders
from workers.loading.process import Suspected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.faults.nursery import Nursery
    from workers.loading.process import Job

pytestmark = pytest.mark.slow

#: The bytes of a window.
WINDOW = SHAPE.size * 4


#: The loaders of a test, forked or not.
STARTED: list[int] = []
START = process._start


@pytest.fixture
def forked(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have loaders forked: each would import the database for a second."""
    STARTED.clear()

    def start(*descriptors: int) -> Any:
        child = nursery.start_loader(*descriptors)
        STARTED.append(child.pid)
        return child

    monkeypatch.setattr(process, "_start", start)


@pytest.fixture
def make(tmp_path: Path, forked: None) -> Iterator[Callable[..., tuple[Loaders, Queue]]]:
    """Start loaders with settings of a test's own."""
    made: list[Loaders] = []
    url = copied_sqlite(tmp_path / "earmark.db")

    def start(**groups: Any) -> tuple[Loaders, Queue]:
        queue = Queue()
        made.append(Loaders(settings_for(tmp_path, url, **groups), queue))
        made[-1].wait_until_ready()
        return made[-1], queue

    yield start
    for loaders in made:
        loaders.close()


@pytest.fixture
def one(make: Any) -> tuple[Loaders, Queue]:
    """One loader with one decoder, and room for four windows."""
    loaders, queue = make(worker={"in_flight_bytes": 4 * WINDOW})
    return loaders, queue


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    return [each for each in processes if each.status() != psutil.STATUS_ZOMBIE]


def loader_processes() -> list[psutil.Process]:
    return alive(psutil.Process(pid) for pid in STARTED if psutil.pid_exists(pid))


def decoder_processes() -> list[psutil.Process]:
    return [each for loader in loader_processes() for each in alive(loader.children())]


def sound(folder: Path, number: int, seconds: float) -> Clip:
    """Write a file in which each sample is its second, counted from 1."""
    samples = np.arange(int(8000 * seconds)) // 8000 + 1
    path = folder / f"{number}.wav"
    path.write_bytes(bad_audio.wav(samples.astype("<i2").tobytes(), rate=8000))
    return Clip(number, str(path))


def sounds(folder: Path, count: int, seconds: float = 0.5) -> list[Clip]:
    """Write files that each hold one value of their own; return their clips."""
    clips = []
    for number in range(1, count + 1):
        samples = np.full(int(8000 * seconds), number, "<i2")
        path = folder / f"{number}.wav"
        path.write_bytes(bad_audio.wav(samples.tobytes(), rate=8000))
        clips.append(Clip(number, str(path)))
    return clips


def test_a_command_line_names_no_token(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_start", START)
    make(fetch={"tokens": {"https://clips.test": "secret"}}, worker={"decoders": 1})
    started = alive(psutil.Process().children(recursive=True))
    lines = [" ".join(each.cmdline()) for each in started]
    for name in ("workers.loading.loader", "workers.decoding.child"):
        (line,) = [line for line in lines if name in line]
        assert "secret" not in line


def test_each_clip_comes_with_its_samples_and_its_facts(make: Any, tmp_path: Path) -> None:
    loaders, queue = make()
    clips = sounds(tmp_path, 20)
    deal(loaders, job(), clips)
    score_all(loaders, queue, clips)
    for clip in clips:
        (samples,) = clip.scores
        assert np.array_equal(samples, np.full(4000, clip.clip_id / 32768, np.float32))
        assert clip.facts is not None
        assert clip.facts.audio.duration_s == 0.5
        assert clip.facts.source.bytes == (tmp_path / f"{clip.clip_id}.wav").stat().st_size


def test_copies_of_a_clip_at_work_in_any_loader_name_it(make: Any, tmp_path: Path) -> None:
    loaders, queue = make(worker={"loaders": 2, "decoders": 2})
    first, other = sounds(tmp_path, 2)
    clips = []
    for number in range(10, 16):
        copy = tmp_path / f"{number}.wav"
        copy.write_bytes(Path(first.uri).read_bytes())
        clips.append(Clip(number, str(copy)))
    clips.append(Clip(20, clips[0].uri))
    span = Clip(16, first.uri, Part(0.1, 0.3))
    page = tmp_path / "page.wav"
    page.write_text("<html>")
    failing, again = Clip(17, str(page)), Clip(18, str(page))
    deal(loaders, job(joins=True), [first])
    until(lambda: queue.waiting)
    deal(loaders, job(joins=True), [*clips, span, other, failing])
    until(lambda: all(clip.end for clip in (*clips, failing)))
    assert {clip.end.clip_id for clip in clips} == {first.clip_id}
    assert {clip.deals[0].loader for clip in clips} == set(loaders._loaders)
    deal(loaders, job(joins=False), clips[:1])
    deal(loaders, job(joins=True), [again])
    deal(loaders, job(run_id=2, joins=True), clips[1:2])
    score_all(loaders, queue, [first, other, span, *clips[:2]])
    assert clips[0].facts is not None
    assert clips[0].facts.source == clips[2].end.source
    until(lambda: again.end)
    assert again.end.error.code == "not_audio"


# channels -----------------------------------------------------------------------------------------


def choir(folder: Path, channels: int, seconds: float) -> str:
    """Write a file in which each sample is the number of its channel."""
    frames = np.tile(np.arange(1, channels + 1, dtype="<i2"), int(8000 * seconds))
    path = folder / f"{channels}.wav"
    path.write_bytes(bad_audio.wav(frames.tobytes(), rate=8000, channels=channels))
    return str(path)


def test_thirty_two_channels_come_window_by_window_through_little_memory(
    one: Any, tmp_path: Path
) -> None:
    loaders, queue = one
    uri = choir(tmp_path, 32, 4.5)
    clips = [Clip(1, uri), Clip(2, uri, Part(2.0, 3.5)), Clip(3, choir(tmp_path, 1, 0.5))]
    deal(loaders, job(channels=EACH), clips)
    deal(loaders, job(channels=31), [only := Clip(4, uri)])
    score_all(loaders, queue, [*clips, only])
    starts = []
    for clip in (*clips, only):
        places = []
        for window, samples in zip(clip.windows, clip.scores, strict=True):
            assert (samples == np.float32(window.channel / 32768)).all()
            places.append((window.channel, window.start))
        starts.append(sorted(places))
    every = range(1, 33)
    whole = (0, 8000, 16_000, 24_000, 28_000)
    assert starts[0] == [(channel, start) for channel in every for start in whole]
    assert starts[1] == [(channel, start) for channel in every for start in (16_000, 20_000)]
    assert starts[2] == [(1, 0)]
    assert starts[3] == [(31, start) for start in whole]


def test_the_windows_of_all_channels_count_and_a_channel_too_many_is_an_error(
    make: Any, tmp_path: Path
) -> None:
    loaders, queue = make(audio={"max_windows": 9})
    stereo = choir(tmp_path, 2, 4.5)
    clips = [Clip(1, stereo), Clip(2, stereo)]
    deal(loaders, job(channels=EACH), clips[:1])
    deal(loaders, job(channels=3), clips[1:])
    until(lambda: queue.score(loaders) >= 0 and all(clip.end for clip in clips))
    assert str(clips[0].end.error).endswith("4 s (EARMARK_AUDIO__MAX_WINDOWS).")
    assert clips[1].end.error.facts == {"reason": "2 channel(s), so no channel 3 (--channels)"}


# long clips ---------------------------------------------------------------------------------------


def test_a_long_clip_comes_in_windows_through_little_memory(one: Any, tmp_path: Path) -> None:
    loaders, queue = one
    clip = sound(tmp_path, 1, 300.5)
    deal(loaders, job(), [clip])
    score_all(loaders, queue, [clip])
    by_start = {}
    for window, samples in zip(clip.windows, clip.scores, strict=True):
        by_start[window.start] = samples
    assert len(clip.windows) == 301
    assert sorted(by_start) == [*range(0, 300 * 8000, 8000), 299 * 8000 + 4000]
    for second in range(300):
        assert (by_start[second * 8000] * 32768 == second + 1).all()


def test_a_span_comes_in_windows_at_the_times_of_its_file(one: Any, tmp_path: Path) -> None:
    loaders, queue = one
    clips = [sound(tmp_path, number, 90) for number in (1, 2, 3)]
    clips[0].part, clips[1].part, clips[2].part = Part(40.0, 42.5), Part(0.0, 0.5), Part(90.0)
    deal(loaders, job(), clips)
    score_all(loaders, queue, clips[:2])
    assert sorted(window.span for window in clips[0].windows) == [(40, 41), (41, 42), (41.5, 42.5)]
    assert [window.span for window in clips[1].windows] == [(0, 0.5)]
    assert clips[0].facts is not None
    assert clips[0].facts.audio.duration_s == 2.5
    assert (clips[0].scores[0] * 32768 == 41).all()
    until(lambda: clips[2].end)
    assert clips[2].end.error.code == "too_short"


def test_a_decoder_that_waits_for_a_slow_model_has_all_the_time(make: Any, tmp_path: Path) -> None:
    loaders, queue = make(worker={"in_flight_bytes": 4 * WINDOW}, audio={"decode_timeout_s": 1.0})
    clip = sound(tmp_path, 1, 200)
    deal(loaders, job(), [clip])
    until(lambda: len(queue.waiting) == 4)
    (decoder,) = decoder_processes()
    slept = decoder.cpu_times()
    for _ in range(5):  # three seconds in which nothing is scored, and then some
        with pytest.raises(psutil.TimeoutExpired):
            decoder.wait(0.6)
        queue.score(loaders, 2)
    assert decoder.cpu_times().user - slept.user < 1
    score_all(loaders, queue, [clip])
    assert clip.end is None


def test_a_clip_of_too_many_windows_names_the_setting(make: Any, tmp_path: Path) -> None:
    loaders, queue = make(audio={"max_windows": 3})
    clips = [sound(tmp_path, 1, 4), sound(tmp_path, 2, 3)]
    deal(loaders, job(), clips)
    score_all(loaders, queue, clips[1:])
    until(lambda: clips[0].end)
    assert "EARMARK_AUDIO__MAX_WINDOWS" in str(clips[0].end.error)


def test_a_window_beyond_the_memory_names_the_setting(one: Any, tmp_path: Path) -> None:
    loaders, queue = one
    wide = job(SHAPE._replace(size=5 * SHAPE.size, hop=SHAPE.size))
    clips = [sound(tmp_path, 1, 4.5), sound(tmp_path, 2, 6)]
    deal(loaders, wide, clips)
    for clip in clips:
        until(lambda clip=clip: clip.end)
        assert "EARMARK_WORKER__IN_FLIGHT_BYTES" in str(clip.end.error)
    last = sound(tmp_path, 3, 1)
    deal(loaders, job(), [last])
    score_all(loaders, queue, [last])


# several models -----------------------------------------------------------------------------------


def heard_together(clip: Clip, *jobs: Job) -> list[tuple[Clip, Job]]:
    """Return a clip of each job, all of one file."""
    return [
        (Clip(clip.clip_id + 100 * n, clip.uri, clip.part), each) for n, each in enumerate(jobs)
    ]


def test_a_file_is_fetched_once_for_all_models_and_decoded_once_for_each_rate(
    make: Any, host: Host, tmp_path: Path
) -> None:
    fetch = {"ports": [host.server_port], "allow_networks": ["127.0.0.0/8"]}
    loaders, queue = make(fetch=fetch, audio={"clips_per_decoder": 24})
    half = SHAPE._replace(size=4000, hop=2000)
    slow = Shape(4000, 2000, 2000, 1)
    jobs = [job(), job(half, 2), job(slow, 3), job(slow._replace(size=4000), 4)]
    clips = []
    for number in range(12):
        clips += heard_together(Clip(number, f"{host.url}/{number}"), *jobs)
    (decoder,) = decoder_processes()
    loaders.deal(clips)
    score_all(loaders, queue, [clip for clip, _ in clips])
    assert host.asked == {f"/{number}": 1 for number in range(12)}
    # It has decoded 12 files at two rates, which is all that a decoder may: it was asked no more.
    assert [child.pid for child in decoder_processes()] == [decoder.pid]
    windows = {each.run_id: [] for each in jobs}
    for clip, each in clips:
        assert clip.facts is not None
        assert clip.facts.audio.duration_s == 1
        windows[each.run_id].append([window.span for window in sorted_windows(clip)])
    assert windows[1] == [[(0, 1)]] * 12
    assert windows[2] == [[(0, 0.5), (0.25, 0.75), (0.5, 1)]] * 12
    assert windows[3] == [[(0, 0.5), (0.5, 1)]] * 12
    assert windows[4] == [[(0, 1)]] * 12


def sorted_windows(clip: Clip) -> list[Any]:
    return sorted(clip.windows, key=lambda window: window.start)


def test_what_goes_wrong_with_a_clip_of_one_model_leaves_the_others(
    make: Any, tmp_path: Path
) -> None:
    loaders, queue = make(worker={"in_flight_bytes": 4 * WINDOW}, audio={"max_windows": 30})
    long = sound(tmp_path, 1, 20)
    narrow, wide = SHAPE._replace(hop=400), SHAPE._replace(size=5 * SHAPE.size)
    slow = Shape(4000, 4000, 4000, 1)
    jobs = [job(narrow), job(wide, 2), job(run_id=3), job(run_id=4), job(slow, 5)]
    (many, _), (large, _), (canceled, _), (whole, _), (other, _) = clips = heard_together(
        long, *jobs
    )
    loaders.deal(clips)
    until(lambda: canceled.deals and len(queue.waiting) == 4)
    canceled.deals[0].cancel()
    score_all(loaders, queue, [whole, other])
    until(lambda: many.end and large.end)
    assert "EARMARK_AUDIO__MAX_WINDOWS" in str(many.end.error)
    assert "EARMARK_WORKER__IN_FLIGHT_BYTES" in str(large.end.error)
    assert canceled.facts is canceled.end is None
    for clip in (whole, other):
        assert [window.span[0] for window in sorted_windows(clip)] == list(range(20))
        assert clip.end is None


def test_a_file_that_fails_fails_for_each_model(make: Any, tmp_path: Path) -> None:
    loaders, _ = make()
    page, missing = tmp_path / "page.wav", tmp_path / "missing.wav"
    page.write_text("<html>")
    jobs = [job(), job(run_id=2), job(Shape(4000, 4000, 4000, 1), 3)]
    clips = [
        *heard_together(Clip(1, str(page)), *jobs),
        *heard_together(Clip(2, str(missing)), *jobs),
    ]
    loaders.deal(clips)
    until(lambda: all(clip.end for clip, _ in clips))
    codes = [clip.end.error.code for clip, _ in clips]
    assert codes == ["not_audio"] * 3 + ["file_not_found"] * 3


def test_a_loader_that_dies_has_the_clips_of_all_models_dealt_again(
    make: Any, tmp_path: Path
) -> None:
    loaders, queue = make(worker={"in_flight_bytes": 4 * WINDOW})
    jobs = [job(), job(run_id=2), job(Shape(4000, 4000, 4000, 1), 3)]
    clips = [each for clip in sounds(tmp_path, 6, 3.0) for each in heard_together(clip, *jobs)]
    loaders.deal(clips)
    until(lambda: len(queue.waiting) >= 4)
    loader_processes()[0].kill()
    score_all(loaders, queue, [clip for clip, _ in clips])
    for clip, _ in clips:
        assert [window.span for window in sorted_windows(clip)] == [(0, 1), (1, 2), (2, 3)]


# files that are kept ------------------------------------------------------------------------------


def then_heard(number: int, uri: str, held: Job) -> tuple[Clip, Clip, list[tuple[Clip, Job]]]:
    """Return a clip, the same of a run that follows it, and both with their jobs."""
    first, second = Clip(number, uri), Clip(100 + number, uri)
    return first, second, [(second, held), (first, job())]


@pytest.mark.parametrize("size", [8000, 4000])
def test_a_kept_file_is_heard_when_it_is_released_without_another_request(
    make: Any, host: Host, size: int
) -> None:
    loaders, queue = make(fetch={"ports": [host.server_port]}, worker={"in_flight_bytes": WINDOW})
    held = job(Shape(size, size, size, 1), 2, held=True)
    pairs = [then_heard(number, f"{host.url}/{number}", held) for number in range(1, 7)]
    loaders.deal([each for *_, both in pairs for each in both])
    score_all(loaders, queue, [first for first, *_ in pairs])
    seconds = [second for _, second, _ in pairs]
    assert not any(second.windows or second.facts or second.end for second in seconds)
    released, dropped = seconds[::2], seconds[1::2]
    for clip in released:
        clip.deals[0].release()
    for clip in dropped:
        clip.deals[0].cancel()
    score_all(loaders, queue, released)
    assert set(host.asked.values()) == {1}
    assert not any(clip.windows for clip in dropped)
    (loader,) = loader_processes()
    until(lambda: not [file for file in loader.open_files() if "deleted" in file.path])


def test_a_file_that_cannot_be_had_ends_the_clips_that_are_kept_alike(
    make: Any, tmp_path: Path
) -> None:
    loaders, _ = make()
    first, second, both = then_heard(1, str(tmp_path / "missing.wav"), job(run_id=2, held=True))
    loaders.deal(both)
    until(lambda: first.end and second.end)
    assert first.end.error.code == second.end.error.code == "file_not_found"


def test_a_kept_file_outlives_its_loader(make: Any, tmp_path: Path) -> None:
    loaders, queue = make()
    (clip,) = sounds(tmp_path, 1)
    first, second, both = then_heard(1, clip.uri, job(run_id=2, held=True))
    loaders.deal(both)
    score_all(loaders, queue, [first])
    loader_processes()[0].kill()
    until(lambda: len(second.deals) == 2)
    assert not second.windows
    second.deals[-1].release()
    score_all(loaders, queue, [second])


# several spans ------------------------------------------------------------------------------------


def duet(folder: Path, seconds: float) -> str:
    """Write a file of two channels in which each sample is its second, or 100 more."""
    times = np.arange(int(8000 * seconds)) // 8000 + 1
    frames = np.stack([times, times + 100], axis=1).astype("<i2")
    path = folder / "duet.wav"
    path.write_bytes(bad_audio.wav(frames.tobytes(), rate=8000, channels=2))
    return str(path)


def heard(clip: Clip) -> list[tuple[Any, ...]]:
    """Return the windows of a clip with their samples, in order."""
    found = []
    for window, samples in zip(clip.windows, clip.scores, strict=True):
        found.append((window.channel, window.span, samples.tobytes()))
    return sorted(found)


def test_the_spans_of_a_file_share_a_download_and_are_heard_as_each_alone(
    make: Any, host: Host, tmp_path: Path
) -> None:
    uri = duet(tmp_path, 150)
    host.body = Path(uri).read_bytes()
    fetch = {"ports": [host.server_port], "allow_networks": ["127.0.0.0/8"]}
    jobs = [
        job(),
        job(Shape(4000, 8000, 2000, 1), 2),
        job(channels=EACH, run_id=3),
        job(channels=2, run_id=4),
    ]
    loaders, queue = make(fetch=fetch, audio={"clips_per_decoder": len(jobs)})
    spans = [Part(start, start + 2.5) for start in range(140, 0, -10)]
    spans += [Part(9.0, 12.0), Part(149.0, 199.0), Part(None, 0.5), Part(147.5), None]
    behind = Clip(100, f"{host.url}/long", Part(150.0, 152.0))
    clips = [(behind, jobs[0])]
    for number, part in enumerate(spans):
        clips.append((Clip(number, behind.uri, part), jobs[number % len(jobs)]))
    (decoder,) = decoder_processes()
    loaders.deal(clips)
    score_all(loaders, queue, [clip for clip, _ in clips[1:]])
    until(lambda: behind.end)
    assert behind.end.error.code == "too_short"
    assert host.asked == {"/long": 1}
    # Once for each rate and channels, which is all that a decoder may: it was asked no more.
    assert [child.pid for child in decoder_processes()] == [decoder.pid]

    others, their_queue = make()
    for clip, its_job in clips[1:]:
        alone = Clip(clip.clip_id, uri, clip.part)
        others.deal([(alone, its_job)])
        score_all(others, their_queue, [alone])
        assert heard(clip) == heard(alone)
        assert clip.facts is not None
        assert alone.facts is not None
        assert clip.facts.audio == alone.facts.audio


def test_the_spans_of_a_containers_members_are_heard_each_from_its_member(
    make: Any, tmp_path: Path
) -> None:
    loaders, queue = make(audio={"clips_per_decoder": 2})
    members = [Path(clip.uri).read_bytes() for clip in sounds(tmp_path, 2, 3.0)]
    container = tmp_path / "both.zip"
    container.write_bytes(b"".join(members))
    clips, offset = [], 0
    for number, member in enumerate(members, 1):
        place = (f"{number}.wav", offset, len(member), "")
        for start in (0.0, 1.0, 2.0):
            part = Part(start, start + 1, *place)
            clips.append(Clip(10 * number + int(start), str(container), part))
        offset += len(member)
    (decoder,) = decoder_processes()
    deal(loaders, job(), clips[::2] + clips[1::2])
    score_all(loaders, queue, clips)
    assert [child.pid for child in decoder_processes()] == [decoder.pid]
    for clip in clips:
        number, start = divmod(clip.clip_id, 10)
        assert [window.span for window in clip.windows] == [(start, start + 1)]
        assert (clip.scores[0] * 32768 == number).all()


def test_what_goes_wrong_with_a_span_leaves_the_others(make: Any, tmp_path: Path) -> None:
    loaders, queue = make(worker={"in_flight_bytes": 4 * WINDOW}, audio={"max_windows": 30})
    uri = sound(tmp_path, 1, 200).uri
    whole, canceled, behind = Clip(1, uri), Clip(2, uri, Part(1.0, 9.0)), Clip(3, uri, Part(200.0))
    spans = [Clip(10 + start, uri, Part(start, start + 2.0)) for start in (0, 60, 1, 190)]
    slow = Clip(4, uri, Part(5.0, 6.0))
    same = [(clip, job()) for clip in (whole, canceled, behind, *spans)]
    loaders.deal([*same, (slow, job(Shape(4000, 4000, 4000, 1)))])
    until(lambda: len(queue.waiting) == 4)
    canceled.deals[0].cancel()
    loaders.drain()
    score_all(loaders, queue, spans)
    until(lambda: whole.end and behind.end and slow.end)
    assert "EARMARK_AUDIO__MAX_WINDOWS" in str(whole.end.error)
    assert behind.end.error.code == "too_short"
    assert slow.end == Postponed(4, 0.0)
    assert canceled.facts is canceled.end is None
    for clip in spans:
        start = clip.clip_id - 10
        assert [window.span[0] for window in sorted_windows(clip)] == [start, start + 1]


def test_a_decoder_that_dies_in_a_file_costs_the_spans_that_were_heard(
    one: Any, tmp_path: Path
) -> None:
    loaders, queue = one
    uri = sound(tmp_path, 1, 200).uri
    spans = [Clip(n, uri, Part(n, n + 5.0)) for n in (0, 1, 190)]
    slow, other = Clip(4, uri, Part(5.0, 6.0)), sound(tmp_path, 5, 1)
    slow_job = job(Shape(4000, 4000, 4000, 1))
    loaders.deal([*((clip, job()) for clip in spans), (slow, slow_job), (other, job())])
    until(lambda: len(queue.waiting) == 4)
    decoder_processes()[0].kill()
    score_all(loaders, queue, [slow, other])
    assert [clip.end.error.code for clip in spans] == ["decoder_crashed"] * 3
    deal(loaders, job(), spans[1:])
    score_all(loaders, queue, spans[1:])


# manners ------------------------------------------------------------------------------------------


class Host(ThreadingHTTPServer):
    """Serves one sound, and counts connections at once and requests for robots.txt."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.open = self.most_open = self.robots = 0
        self.asked: Counter[str] = Counter()
        self.body = bad_audio.wav(bytes(16000), rate=8000)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def finish_request(self, *arguments: Any) -> None:
        with self.lock:
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            super().finish_request(*arguments)
        finally:
            with self.lock:
                self.open -= 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Host

    def do_GET(self) -> None:
        robots = self.path == "/robots.txt"
        self.server.asked[self.path] += 1
        self.server.robots += robots
        time.sleep(0.02)
        body = b"" if robots else self.server.body
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def host() -> Iterator[Host]:
    server = Host()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("robots", [False, True])
def test_the_loaders_of_a_worker_keep_to_its_connections_to_a_host(
    make: Any, host: Host, *, robots: bool
) -> None:
    server = host
    fetch = {"ports": [server.server_port], "host_concurrency": 2, "robots": robots}
    loaders, queue = make(
        fetch={**fetch, "allow_networks": ["127.0.0.0/8"]},
        worker={"loaders": 3, "decoders": 3},
    )
    clips = [Clip(number, f"{server.url}/{number}") for number in range(1, 31)]
    deal(loaders, job(), clips)
    score_all(loaders, queue, clips)
    assert server.most_open <= 2
    assert server.robots == robots
    users = {clip.deals[0].loader for clip in clips}
    assert len(users) == (1 if robots else 2)


@pytest.mark.parametrize(
    ("loaders", "connections", "expected"),
    [
        (1, 8, (1, 8)),
        (2, 8, (2, 4)),
        (3, 8, (2, 4)),
        (4, 8, (4, 2)),
        (16, 8, (8, 1)),
        (5, 1, (1, 1)),
    ],
)
def test_connections_are_divided_without_a_rest(
    loaders: int, connections: int, expected: tuple[int, int]
) -> None:
    settings = Settings().changed(fetch={"host_concurrency": connections})
    per_host, changed = loading._manners(settings, loaders)
    assert (per_host, changed.fetch.host_concurrency) == expected


# what fails ---------------------------------------------------------------------------------------


def test_a_decoder_that_dies_costs_the_clip_it_was_at(one: Any, tmp_path: Path) -> None:
    loaders, queue = one
    long, *others = sound(tmp_path, 100, 200), *sounds(tmp_path, 4)
    deal(loaders, job(), [long])
    until(lambda: len(queue.waiting) == 4)
    deal(loaders, job(), others)
    decoder_processes()[0].kill()
    score_all(loaders, queue, others)
    until(lambda: long.end)
    assert long.end.error.code == "decoder_crashed"


def test_a_decoder_that_hangs_costs_the_clip_it_was_at(make: Any, tmp_path: Path) -> None:
    loaders, queue = make(audio={"decode_timeout_s": 1.0})
    decoder_processes()[0].suspend()
    clips = sounds(tmp_path, 4)
    deal(loaders, job(), clips)
    until(lambda: any(clip.end for clip in clips))
    (late,) = (clip for clip in clips if clip.end)
    assert late.end.error.code == "decoder_timeout"
    score_all(loaders, queue, [clip for clip in clips if clip is not late])


def test_a_decoder_that_swells_costs_the_clip_it_was_at(make: Any, tmp_path: Path) -> None:
    loaders, queue = make(audio={"decode_memory": 320 * 2**20, "max_channels": 1024})
    path = tmp_path / "wide.wav"
    path.write_bytes(bad_audio.wav(bytes(1024 * 8000), channels=1024, bits=8))
    wide, *others = Clip(100, str(path)), *sounds(tmp_path, 4)
    deal(loaders, job(), [wide, *others])
    score_all(loaders, queue, others)
    until(lambda: wide.end)
    assert wide.end.error.code == "decoder_memory"


def test_a_loader_that_dies_is_replaced_and_its_clips_are_dealt_again(
    make: Any, tmp_path: Path
) -> None:
    loaders, queue = make(worker={"loaders": 2, "decoders": 2, "in_flight_bytes": 8 * WINDOW})
    clips = [*sounds(tmp_path, 30, 1.0), sound(tmp_path, 100, 60), sound(tmp_path, 101, 60)]
    deal(loaders, job(), clips)
    until(lambda: len(queue.waiting) == 8)
    loader_processes()[0].kill()
    score_all(loaders, queue, clips)
    deals = [len(clip.deals) for clip in clips]
    assert set(deals) == {1, 2}
    for clip in clips:
        starts = [window.start for window in clip.windows]
        assert len(starts) == len(set(starts))
    assert len(loader_processes()) == 2


def test_a_clip_that_loaders_die_of_is_suspected(one: Any, tmp_path: Path) -> None:
    loaders, queue = one
    clip = sound(tmp_path, 1, 60)
    deal(loaders, job(), [clip])
    for deals in (1, 2):
        until(lambda deals=deals: len(clip.deals) == deals and len(queue.waiting) == 4)
        loader_processes()[0].kill()
    until(lambda: clip.end)
    assert clip.end == Suspected()
    assert not queue.waiting


def test_a_loader_that_hangs_is_replaced(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "CHECK_EVERY_S", 0.2)
    monkeypatch.setattr(loading, "SILENT_CHECKS", 20)
    loaders, queue = make()
    loader_processes()[0].suspend()
    clips = sounds(tmp_path, 4)
    deal(loaders, job(), clips)
    score_all(loaders, queue, clips)
    assert [len(clip.deals) for clip in clips] == [2] * 4


def test_a_loader_that_cannot_be_replaced_at_once_is_replaced_later(
    one: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders, queue = one
    new_memory, failures = loading.arena.new_memory, [OSError("no space")] * 2

    def scarce_memory(samples: int) -> int:
        if failures:
            raise failures.pop()
        return new_memory(samples)

    monkeypatch.setattr(loading.arena, "new_memory", scarce_memory)
    loader_processes()[0].kill()
    clips = sounds(tmp_path, 2)
    deal(loaders, job(), clips)
    score_all(loaders, queue, clips)
    assert not failures


ORPHANS = """
    import sys, threading
    from pathlib import Path
    from tests.workers.loading.world import Queue, settings_for
    from workers.loading.loaders import Loaders

    loaders = Loaders(settings_for(Path("."), sys.argv[1]), Queue())
    loaders.wait_until_ready()
    print("ready", flush=True)
    threading.Event().wait()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_loaders_and_decoders_of_a_killed_worker_end(tmp_path: Path, *, stopped: bool) -> None:
    url = copied_sqlite(tmp_path / "earmark.db")
    worker = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(ORPHANS), url],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    with worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
        orphans = psutil.Process(worker.pid).children(recursive=True)
        assert len(orphans) == 2
        if stopped:
            orphans[0].suspend()
        worker.kill()
    _, alive = psutil.wait_procs(orphans, timeout=60)
    assert not alive


def test_no_memory_is_lost_whatever_happens(make: Any, tmp_path: Path) -> None:
    loaders, queue = make(
        worker={"in_flight_bytes": 4 * WINDOW}, audio={"max_windows": 10, "min_duration_s": 0.1}
    )
    broken = tmp_path / "broken.wav"
    broken.write_bytes(bad_audio.wav(b"", rate=8000))
    short = sound(tmp_path, 51, 0.05)
    too_long, canceled = sound(tmp_path, 52, 30), sound(tmp_path, 53, 9)
    lost = [Clip(50, str(broken)), short, too_long, Clip(54, str(tmp_path / "missing.wav"))]
    deal(loaders, job(), [*lost, canceled])
    until(lambda: queue.score(loaders) or all(clip.end for clip in lost))
    until(lambda: len(queue.waiting) == 4)
    canceled.deals[0].cancel()
    loaders.forget([canceled])
    whole = sound(tmp_path, 55, 4)
    deal(loaders, job(SHAPE._replace(size=4 * SHAPE.size)), [whole])
    score_all(loaders, queue, [whole])


def test_when_the_memory_is_full_decoders_wait(one: Any, tmp_path: Path) -> None:
    loaders, queue = one
    clips = sounds(tmp_path, 12, seconds=1.0)
    deal(loaders, job(), clips)
    until(lambda: len(queue.waiting) == 4)
    queue.score(loaders, 1)
    until(lambda: len(queue.waiting) == 4)
    # One is scored and four are in memory; downloads end in any order.
    assert sum(clip.facts is not None for clip in clips) <= 6
    score_all(loaders, queue, clips)


def test_a_draining_worker_gets_back_what_is_at_no_decoder(one: Any, tmp_path: Path) -> None:
    loaders, queue = one
    long, *others = sound(tmp_path, 100, 20), *sounds(tmp_path, 8)
    deal(loaders, job(), [long])
    until(lambda: len(queue.waiting) == 4)
    deal(loaders, job(), others)
    loaders.drain()
    until(lambda: sum(clip.end is not None for clip in others) >= 7)
    for clip in others:
        assert clip.end in (None, Postponed(clip.clip_id, 0.0))
    late = sound(tmp_path, 101, 1)
    deal(loaders, job(), [late])
    until(lambda: late.end)
    score_all(loaders, queue, [clip for clip in (long, *others) if clip.end is None])


def test_without_a_database_clips_are_put_off(make: Any, tmp_path: Path) -> None:
    loaders, _ = make(database={"url": "postgresql://127.0.0.1:1/none"})
    clips = sounds(tmp_path, 3)
    deal(loaders, job(), clips)
    until(lambda: all(clip.end for clip in clips))
    assert {type(clip.end) for clip in clips} == {Postponed}
    assert {clip.end.delay_s for clip in clips} == {10.0}


def test_a_clip_dealt_again_begins_anew(one: Any, tmp_path: Path) -> None:
    loaders, queue = one
    clip = sound(tmp_path, 1, 20)
    deal(loaders, job(), [clip])
    until(lambda: len(queue.waiting) == 4)
    queue.score(loaders, 3)
    clip.deals[0].cancel()
    deal(loaders, job(), [clip])
    score_all(loaders, queue, [clip])
    assert sorted(window.start // 8000 for window in clip.windows) == list(range(20))


def test_rows_outside_the_memory_are_refused(one: Any, tmp_path: Path) -> None:
    loaders, _ = one
    (loader,) = loaders._loaders
    size = 4 * SHAPE.size
    loader.window(None, 0, size, 0, size, 0)
    for place in ((1, size, 0, size), (0, size + 1, 0, size), (0, 10, 0, 11)):
        with pytest.raises(ValueError, match=r"\("):
            loader.window(None, *place, 0)


def test_a_decoder_that_cannot_start_is_a_service_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(loading.errors.ServiceError, match="does not start"):
        Loaders(settings_for(tmp_path, f"sqlite:///{tmp_path}/x.db"), Queue()).wait_until_ready()
