"""`earmark cut`: the sound of events as files of their own, with a table beside them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import numpy as np
import soundfile
import sqlalchemy as sa
from more_itertools import chunked

from db import results
from db.rows import Rows
from db.runs import RunRow
from earmark.core.clips import AudioFacts, Part
from earmark.core.errors import ClipError, Corrupt, UsageError
from earmark.core.settings import Settings
from earmark.events import Rule, events
from earmark.label_files import file_name
from earmark.sound import Listener, Recording

if TYPE_CHECKING:
    from workers.decoding.decoder import Piece

#: Clips that are fetched and decoded at once, and those whose events are held in memory.
AT_ONCE, AHEAD = 4, 256
#: Equal parts of the range of scores; a sample has as many events of each.
BANDS = 10
#: FLAC holds no more channels, and no higher rate.
FLAC_CHANNELS, FLAC_RATE = 8, 655_350
#: In the codecs of files that have more than 16 bits a sample.
DEEP = ("24", "32", "float", "double", "pcm_f")
#: Bytes of the recording's name and of the label that a file's name keeps.
LONGEST = 60
HEARD = ("label", "score", "start_s", "end_s", "clip_id", "uri", "member", "channel")
COLUMNS = ("file_name", "cut_start_s", "cut_end_s", *HEARD)


@contextmanager
def cutting(
    engine: sa.Engine,
    run: RunRow,
    settings: Settings,
    folder: Path,
    *,
    label: str | None = None,
    min_score: float = 0.5,
    sample: int | None = None,
    **form: Unpack[Form],
) -> Iterator[tuple[Rows, list[str]]]:
    """Yield a row for each event's file as it is written, and why others are missing.

    Args:
        label: only events of this label.
        sample: only so many, spread over the scores.

    Raises:
        UsageError: the folder is there already, so that nothing is overwritten.
    """
    found: Iterable[dict[str, Any]] = events(engine, run, Rule(min_score), label=label)
    if sample:
        found = sampled(found, sample)
    with Listener(settings, at_once=AT_ONCE) as listener:
        cutter = Cutter(engine=engine, listener=listener, folder=folder, **form)
        yield cutter.cut(found), cutter.missing


class Form(TypedDict, total=False):
    """How events are cut."""

    #: Seconds before and after each event.
    pad_s: float
    format: Literal["flac", "wav"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutter:
    """Cuts events out of their recordings into a new folder, at their own rate and channels."""

    engine: sa.Engine
    listener: Listener
    folder: Path
    #: Seconds before and after each event.
    pad_s: float = 1.0
    format: Literal["flac", "wav"] = "flac"
    #: Why events are missing, a sentence for each clip.
    missing: list[str] = field(default_factory=list)

    def cut(self, events: Iterable[dict[str, Any]]) -> Rows:
        """Write events, clip by clip, as they are taken; yield a row for each file.

        Raises:
            UsageError: the folder is there already, so that nothing is overwritten.
        """
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            reason = f"{self.folder} cannot be made as a new folder: {error.strerror}."
            raise UsageError(reason=reason) from error
        return Rows(chain([COLUMNS], self._lines(events)))

    def _lines(self, events: Iterable[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
        clips = (list(group) for _, group in groupby(events, itemgetter("clip_id")))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for some in chunked(clips, AHEAD):
                yield from chain.from_iterable(pool.map(self._cut_clip, some))

    def _cut_clip(self, events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        clip = results.clip(self.engine, events[0]["clip_id"])._asdict()
        rows: list[tuple[Any, ...]] = []
        try:
            recording = self.listener.open(clip["uri"], Part.of(clip))
            for event in events:
                name, *span = self._cut_event(recording, clip, event)
                rows.append((name, *span, *(event[column] for column in HEARD)))
        except ClipError as error:
            self.missing.append(f"{events[0]['uri']}: {error}")
        return rows

    def _cut_event(
        self, recording: Recording, clip: Mapping[str, Any], event: dict[str, Any]
    ) -> tuple[str, float, float]:
        start_s, end_s = max(0.0, event["start_s"] - self.pad_s), event["end_s"] + self.pad_s
        rate, channels = clip["source_sample_rate"], clip["channels"]
        kept = list(range(channels))
        if event["channel"]:
            kept = [event["channel"] - 1]
        bits = 24 if any(word in clip["codec"] for word in DEEP) else 16
        fits = channels <= FLAC_CHANNELS and rate <= FLAC_RATE
        path = self.folder / f"{_name(event)}.{self.format if fits else 'wav'}"
        with _new_sound(path, rate, len(kept), bits) as sound:
            for frames in _frames(recording.stretch(start_s, end_s), rate, channels):
                sound.write(_integers(frames[:, kept], bits))
            seconds = sound.frames / rate
        return path.name, start_s, start_s + seconds


@contextmanager
def _new_sound(path: Path, rate: int, channels: int, bits: int) -> Iterator[soundfile.SoundFile]:
    """Open a new file for samples; without all of them it is not left behind."""
    try:
        # Another file of that name is not written over, nor is a link followed.
        with path.open("xb+") as file:
            kind = {"subtype": f"PCM_{bits}", "format": path.suffix[1:]}
            with soundfile.SoundFile(file, "w", rate, channels, **kind) as sound:
                yield sound
    except (OSError, soundfile.LibsndfileError) as error:
        raise UsageError(reason=f"{path} cannot be written: {error}.") from error
    except ClipError:
        path.unlink()
        raise


def _frames(pieces: Iterator[Piece], rate: int, channels: int) -> Iterator[np.ndarray]:
    """Yield pieces as whole frames, (frames, channels)."""
    held = np.empty(0, np.float32)
    for piece in pieces:
        held = np.concatenate([held, piece.samples])
        whole = len(held) - len(held) % channels
        yield held[:whole].reshape(-1, channels)
        held = held[whole:]
    end = piece.end
    assert isinstance(end, AudioFacts)
    if (end.source_sample_rate, end.channels) != (rate, channels):
        raise Corrupt(reason="it is not the file any more that was heard")


def _integers(frames: np.ndarray, bits: int) -> np.ndarray:
    """Return float frames as integers, to the bit those that the decoder read."""
    top = 2.0 ** (bits - 1)
    numbers = np.clip(np.rint(frames * np.float32(top)), -top, top - 1)
    return np.left_shift(numbers.astype(np.int32), 32 - bits)


def _name(event: Mapping[str, Any]) -> str:
    """Return a name that no other event has, made of the clip's, the time and the label."""
    address = (event["member"] or event["uri"]).rpartition("/")[2].rpartition(".")[0]
    channel = f"channel{event['channel']}-" if event["channel"] else ""
    time = f"{channel}{event['start_s']:.2f}-{event['end_s']:.2f}"
    words = (file_name(text, LONGEST) for text in (address, event["label"]))
    return "-".join([str(event["clip_id"]), next(words), time, next(words)])


def sampled(events: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return so many events at random, always the same: as many of each tenth of the scores."""
    chance = random.Random(0)  # noqa: S311 - not to keep a secret
    bands: list[list[dict[str, Any]]] = [[] for _ in range(BANDS)]
    seen = [0] * BANDS
    for event in events:
        band = min(max(int(event["score"] * BANDS), 0), BANDS - 1)
        place = chance.randrange(seen[band] + 1)
        seen[band] += 1
        if len(bands[band]) < count:
            bands[band].insert(place, event)
        elif place < count:
            bands[band][place] = event
    rounds = chain.from_iterable(zip_longest(*reversed(bands)))
    chosen = [event for event in rounds if event is not None]
    return sorted(chosen[:count], key=itemgetter("clip_id", "start_s"))
