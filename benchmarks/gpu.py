"""One worker beside a loop written by hand and `pipeline`, on a GPU or on a CPU with many cores.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu
    python -m benchmarks.gpu --source wav

It makes its clips, five seconds each and no two alike, and a model: AST-base with random weights
for a GPU, the starter for a CPU. The ways take turns on the same files, with their models loaded:
the loop (processes that decode, and one that scores batches; on a CPU, a process a core that does
both), `transformers.pipeline` on a part of the files, and `earmark worker` with its default
settings.

A rate is that of the steady part of a turn, from a fifth of the clips to nine tenths, as a median
over the turns with the lowest and highest. CPU time is the system's own account in that part, by
process and, in the worker and its loaders, by thread. The threads named `model` are the lanes: they
score, and may spin while the device works. Threads of libraries have the name of the thread that
started them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from benchmarks.account import THREAD, Account
from earmark.core.settings import Model, Settings, cores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Laps = list[tuple[float, int]]
    Label = Callable[[list[str]], Laps]

HOOKS = Path(__file__).with_name("hooks")
EXAMPLES = Path(__file__).parents[1] / "earmark" / "examples"
SOUNDS = ("dog.ogg", "piano.flac", "rain.ogg", "siren.wav", "speech.wav", "music.mp3")
SECONDS = 5
#: By kind of device: the model, the clips of a turn, and one in how many of them `pipeline` gets.
CUDA, CPU = ("ast-base", 8000, 20), ("starter", 150 * cores(), 8)
#: By source: the sample rate, the format and the subtype of the files.
SOURCES = {"vorbis": (44_100, "OGG", "VORBIS"), "wav": (16_000, "WAV", "PCM_16")}
LABELS = 527
LANES = f"{THREAD}worker: model"
BATCH = 64
#: Cores of the loop by hand that do not decode: one scores, one is for all else.
NOT_DECODING = 2
#: The steady part of a turn.
FROM, TO = 0.2, 0.9
#: A shorter part tells nothing, as clips end in batches: the whole turn is taken.
STEADY_S = 2.0
#: CPU ms of a clip that are not worth a line.
LEAST = 0.005
READY_S = 120.0


@dataclass
class Costs:
    """What each turn of one way took."""

    clips_s: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    batch: list[float] = field(default_factory=list)
    cpu_ms: list[dict[str, float]] = field(default_factory=list)


def main() -> None:
    arguments = _arguments()
    if arguments.way:
        return _be(arguments)
    began = time.perf_counter()
    device = _device(arguments.device)
    model, clips, part = CPU if device == "cpu" else CUDA
    clips = arguments.clips or clips
    with tempfile.TemporaryDirectory(prefix="earmark-bench-") as folder, ExitStack() as running:
        files = make_clips(Path(folder, "clips"), clips, arguments.source)
        name = made_model(arguments.model or model, Path(folder, "model"))
        ways: dict[str, Any] = {
            "loop by hand": Child("loop", name, device, files[0]),
            "pipeline": Child("pipeline", name, device, files[0]),
            "earmark worker": Earmark(Path(folder), name, device),
        }
        for way in ways.values():
            running.callback(way.close)
        alone = {name: way.wait_until_ready() for name, way in ways.items()}
        files_of = {way: files[:: part if way == "pipeline" else 1] for way in ways}
        costs = {way: Costs() for way in ways}
        for turn in range(arguments.turns):
            for place in np.random.default_rng(turn).permutation(len(ways)):
                way = list(ways)[place]
                _turn(ways[way], files_of[way], costs[way])
    _show(device, arguments, name, costs, alone["loop by hand"])
    print(f"{clips} clips a turn, {time.perf_counter() - began:.0f} s in all")
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1 or cpu")
    parser.add_argument("--model", help="starter, ast-base or a folder, instead of the device's")
    parser.add_argument("--source", default="vorbis", choices=SOURCES)
    parser.add_argument("--clips", type=int, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--way", choices=tuple(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--warm-up", help=argparse.SUPPRESS)
    return parser.parse_args()


def _device(name: str) -> str:
    """Return the device's name; PyTorch is asked in another process, as it would take memory."""
    ask = "from workers.scoring.devices import pick_device; print(pick_device(sys.argv[1]))"
    asked = subprocess.run(
        [sys.executable, "-c", f"import sys; {ask}", name],
        check=False,
        capture_output=True,
        text=True,
    )
    if asked.returncode:
        raise SystemExit(asked.stderr.strip().splitlines()[-1])
    return asked.stdout.strip()


