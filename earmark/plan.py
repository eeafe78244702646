"""`earmark plan`: estimate a run of a whole list from a random sample of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from more_itertools import sample as sampled
from pydantic import ByteSize

from db import charts
from db.pace import Measured, measure
from earmark import catalog, folders, machine_speed, terminal
from earmark.core.clips import Clip
from earmark.core.errors import UsageError
from earmark.core.options import Listing, RunOptions
from earmark.core.settings import Settings
from earmark.run_here import run_here
from producer.sources import read_clips
from producer.tally import Tally
from workers.scoring import hub

if TYPE_CHECKING:
    from earmark.run_object import Run

#: Small enough that clips are recorded steadily, which shows the speed of a small sample.
CHUNK_SIZE = 4
#: Clips a second of a fast GPU; an H200 scores 1,345 with AST-base.
GPU_CLIPS_S = 1000
UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Plan:
    """The outcome of a sample, and the estimate for the list."""

    clips: int
    refused_lines: int
    sampled: int
    done: int
    #: Bytes and seconds of audio of the list, failures included as they were in the sample.
    bytes: int
    audio_s: float
    #: Of one worker on this machine; None if the sample was too small or too quick.
    clips_per_s: float | None
    #: With one such worker.
    eta_s: float | None
    #: How many such workers do it within the time asked for.
    workers: int | None
    #: Clips a second that one core here decodes, if they were Ogg Vorbis; None if none was decoded.
    core_clips_s: float | None
    #: How many such cores a GPU wants that scores GPU_CLIPS_S clips a second.
    gpu_cores: int | None
    hosts: list[dict[str, Any]]
    errors: list[dict[str, Any]]
    license: str | None = None
    #: A model on this machine with the same labels that takes less time, as a sentence.
    cheaper: str | None = None

    @property
    def success(self) -> tuple[float, float]:
        """The share of clips with a result, and its margin for the list (95%, Agresti-Coull)."""
        trials = self.sampled + 4
        share = (self.done + 2) / trials
        return self.done / self.sampled, 2 * math.sqrt(share * (1 - share) / trials)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "success": self.success[0], "success_within": self.success[1]}


def plan(
    sources: Sequence[str],
    settings: Settings,
    *,
    options: Sequence[RunOptions],
    sample: int = 200,
    within_s: float | None = None,
    limit: int | None = None,
    listing: Listing | None = None,
) -> Plan:
    """Read the whole list, and run a random sample of it with one worker here; keep nothing.

    Raises:
        UsageError: a source cannot be read, or holds no clip.
    """
    folders.check_temporary()
    tally, chosen = _sampled(sources, listing, limit, sample, settings)
    with _tried(chosen, settings, options, folders.file_roots(sources)) as run:
        seen = measure(run.engine, run.id)
        hosts = list(charts.hosts(run.engine, run.id))
        errors = charts.top_errors(run.engine, run.id)
    scale = tally.clips / seen.clips
    eta_s = tally.clips / seen.clips_per_s if seen.clips_per_s else None
    workers = math.ceil(eta_s / within_s) if eta_s and within_s else None
    return Plan(
        clips=tally.clips,
        refused_lines=tally.refused,
        sampled=seen.clips,
        done=seen.done,
        bytes=round(seen.bytes * scale),
        audio_s=seen.audio_s * scale,
        clips_per_s=seen.clips_per_s,
        eta_s=eta_s,
        workers=workers,
        **_decoding(seen, settings),
        hosts=hosts,
        errors=[dict(zip(("code", "clips", "example"), error, strict=True)) for error in errors],
        **_of_models(options, settings if seen.done else None),
    )


def _of_models(options: Sequence[RunOptions], settings: Settings | None) -> dict[str, Any]:
    """Return the models' licences, and with settings which cheaper models there are."""
    licenses, cheaper = [], []
    for each in options:
        licenses.append(hub.license_of(each.model, each.revision))
        if settings:
            cheaper.append(catalog.cheaper(each.model, each.revision, settings))
    stated = ", ".join(each or "not stated" for each in licenses)
    return {
        "license": stated if any(licenses) else None,
        "cheaper": "; ".join(filter(None, cheaper)) or None,
    }


