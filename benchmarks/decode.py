"""The cost of decoding in our pool, in process with soundfile and soxr, and with librosa.load.

`python -m benchmarks.decode` prints, for 5 s clips: milliseconds a clip of each way; what the pool
adds to in-process decoding, by the clock and in processor time of parent and children; how many
times the clips a second of one child two children do, as in a worker with more callers than
children; how many times those of one process they and two plain processes do, the latter being all
that the machine has to give; and what the children add to the plain processes in processor time.
The ways take turns of a few clips, so that a busy machine slows all alike; figures are medians over
the turns, processor times means.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, BinaryIO

import av
import librosa
import numpy as np
import psutil
import soundfile
import soxr

from earmark.core import settings
from workers.decoding import pool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SAMPLE_RATE = 16000
SECONDS = 5
FORMATS = {
    "wav": ("WAV", "PCM_16", 44100),
    "flac": ("FLAC", "PCM_16", 44100),
    "ogg": ("OGG", "VORBIS", 44100),
    "mp3": ("MP3", "MPEG_LAYER_III", 44100),
    "opus": ("OGG", "OPUS", 48000),
    "m4a": ("mp4", "aac", 44100),
}


@cache
def clip(name: str) -> bytes:
    container, codec, sample_rate = FORMATS[name]
    time_s = np.arange(SECONDS * sample_rate) / sample_rate
    noise = np.random.default_rng(0).standard_normal(len(time_s))
    samples = (0.3 * np.sin(2 * np.pi * 440 * time_s) + 0.05 * noise).astype(np.float32)
    if name == "m4a":
        return through_ffmpeg(samples, sample_rate)
    with tempfile.NamedTemporaryFile() as file:
        soundfile.write(file.name, samples, sample_rate, format=container, subtype=codec)
        return file.read()


def through_ffmpeg(samples: np.ndarray, sample_rate: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=sample_rate, layout="mono")
        for start in range(0, len(samples), 1024):
            frame = av.AudioFrame.from_ndarray(
                samples[None, start : start + 1024], format="fltp", layout="mono"
            )
            frame.sample_rate = sample_rate
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def in_process(file: BinaryIO) -> None:
    samples, sample_rate = soundfile.read(file, dtype="float32")
    soxr.resample(samples, sample_rate, SAMPLE_RATE, quality="HQ")


def in_process_ffmpeg(file: BinaryIO) -> None:
    with av.open(file) as container:
        frames = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
        soxr.resample(
            np.concatenate(frames), container.streams.audio[0].rate, SAMPLE_RATE, quality="HQ"
        )


def by_librosa(file: BinaryIO) -> None:
    librosa.load(file, sr=SAMPLE_RATE)


def decode_turn(name: str, clips: int, act: Callable[[BinaryIO], object] | None = None) -> None:
    """Decode one clip so many times; by itself, as a process without a pool would."""
    act = act or (in_process_ffmpeg if name in {"m4a", "opus"} else in_process)
    with tempfile.TemporaryFile() as file:
        file.write(clip(name))
        for _ in range(clips):
            file.seek(0)
            act(file)


class Stopwatch:
    """Wall and processor milliseconds of what is done here and in these processes."""

    def __init__(self, children: Sequence[psutil.Process]) -> None:
        self._processes = [psutil.Process(), *children]

    def __call__(self, act: Callable[[], object]) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), self._cpu_s()
        act()
        return 1000 * (time.perf_counter() - wall), 1000 * (self._cpu_s() - cpu)

    def _cpu_s(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._processes)


TITLES = (
    "in process",
    "librosa",
    "pool",
    "added ms",
    "added CPU ms",
    "children 2:1",
    "children:1",
    "plain 2:1",
    "flow CPU ms",
)


@dataclass(frozen=True)
class Bench:
    """One child, two, and two plain processes, with so many callers that no child waits."""

    one: pool.Decoders
    two: pool.Decoders
    plain: Sequence[Executor]
    callers: Sequence[Executor]


def at_once(
    executors: Sequence[Executor], name: str, clips: int, *act: Callable[[BinaryIO], object]
) -> None:
    for future in [
        executor.submit(decode_turn, name, clips // len(executors), *act) for executor in executors
    ]:
        future.result()


def row(name: str, bench: Bench, turns: int, clips: int) -> str:
    one, two = (
        partial(decoders.decode, sample_rate=SAMPLE_RATE) for decoders in (bench.one, bench.two)
    )
    stopwatch = Stopwatch(psutil.Process().children())
    ways = {
        "in process": lambda: decode_turn(name, clips),
        "pool": lambda: decode_turn(name, clips, two),
        "one child": lambda: at_once(bench.callers, name, clips, one),
        "two children": lambda: at_once(bench.callers, name, 2 * clips, two),
        "two plain": lambda: at_once(bench.plain, name, 2 * clips),
    }
    if name != "m4a":  # librosa reads none
        ways["librosa"] = lambda: decode_turn(name, clips, by_librosa)
    for way in ways.values():
        way()
    rounds = [
        figures({way: stopwatch(act) for way, act in ways.items()}, clips) for _ in range(turns)
    ]
    return f"{name:9}" + "".join(f"{cell(title, rounds):>14}" for title in TITLES)


def cell(title: str, rounds: Sequence[dict[str, float]]) -> str:
    values = [figures[title] for figures in rounds if title in figures]
    middle = (
        statistics.fmean if "CPU" in title else statistics.median
    )  # the kernel counts CPU in steps of 10 ms
    return f"{middle(values):.2f}" if values else "-"


def figures(took: dict[str, tuple[float, float]], clips: int) -> dict[str, float]:
    """Return a turn's cells by their titles."""
    wall = {way: ms / clips for way, (ms, _) in took.items()}
    cpu = {way: ms / clips for way, (_, ms) in took.items()}
    return wall | {
        "added ms": wall["pool"] - wall["in process"],
        "added CPU ms": cpu["pool"] - cpu["in process"],
        "children 2:1": 2 * wall["one child"] / wall["two children"],
        "children:1": 2 * wall["in process"] / wall["two children"],
        "plain 2:1": 2 * wall["in process"] / wall["two plain"],
        "flow CPU ms": (cpu["two children"] - cpu["two plain"]) / 2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--clips", type=int, default=60, help="decoded by one process in a turn")
    arguments = parser.parse_args()
    # A decoder that is renewed would take what we know of its CPU time along.
    one, two = (
        pool.Decoders(settings.Audio(clips_per_decoder=10**9), children) for children in (1, 2)
    )
    # Both processes: a pool of two would give one of them most of the clips.
    plain = [ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for _ in range(2)]
    bench = Bench(one, two, plain, [ThreadPoolExecutor(1) for _ in range(4)])
    try:
        print(f"{'5 s clip':9}" + "".join(f"{title:>14}" for title in TITLES))
        for name in FORMATS:
            print(row(name, bench, arguments.turns, arguments.clips), flush=True)
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, ours included")
    finally:
        one.close()
        two.close()


if __name__ == "__main__":
    main()