# Clips and model ----------------------------------------------------------------------------------


def make_clips(folder: Path, count: int, source: str) -> list[str]:
    """Write pieces of the bundled clips with some noise, no two alike, with all cores."""
    folder.mkdir()
    rate = SOURCES[source][0]
    write = partial(_write, folder, source, [_sound(name, rate) for name in SOUNDS])
    with multiprocessing.Pool(cores()) as pool:
        return pool.map(write, range(count), chunksize=16)


def _sound(name: str, rate: int) -> np.ndarray:
    import soxr

    samples, own_rate = soundfile.read(EXAMPLES / name, dtype="float32", always_2d=True)
    return np.resize(soxr.resample(samples.mean(axis=1), own_rate, rate), SECONDS * rate)


def _write(folder: Path, source: str, sounds: list[np.ndarray], number: int) -> str:
    rate, container, subtype = SOURCES[source]
    generator = np.random.default_rng(number)
    sound = sounds[number % len(sounds)]
    moved = np.roll(sound, generator.integers(len(sound))) * generator.uniform(0.3, 0.9)
    path = folder / f"{number:06d}.{container.lower()}"
    samples = moved + generator.normal(0, 0.003, len(sound))
    soundfile.write(path, samples.clip(-1, 1), rate, format=container, subtype=subtype)
    return str(path)


