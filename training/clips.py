"""Folders of audio with a manifest.csv in; clips of five seconds and varied copies of them out."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray
from scipy import signal

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

RATE = 16_000
WINDOW_S = 5
SAMPLES = WINDOW_S * RATE
COLUMNS = ("path", "label", "split", "source", "original", "licence", "seconds")
#: The manifest's words for sounds of no label, the first for those that are mixed underneath the
#: others as well.
BACKGROUND, OTHER, SILENCE = "_background", "other", "silence"
#: The example clips and the test set are made of these; two thirds of the csound font's samples are
#: TimGM6mb's as well.
NOT_FOR_TRAINING = (
    "asterisk-core-sounds-it",
    "asterisk-core-sounds-es",
    "csound-soundfont",
    "librosa",
    "sonic-pi",
    "timgm6mb",
    "wesnoth",
)
_TONAL = ("guitar", "music", "piano", "speech")

Wave: TypeAlias = NDArray[np.float32]  # (samples,) at RATE


@dataclass(frozen=True, slots=True)
class Clip:
    path: Path
    label: str
    split: str
    source: str
    original: str
    licence: str

    @property
    def recording(self) -> tuple[str, str]:
        """Say what it was cut from: ESC-10 names the pieces of one recording -A, -B and so on."""
        return self.source, re.sub(r"-[A-Z]\.ogg$", "", self.original)


def read_manifest(folder: Path, name: str = "manifest.csv") -> list[Clip]:
    """Return the folder's clips; refuse a manifest that would train on evaluation data."""
    with (folder / name).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    clips = [Clip(folder / row["path"], *(row[column] for column in COLUMNS[1:6])) for row in rows]
    for clip in clips:
        if clip.split != "test" and clip.source.startswith(NOT_FOR_TRAINING):
            raise ValueError(f"{clip.path} is from {clip.source}, which is kept for evaluation")
    return clips


def read_manifests(folders: Iterable[Path]) -> list[Clip]:
    """Return the clips of all folders; an original may be in one split only."""
    clips = [clip for folder in folders for clip in read_manifest(folder)]
    splits: dict[tuple[str, str], str] = {}
    for clip in clips:
        if splits.setdefault(clip.recording, clip.split) != clip.split:
            raise ValueError(f"{clip.original} of {clip.source} is in two splits")
    return clips


def load(path: Path) -> Wave:
    wave, rate = soundfile.read(path, dtype="float32")
    if rate != RATE:
        raise ValueError(f"{path} has {rate} samples a second, not {RATE}")
    return np.asarray(wave[:SAMPLES])


def pad(wave: Wave, samples: int = SAMPLES) -> Wave:
    return np.pad(wave, (0, max(0, samples - len(wave))))


def vary(wave: Wave, label: str, rng: np.random.Generator) -> Wave:
    """Return five seconds of the clip as another day, room and microphone would have given them."""
    if label == SILENCE:
        return _place(wave, rng)
    wave = _speed(wave, 0.12 if label in _TONAL else 0.28, rng)
    if rng.random() < 0.4:
        wave = _reverberate(wave, rng)
    if rng.random() < 0.2:
        wave = signal.sosfilt(
            signal.butter(1, rng.uniform(1500, 7000), fs=RATE, output="sos"), wave
        )
    if rng.random() < 0.15:
        wave = np.tanh(wave / (np.abs(wave).max() + 1e-9) * rng.uniform(1, 5)) * 0.5
    if rng.random() < 0.35 and len(wave) > RATE:
        wave = _excerpt(wave, rng)
    return _place(wave, rng).astype(np.float32)


def _speed(wave: Wave, octaves: float, rng: np.random.Generator) -> Wave:
    faster = 2 ** rng.uniform(-octaves, octaves)
    return np.asarray(soxr.resample(wave, RATE, int(RATE / faster)))


def _reverberate(wave: Wave, rng: np.random.Generator) -> Wave:
    time = np.arange(int(rng.uniform(0.05, 0.8) * RATE)) / RATE
    response = rng.normal(size=len(time)) * np.exp(-6.9 * time / rng.uniform(0.1, 1.0))
    response *= rng.uniform(0.05, 0.4) / np.sqrt(np.square(response).sum())
    response[0] += 1
    return np.asarray(signal.fftconvolve(wave, response)[: len(wave) + RATE // 4])


def _excerpt(wave: Wave, rng: np.random.Generator) -> Wave:
    """Cut the loudest of four short pieces, so that being short tells nothing of the class."""
    count = min(len(wave), int(rng.uniform(0.4, 3) * RATE))
    starts = rng.integers(0, len(wave) - count + 1, 4)
    loudest = max(starts, key=lambda start: float(np.square(wave[start : start + count]).sum()))
    ramp = np.minimum(1, np.arange(count) / 160)
    return wave[loudest : loudest + count] * ramp * ramp[::-1]


def _place(wave: Wave, rng: np.random.Generator) -> Wave:
    """Put the clip somewhere into five seconds, or five of its seconds, or repeat it with gaps."""
    if len(wave) >= SAMPLES:
        start = rng.integers(0, len(wave) - SAMPLES + 1)
        return wave[start : start + SAMPLES]
    strip = np.zeros(SAMPLES)
    again = rng.random() < 0.35 and len(wave) < 0.7 * SAMPLES
    at = int(rng.integers(0, SAMPLES - len(wave) + 1) * (rng.random() < 0.6))
    while at < SAMPLES:
        strip[at : at + len(wave)] += wave[: SAMPLES - at]
        at += len(wave) + int(rng.uniform(0.05, 1) * RATE) if again else SAMPLES
    floor = rng.normal(0, 10 ** (rng.uniform(-100, -55) / 20), SAMPLES) if rng.random() < 0.6 else 0
    return np.asarray(strip + floor)