def _sampled(
    sources: Sequence[str],
    listing: Listing | None,
    limit: int | None,
    sample: int,
    settings: Settings,
) -> tuple[Tally, list[Clip]]:
    tally = Tally()
    with terminal.screen.status("Reading the whole list"):
        clips = read_clips(sources, listing, tally, settings.fetch)
        chosen = sampled(islice(clips, limit), sample)
    if not chosen:
        raise UsageError(reason=f"There is no clip in {', '.join(sources)}.")
    return tally, chosen


def _decoding(seen: Measured, settings: Settings) -> dict[str, Any]:
    """Return the clips a second that a core decodes, and the cores that a GPU wants."""
    if not seen.done:
        return {"core_clips_s": None, "gpu_cores": None}
    decode_ms = machine_speed.decoding_ms(settings.audio) * seen.audio_s / seen.done
    gpu_cores = machine_speed.cores_wanted(GPU_CLIPS_S, decode_ms)
    return {"core_clips_s": 1000 / decode_ms, "gpu_cores": gpu_cores}


@contextmanager
def _tried(
    clips: list[Clip],
    settings: Settings,
    options: Sequence[RunOptions],
    roots: tuple[Path, ...],
) -> Iterator[Run]:
    """Run some clips in a temporary folder, queue and database, which are deleted at the end."""
    with TemporaryDirectory(prefix="earmark-plan-") as folder:
        here = settings.changed(
            data_dir=Path(folder),
            database={"url": None},
            # A run of the whole list tries again what fails for a while.
            ledger={"max_attempts": 1},
        )
        run = run_here(
            clips,
            here,
            options,
            roots=roots,
            chunk_size=CHUNK_SIZE,
            on_interrupt="Stopped; nothing is kept.",
        )
        try:
            # All models are as quick as the slowest, since they share one pass.
            yield max(run.together, key=lambda each: each.progress().seconds)
        finally:
            run.engine.dispose()


def seconds_in(text: str) -> float:
    """Return the seconds in a span of time such as 8h, 90min or 1.5d.

    Raises:
        UsageError: it is something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", text.strip())
    if not match or not float(match[1]):
        raise UsageError(reason=f"{text!r} is no span of time; say 90s, 30min, 8h or 2d.")
    return float(match[1]) * UNITS_S[match[2]]


def sentences(plan: Plan, within: str | None) -> Iterator[str]:
    """Yield a plan as sentences, a line each."""
    share, margin = plan.success
    refused = f" ({plan.refused_lines} lines refused)" if plan.refused_lines else ""
    tried = f"{plan.sampled} of them tried on this machine; nothing is kept."
    yield f"{terminal.count_of(plan.clips, 'clip')}{refused}, {tried}"
    yield f"success: {share:.1%}, give or take {margin:.1%}"
    yield f"licence of the model: {plan.license or 'not stated'}"
    if plan.cheaper:
        yield f"model: {plan.cheaper}"
    volume = ByteSize(plan.bytes).human_readable(decimal=True)
    yield f"volume: {volume}, {plan.audio_s / 3600:.1f} hours of audio"
    if plan.core_clips_s is not None:
        gpu = f"a GPU of {GPU_CLIPS_S} clips/s needs {plan.gpu_cores} cores"
        yield f"decoding: {plan.core_clips_s:.0f} clips/s by a core, as Ogg Vorbis; {gpu}"
    if plan.clips_per_s is None or plan.eta_s is None:
        few = f"{plan.sampled} clips are too few, or too quick, to tell"
        yield f"speed: {few}; a larger --sample may"
        return
    time_left = terminal.in_words(plan.eta_s)
    yield f"speed: {plan.clips_per_s:.1f} clips/s by one worker here, {time_left} for all"
    if plan.workers:
        yield f"within {within}: {terminal.count_of(plan.workers, 'such worker')}"