def made_model(name: str, folder: Path) -> str:
    """Return the name of a model; AST-base is made in a process of its own, with random weights."""
    if name != "ast-base":
        return name
    make = f"""
import sys, torch, transformers
torch.manual_seed(7)
config = transformers.ASTConfig(num_labels={LABELS})
model = transformers.ASTForAudioClassification(config)
torch.nn.init.normal_(model.classifier.dense.weight)
model.save_pretrained(sys.argv[1])
transformers.ASTFeatureExtractor().save_pretrained(sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", make, str(folder)], check=True, capture_output=True)
    return str(folder)


# The ways -----------------------------------------------------------------------------------------


class Child:
    """A way in a process of its own, which answers a list of files with its laps."""

    batch = BATCH

    def __init__(self, way: str, model: str, device: str, warm_up: str) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu", "--way", way, "--model", model]
        self._process: Any = subprocess.Popen(
            [*command, "--device", device, "--warm-up", warm_up],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        self.pids = [self._process.pid]

    def wait_until_ready(self) -> float | None:
        """Return the clips a second of the model alone, if the way measures it."""
        alone: float | None = self._answer()
        return alone

    def label(self, files: list[str]) -> Laps:
        self._process.stdin.write(json.dumps(files) + "\n")
        self._process.stdin.flush()
        return [(at, done) for at, done in self._answer()]

    def batches(self) -> None:
        return None

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a way ended: {self._process.args}")
        return json.loads(line)


def _be(arguments: argparse.Namespace) -> None:
    """Be the process of one way by hand."""
    with WAYS[arguments.way](arguments.model, arguments.device) as (label, alone):
        label([arguments.warm_up] * BATCH)
        print(json.dumps(alone()), flush=True)
        for line in sys.stdin:
            print(json.dumps(label(json.loads(line))), flush=True)


@contextmanager
def loop(model: str, device: str) -> Iterator[tuple[Label, Callable[[], float | None]]]:
    """Processes that decode, and one that scores: what one would write for a GPU."""
    if device == "cpu":
        with _loop_on_cpu(model) as label:
            yield label, lambda: None
        return
    from workers.scoring import classifier

    loaded = classifier.load(Model(name=model, device=device))
    function = loaded.card.function_to_apply
    with multiprocessing.get_context("spawn").Pool(max(1, cores() - NOT_DECODING)) as pool:

        def label(files: list[str]) -> Laps:
            laps, waiting = [(time.time(), 0)], []
            for samples in pool.imap_unordered(_decoded, files, chunksize=8):
                waiting.append(samples)
                if len(waiting) == BATCH or laps[-1][1] + len(waiting) == len(files):
                    loaded.outcomes(waiting, function, 5)
                    laps.append((time.time(), laps[-1][1] + len(waiting)))
                    waiting = []
            return laps

        yield label, partial(_alone, loaded)


@contextmanager
def _loop_on_cpu(model: str) -> Iterator[Label]:
    from benchmarks.contenders import optimum

    with optimum(model, 1) as label_all:

        def label(files: list[str]) -> Laps:
            began = time.time()
            label_all(sorted(set(files)))
            return [(began, 0), (time.time(), len(files))]

        yield label


def _decoded(path: str) -> np.ndarray:
    import soxr

    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    resampled: np.ndarray = soxr.resample(samples.mean(axis=1), rate, 16_000, quality="HQ")
    return resampled.astype(np.float32)


def _alone(loaded: Any) -> float:
    """Return how many clips a second the model scores that are in memory already."""
    windows = [np.random.default_rng(0).normal(0, 0.1, 80_000).astype(np.float32)] * BATCH
    began, scored = time.perf_counter(), 0
    while time.perf_counter() < began + 2:
        loaded.outcomes(windows, "softmax", 5)
        scored += BATCH
    return scored / (time.perf_counter() - began)


@contextmanager
def pipeline(model: str, device: str) -> Iterator[tuple[Label, Callable[[], float | None]]]:
    import torch
    import transformers

    from workers.scoring import devices, hub

    folder = str(hub.STARTER) if model == "starter" else model
    library: Any = transformers
    library.logging.disable_progress_bar()
    dtype = devices.pick_dtype("auto", torch.device(device))
    ask = library.pipeline("audio-classification", folder, device=device, dtype=dtype)
    size = 8 if device == "cpu" else 32

    def label(files: list[str]) -> Laps:
        laps = [(time.time(), 0)]
        clips = ({"raw": _decoded(path), "sampling_rate": 16_000} for path in files)
        for _ in ask(clips, batch_size=size, top_k=5):
            laps.append((time.time(), laps[-1][1] + 1))
        return laps

    yield label, lambda: None


WAYS = {"loop": loop, "pipeline": pipeline}


class Earmark:
    """`earmark worker` with default settings, an own Valkey, and a SQLite file."""

    def __init__(self, folder: Path, model: str, device: str) -> None:
        from earmark import children, local_cluster, valkey
        from earmark.database import open_database
        from tests.servers import free_port

        self._running = ExitStack()
        self._port = free_port()
        self._log = folder / "worker.log"
        settings = Settings().changed(
            data_dir=folder,
            database={"url": None},
            fetch={"file_roots": (folder / "clips",)},
            model={"name": model, "device": device},
            worker={"metrics_port": self._port},
        )
        url = self._running.enter_context(valkey.running(folder / "valkey"))
        self._settings = local_cluster.use_broker(settings, url=url)
        open_database(self._settings, create=True)
        named_threads = {"PYTHONPATH": str(HOOKS)}
        environment = children.environment(self._settings) | named_threads
        worker = children.running([*children.EARMARK, "worker"], self._log, environment)
        self._worker = self._running.enter_context(worker)
        self.pids = [self._worker.pid]
        self._model, self._turns = model, 0

    def wait_until_ready(self) -> None:
        until = time.monotonic() + READY_S
        while "ready, with" not in self._log.read_text():
            if self._worker.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the worker did not start:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.2)

    def label(self, files: list[str]) -> Laps:
        import earmark

        listed = self._settings.data_dir / "list.txt"
        listed.write_text("\n".join(files))
        self._turns += 1
        began = time.time()
        # Other options than last time, or the ledger would have the answers.
        run = earmark.submit(
            str(listed), settings=self._settings, model=self._model, min_score=1e-9 * self._turns
        )
        while not run.progress().finished:
            time.sleep(0.25)
        if run.progress().states["failed"]:
            raise SystemExit(f"clips failed: {run.progress()}")
        return [(began, 0), *_ended(run)]

    def batches(self) -> tuple[float, float]:
        """Return how many batches and windows the worker has scored."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics") as answer:
            metrics = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines())
        name = "earmark_batch_windows"
        return float(metrics[f"{name}_count"]), float(metrics[f"{name}_sum"])

    def close(self) -> None:
        self._running.close()


