"""What a clip's decoding costs in our pool, beside soundfile + soxr in process and librosa.load, in one run.

`python -m benchmarks.decode` prints, for 5 s clips: milliseconds per clip one after the other, what the pool adds to
in-process decoding (by the clock, and in processor time of parent and children, which a busy machine disturbs less),
and the throughput of two children over one thread in process. Two children need two free cores: the last line says
how many there were.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

import av
import librosa
import numpy as np
import psutil
import soundfile
import soxr

from earmark import settings
from workers import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
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
        soxr.resample(np.concatenate(frames), container.streams.audio[0].rate, SAMPLE_RATE, quality="HQ")


def by_librosa(file: BinaryIO) -> None:
    librosa.load(file, sr=SAMPLE_RATE)


def milliseconds(act: Callable[[BinaryIO], object], file: BinaryIO) -> float:
    file.seek(0)
    started = time.perf_counter()
    act(file)
    return 1000 * (time.perf_counter() - started)


def cpu_ms(act: Callable[[BinaryIO], object], file: BinaryIO, count: int) -> float:
    before = own_cpu_s()
    for _ in range(count):
        file.seek(0)
        act(file)
    return 1000 * (own_cpu_s() - before) / count


def own_cpu_s() -> float:
    processes = [psutil.Process(), *psutil.Process().children()]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def clips_per_s(act: Callable[[BinaryIO], object], content: bytes, threads: int, count: int) -> float:
    with ThreadPoolExecutor(threads) as pool:
        files = [on_disk(content) for _ in range(count)]
        started = time.perf_counter()
        list(pool.map(act, files))
        took = time.perf_counter() - started
    for file in files:
        file.close()
    return count / took


def on_disk(content: bytes) -> BinaryIO:
    file = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
    file.write(content)
    file.seek(0)
    return file


def rows(decoders: decode.Decoders, rounds: int) -> Iterator[str]:
    titles = ("in process", "librosa", "pool", "added ms", "added CPU ms", "two children", "of librosa")
    yield f"{'5 s clip':9}" + "".join(f"{title:>14}" for title in titles)
    for name in FORMATS:
        yield row(name, partial(decoders.decode, sample_rate=SAMPLE_RATE), rounds)


def row(name: str, pooled: Callable[[BinaryIO], object], rounds: int) -> str:
    content = clip(name)
    near = in_process_ffmpeg if name in {"m4a", "opus"} else in_process
    rivals = [near, pooled] if name == "m4a" else [near, pooled, by_librosa]
    with on_disk(content) as file:
        # in turns, so that a busy neighbour hits all of them alike
        times = [[milliseconds(act, file) for act in rivals] for _ in range(rounds)]
        added_cpu = cpu_ms(pooled, file, 2 * rounds) - cpu_ms(near, file, 2 * rounds)
    alone, pool, *librosa_ms = (statistics.median(column) for column in zip(*times, strict=True))
    rates = [(clips_per_s(near, content, 1, rounds), clips_per_s(pooled, content, 4, 2 * rounds)) for _ in range(5)]
    gain = statistics.median(together / single for single, together in rates)
    beside_librosa = gain * librosa_ms[0] / alone if librosa_ms else float("nan")
    cells = (f"{alone:.2f} ms", *(f"{ms:.2f} ms" for ms in librosa_ms or [float("nan")]), f"{pool:.2f} ms")
    ratios = (f"{pool - alone:.2f}", f"{added_cpu:.2f}", f"{gain:.2f}x", f"{beside_librosa:.2f}x")
    return f"{name:9}" + "".join(f"{cell:>14}" for cell in cells + ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    decoders = decode.Decoders(settings.Audio(), 2)
    psutil.cpu_times_percent()
    started, own = time.monotonic(), own_cpu_s()
    try:
        for line in rows(decoders, rounds):
            print(line, flush=True)
        idle = psutil.cpu_times_percent().idle / 100 * psutil.cpu_count()
        ours = (own_cpu_s() - own) / (time.monotonic() - started)
        print(f"free cores: {idle + ours:.1f} of {psutil.cpu_count()}")
    finally:
        decoders.close()


if __name__ == "__main__":
    main()
