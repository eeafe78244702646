"""Earmark beside its alternatives: the same clips, the same model, the same labels kept, one run.

    python -m benchmarks.end_to_end
    python -m benchmarks.end_to_end --models starter --sources files --ways optimum "earmark sqlite"

Every way is a process of its own that has its model loaded and one clip behind it. They take turns
on the same list in random order, so that a busy machine slows all alike; of the starter's list the
slow ones are given every fourth clip.

Clips a second, processor time (of all its processes, servers included) and memory are medians over
the turns, with the lowest and highest; a ratio is the median of the turns' ratios to the loop
written by hand. Ray's clips a second include the start of its actors, which it repeats for each
list; its processes are daemons, whose processor time is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from benchmarks.contenders import WAYS
from benchmarks.inference import saved_model
from benchmarks.watch import Memory, cpu_s
from tests.servers import serving

EXAMPLES = Path(__file__).parents[1] / "earmark" / "examples"
RATE = 44_100
#: How many clips a model is given in a turn: a base model takes seconds for each.
CLIPS = {"starter": 120, "ast-base": 4, "wav2vec2-base": 8}
#: Ways that are given a part of the starter's list, one in so many: they take as long for each,
#: however many there are.
SLOW, SLOW_PART = {"script", "pipeline x8", "pipeline x16", "celery"}, 4
#: (lengths, how they are had, latency of the server in seconds)
SOURCES = {
    "files": ("equal", False, 0.0),
    "urls": ("equal", True, 0.0),
    "ragged urls": ("ragged", True, 0.0),
    "slow urls": ("equal", True, 0.05),
}
#: What a model is given unless told otherwise. A base model is its own cost, wherever its clips
#: are.
SOURCES_OF = {
    "starter": ["files", "urls", "ragged urls"],
    "ast-base": ["urls"],
    "wav2vec2-base": ["urls"],
}
REFERENCE = "optimum"
#: Ways that choose their own number of threads.
OWN_THREADS = {"optimum", "ray", "earmark sqlite", "earmark postgresql"}


@dataclass
class Costs:
    """What each turn of one way took, per clip."""

    clips_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)


class Contender:
    """A way's process, and what it and its children take."""

    def __init__(self, way: str, model: str, threads: int, warm_up: Path) -> None:
        self._way, self.threads = way, threads
        python = _python_with_ray() if way == "ray" else sys.executable
        command = [
            python,
            "-m",
            "benchmarks.contenders",
            way,
            "--model",
            model,
            "--threads",
            str(threads),
        ]
        with Path(tempfile.gettempdir(), f"contender-{way.replace(' ', '-')}.log").open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--warm-up", str(warm_up)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        while (line := self._process.stdout.readline()) and line != "ready\n":
            pass
        if not line:
            raise SystemExit(f"{way} did not start: see {log.name}")

    def label(self, uris: list[str], costs: Costs | None = None) -> list[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with Memory(self._process.pid) as memory:
            wall, cpu = time.perf_counter(), cpu_s(self._process.pid)
            self._process.stdin.write(json.dumps(uris) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            wall, cpu = time.perf_counter() - wall, cpu_s(self._process.pid) - cpu
        if costs:
            costs.clips_s.append(len(uris) / wall)
            # Ray's processes are not its children.
            costs.cpu_ms.append(1000 * cpu / len(uris) if self._way != "ray" else math.nan)
            costs.memory_mb.append(max(memory.held_mb))
        return list(json.loads(answer))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def main() -> None:
    arguments = _arguments()
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}, {time.strftime('%d %B %Y')}, {arguments.turns} turns")
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            threads: dict[str, int] = {}
            name = saved_model(model, Path(folder, model))
            for source in arguments.sources or SOURCES_OF[model]:
                _compare(model, name, source, Path(folder), threads, arguments)
    print(f"load {os.getloadavg()[0]:.1f}, ours included")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(CLIPS), choices=CLIPS)
    parser.add_argument(
        "--sources",
        nargs="+",
        choices=SOURCES,
        help="instead of all but the slow, for a base model of URLs",
    )
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--clips", type=int, help="instead of as many as a model is given by default"
    )
    return parser.parse_args()