def _ended(run: Any) -> Laps:
    import sqlalchemy as sa

    query = sa.text(
        "SELECT finished_at, count(*) FROM clips WHERE run_id = :run GROUP BY 1 ORDER BY 1"
    )
    with run.engine.connect() as connection:
        rows = connection.execute(query, {"run": run.id}).all()
    ended = np.cumsum([clips for _, clips in rows])
    return [(float(at), int(done)) for (at, _), done in zip(rows, ended, strict=True)]


# Measuring ----------------------------------------------------------------------------------------


def _turn(way: Any, files: list[str], costs: Costs) -> None:
    before = way.batches()
    with Account(way.pids) as account:
        laps = way.label(files)
    after = way.batches()
    begin, end = _steady(laps)
    times, done = zip(*laps, strict=True)

    def done_at(at: float) -> float:
        return float(np.interp(at, times, done))

    costs.clips_s.append((done_at(end) - done_at(begin)) / (end - begin))
    costs.cpu_ms.append(account.cpu_ms(begin, end, done_at))
    if (busy := account.busy(begin, end)) is not None:
        costs.busy.append(busy)
    if after:
        costs.batch.append((after[1] - before[1]) / (after[0] - before[0]))


def _steady(laps: Laps) -> tuple[float, float]:
    """Return the times between which the steady part of a turn lies."""
    clips = laps[-1][1]
    within = [at for at, done in laps if FROM * clips <= done <= TO * clips]
    if not within or within[-1] - within[0] < STEADY_S:
        return laps[0][0], laps[-1][0]
    return within[0], within[-1]


def _show(
    device: str,
    arguments: argparse.Namespace,
    model: str,
    costs: dict[str, Costs],
    alone: float | None,
) -> None:
    where = f"{_device_name(device)}, {cores()} cores, {platform.machine()}"
    print(f"\n{where}, {time.strftime('%d %B %Y')}, load {os.getloadavg()[0]:.1f}")
    print(f"{Path(model).name}, {SECONDS} s clips, {arguments.source}, {arguments.turns} turns\n")
    print("| way | clips/s | of the loop's | GPU busy | windows a batch | CPU ms a clip |")
    print("|---|---|---|---|---|---|")
    loop_s = costs["loop by hand"].clips_s
    for way, cost in costs.items():
        ratios = [one / other for one, other in zip(cost.clips_s, loop_s, strict=True)]
        cells = [
            way,
            _spread(cost.clips_s),
            _spread(ratios, 2),
            _spread([100 * share for share in cost.busy]) + (" %" if cost.busy else ""),
            _spread(cost.batch, 1),
            _cpu(cost.cpu_ms, lambda name: not name.startswith(THREAD)),
        ]
        print(f"| {' | '.join(cells)} |")
    if alone:
        ratios = [rate / alone for rate in costs["earmark worker"].clips_s]
        print(f"\nmodel alone: {alone:.0f} clips/s; worker over it: {_spread(ratios, 2)}")
    cpu_ms = costs["earmark worker"].cpu_ms
    for turn in cpu_ms:
        turn["worker but its lanes"] = turn["worker"] - turn.get(LANES, 0.0)
    print(f"\n{_cpu(cpu_ms, lambda name: name == 'worker but its lanes')} ms of CPU a clip")
    threads = _cpu(cpu_ms, lambda name: name.startswith(THREAD))
    print(f"\nCPU ms a clip by thread: {threads}")


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return platform.processor() or device
    ask = "import sys, torch; print(torch.cuda.get_device_name(sys.argv[1]))"
    return subprocess.check_output([sys.executable, "-c", ask, device], text=True).strip()


def _spread(values: list[float], digits: int = 0) -> str:
    if not values:
        return "-"
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _cpu(turns: list[dict[str, float]], wanted: Callable[[str], bool]) -> str:
    """Return medians over the turns, the largest first."""
    medians = []
    for name in filter(wanted, turns[0]):
        ms = statistics.median(turn.get(name, 0.0) for turn in turns)
        medians.append((ms, name.removeprefix(THREAD)))
    return ", ".join(f"{name} {ms:.2f}" for ms, name in sorted(medians, reverse=True) if ms > LEAST)


if __name__ == "__main__":
    main()
