"""A list in; what a run of all of it will take, measured on a random sample, out."""

from __future__ import annotations

import json
import math
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from more_itertools import sample as sampled
from pydantic import ByteSize

from db import charts
from db.pace import measure
from earmark import api, folders, progress
from earmark.core.errors import UsageError
from producer.lists import Tally
from producer.sources import read_clips

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from earmark.api import Run
    from earmark.core.options import RunOptions
    from earmark.core.settings import Settings

#: As many clips are in progress as in a run, and they are recorded one by one soon enough to tell the speed.
CHUNK_SIZE = 4
UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Plan:
    """What was seen in a sample, and what follows for the list."""

    clips: int
    refused_lines: int
    sampled: int
    done: int
    #: Bytes and seconds of audio of the list, failures included as they were in the sample.
    bytes: int
    audio_s: float
    #: Of one worker on this machine; None where the sample was too small or too quick to tell.
    clips_per_s: float | None
    #: With one such worker.
    eta_s: float | None
    #: How many such workers do it within the time asked for.
    workers: int | None
    hosts: list[dict[str, Any]]
    errors: list[dict[str, Any]]

    @property
    def success(self) -> tuple[float, float]:
        """The share of clips that get a result, and how far the list's may be from it (95%, Agresti and Coull)."""
        share = (self.done + 2) / (self.sampled + 4)
        return self.done / self.sampled, 2 * math.sqrt(share * (1 - share) / (self.sampled + 4))

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "success": self.success[0], "success_within": self.success[1]}


def plan(
    sources: Sequence[str],
    settings: Settings,
    *,
    options: RunOptions,
    sample: int = 200,
    within_s: float | None = None,
    limit: int | None = None,
    **listing: Any,
) -> Plan:
    """Read the whole list, run a random sample of it with one worker on this machine, and keep nothing.

    Raises:
        UsageError: a source cannot be read, or holds no clip.
    """
    folders.check_temporary()
    tally = Tally()
    with progress.screen.status("Reading the whole list"):
        chosen = sampled(islice(read_clips(sources, tally=tally, **listing), limit), sample)
    if not chosen:
        raise UsageError(reason=f"There is no clip in {', '.join(sources)}.")
    uris = [clip.uri for clip in chosen]
    with _tried(uris, settings, options, folders.file_roots(sources)) as run:
        seen = measure(run.engine, run.id)
        hosts = list(charts.hosts(run.engine, run.id))
        errors = charts.top_errors(run.engine, run.id)
    each = tally.clips / seen.clips
    alone_s = tally.clips / seen.clips_per_s if seen.clips_per_s else None
    return Plan(
        clips=tally.clips,
        refused_lines=tally.refused,
        sampled=seen.clips,
        done=seen.done,
        bytes=round(seen.bytes * each),
        audio_s=seen.audio_s * each,
        clips_per_s=seen.clips_per_s,
        eta_s=alone_s,
        workers=math.ceil(alone_s / within_s) if alone_s and within_s else None,
        hosts=hosts,
        errors=[dict(zip(("code", "clips", "example"), error, strict=True)) for error in errors],
    )


@contextmanager
def _tried(
    uris: list[str], settings: Settings, options: RunOptions, roots: tuple[Path, ...]
) -> Iterator[Run]:
    """Run some clips in a temporary folder, queue and database; yield the run, then delete it all."""
    with TemporaryDirectory(prefix="earmark-plan-") as folder:
        part = Path(folder, "sample.jsonl")
        part.write_text("".join(json.dumps({"url": uri}) + "\n" for uri in uris), encoding="utf-8")
        here = settings.changed(
            data_dir=Path(folder),
            database={"url": None},
            # A run of the whole list tries again what fails for a while.
            ledger={"max_attempts": 1},
        )
        run = api.run_here(
            [str(part)],
            here,
            options,
            roots=roots,
            chunk_size=CHUNK_SIZE,
            on_interrupt="Stopped; nothing is kept.",
        )
        try:
            yield run
        finally:
            run.engine.dispose()


def seconds_in(text: str) -> float:
    """Return the seconds in a span of time such as 8h, 90min or 1.5d; raise UsageError for anything else."""
    said = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", text.strip())
    if not said or not float(said[1]):
        raise UsageError(reason=f"{text!r} is no span of time; say 90s, 30min, 8h or 2d.")
    return float(said[1]) * UNITS_S[said[2]]


def sentences(found: Plan, within: str | None) -> Iterator[str]:
    """Yield what a person wants to know of a plan, a line each."""
    share, give = found.success
    refused = f" ({found.refused_lines} lines refused)" if found.refused_lines else ""
    yield f"{found.clips} clips{refused}, {found.sampled} of them tried on this machine; nothing is kept."
    yield f"success: {share:.1%}, give or take {give:.1%}"
    yield f"volume: {ByteSize(found.bytes).human_readable(decimal=True)}, {found.audio_s / 3600:.1f} hours of audio"
    if found.clips_per_s is None or found.eta_s is None:
        yield "speed: too few clips, or too quick, to tell; a larger --sample may"
        return
    yield f"speed: {found.clips_per_s:.1f} clips/s by one worker here, {progress.in_words(found.eta_s)} for all"
    if found.workers:
        yield f"within {within}: {found.workers} such worker{'s' if found.workers > 1 else ''}"