def _compare(
    model: str,
    name: str,
    source: str,
    folder: Path,
    threads: dict[str, int],
    arguments: argparse.Namespace,
) -> None:
    lengths, remote, latency_s = SOURCES[source]
    clips = make_clips(folder / f"{model}-{source}", lengths, arguments.clips or CLIPS[model])
    with ExitStack() as running:
        base = (
            running.enter_context(serving(clips[0].parent, delay_s=latency_s))
            if remote
            else str(clips[0].parent)
        )
        if remote:
            os.environ["EARMARK_FETCH__PORTS"] = base.rpartition(":")[2]
        uris = [f"{base}/{clip.name}" for clip in clips]
        lists = {
            way: uris[:: SLOW_PART if model == "starter" and way in SLOW else 1]
            for way in arguments.ways
        }
        contenders = {}
        for way in arguments.ways:
            if way not in threads:
                threads[way] = _best_threads(way, name, clips[0], uris[: len(uris) // 4])
            contenders[way] = Contender(way, name, threads[way], clips[0])
            running.callback(contenders[way].close)
        answers = {
            way: dict(zip(lists[way], each.label(lists[way]), strict=True))
            for way, each in contenders.items()
        }
        costs = {way: Costs() for way in contenders}
        for turn in range(arguments.turns):
            for place in np.random.default_rng(turn).permutation(len(contenders)):
                way = list(contenders)[place]
                contenders[way].label(lists[way], costs[way])
    _show(f"{model}, {len(clips)} {source}", costs, answers)


def _best_threads(way: str, model: str, warm_up: Path, uris: list[str]) -> int:
    """Return the number of threads that suits the way better."""
    if way in OWN_THREADS:
        return 1
    tried = {}
    for threads in (1, os.cpu_count() or 1):
        contender, costs = Contender(way, model, threads, warm_up), Costs()
        contender.label(uris)
        contender.label(uris, costs)
        contender.close()
        tried[threads] = costs.clips_s[0]
    best = max(tried, key=lambda threads: tried[threads])
    print(f"{way}: {best} thread(s) a process", file=sys.stderr)
    return best


def make_clips(folder: Path, lengths: str, count: int) -> list[Path]:
    """Write pieces of the bundled clips, no two alike, as Ogg Vorbis at 44.1 kHz."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    sound = _sound()
    paths = []
    for number in range(count):
        seconds = generator.uniform(1, 10) if lengths == "ragged" else 5.0
        start = generator.integers(len(sound) - round(seconds * RATE))
        piece = sound[start : start + round(seconds * RATE)] * generator.uniform(0.3, 1)
        paths.append(folder / f"{number}.ogg")
        soundfile.write(paths[-1], piece, RATE, format="OGG", subtype="VORBIS")
    return paths


def _sound() -> np.ndarray:
    import librosa

    files = [
        path for path in sorted(EXAMPLES.iterdir()) if path.suffix in {".ogg", ".flac", ".mp3"}
    ]
    return np.concatenate([librosa.load(path, sr=RATE)[0] for path in files])


def _show(title: str, costs: dict[str, Costs], answers: dict[str, dict[str, str]]) -> None:
    print(f"\n**{title}**\n")
    print(
        "| way | clips/s | CPU ms a clip | MB | of the optimum's clips/s"
        " | its CPU over the optimum's | same label |"
    )
    print("|---|---|---|---|---|---|---|")
    for way, cost in costs.items():
        against = costs.get(REFERENCE, cost)
        print(
            f"| {way} | {_spread(cost.clips_s)} | {_spread(cost.cpu_ms)} "
            f"| {max(cost.memory_mb):.0f} "
            f"| {_ratio(cost.clips_s, against.clips_s)} | {_ratio(cost.cpu_ms, against.cpu_ms)} "
            f"| {_agreement(answers[way], answers.get(REFERENCE, answers[way])):.0%} |",
            flush=True,
        )


def _spread(values: list[float]) -> str:
    if math.isnan(values[0]):
        return "-"
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def _ratio(values: list[float], others: list[float]) -> str:
    middle = statistics.median(one / other for one, other in zip(values, others, strict=True))
    return "-" if math.isnan(middle) else f"{middle:.2f}"


def _agreement(labels: dict[str, str], others: dict[str, str]) -> float:
    return statistics.mean(label == others[uri] for uri, label in labels.items() if uri in others)


def _python_with_ray() -> str:
    """Return a Python with Ray beside everything that is installed here; made once."""
    folder = Path(tempfile.gettempdir(), "earmark-ray")
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        [packages] = folder.glob("lib/python*/site-packages")
        (packages / "here.pth").write_text(
            "\n".join(path for path in sys.path if path.endswith("site-packages"))
        )
        subprocess.run([python, "-m", "pip", "install", "--quiet", "ray[data]"], check=True)
        (folder / "ready").touch()
    return str(python)


if __name__ == "__main__":
    main()
