"""Rebuilds the bundled example clips from Debian packages and synthesis (apt, fluidsynth)."""

from __future__ import annotations

import csv
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import av
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

RATE = 44_100
OUT = Path(__file__).parents[1] / "earmark" / "examples"
PROMPTS = ("queue-periodic-announce", "dir-intro", "demo-congrats", "vm-options")
COLUMNS = "file,label,seconds,sample_rate,channels,source,author,licence,how"
BROKEN_PAGE = (
    "<!DOCTYPE html>\n<html><title>404 Not Found</title>\n<body><h1>Not Found</h1></body></html>\n"
)
Wave: TypeAlias = NDArray[np.float32]  # (samples, 2) at RATE
Note: TypeAlias = tuple[float, float, int, int]  # start, length, key, velocity
Event: TypeAlias = tuple[float, float, str]  # start, end, label
Player: TypeAlias = Callable[[float], Wave]  # seconds to sound


@dataclass(frozen=True)
class Clip:
    file: str
    rate: int
    channels: int
    how: str
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Origin:
    source: str
    author: str
    licence: str
    files: Path = Path()


OWN = Origin("synthesised by training/examples.py", "the Earmark authors", "Apache-2.0")
MIXED: tuple[Event, ...] = ((0, 7.5, "speech"), (7.5, 17, "music"), (10, 17, "siren"))
ENDS = (10, 15, 25, 30, 40, 50, 62.5, 65, 75, 80, 87, 90)
ORDER = [
    "rain",
    "dog",
    "piano",
    "silence",
    "speech",
    "siren",
    "music",
    "silence",
    "speech",
    "dog",
    "rain",
    "silence",
]
LONG: tuple[Event, ...] = tuple(zip((0, *ENDS[:-1]), ENDS, ORDER, strict=True))
CLIPS = (
    Clip(
        "dog.ogg",
        22_050,
        1,
        "the soundfont's recorded bark at pitches and times of our own",
        ((0, 5, "dog"),),
    ),
    Clip("siren.wav", 22_050, 1, "a saturated sine wail with an echo", ((0, 6, "siren"),)),
    Clip("piano.flac", 32_000, 2, "broken chords of our own", ((0, 6, "piano"),)),
    Clip("speech.wav", 16_000, 1, f"the Italian prompt {PROMPTS[0]}", ((0, 7, "speech"),)),
    Clip(
        "music.mp3",
        44_100,
        2,
        "drum hits, a guitar chord and a drone on a beat of our own",
        ((0, 8, "music"),),
    ),
    Clip(
        "rain.ogg",
        44_100,
        2,
        "the soundfont's recording of rain in Seattle, looped",
        ((0, 6, "rain"),),
    ),
    Clip("silence.wav", 16_000, 2, "noise at -80 dB of full scale", ((0, 4, "silence"),)),
    Clip("mixed.m4a", 44_100, 2, "laid out as in mixed.csv, the siren over the music", MIXED),
    Clip("long.ogg", 32_000, 1, "laid out as in long.csv", LONG),
)


def fetch(package: str, author: str, licence: str, root: Path) -> Origin:
    folder = root / package
    folder.mkdir()
    subprocess.run(
        ["apt-get", "download", "-q", package], cwd=folder, check=True, capture_output=True
    )
    deb = next(folder.glob("*.deb"))
    subprocess.run(["dpkg", "-x", deb, folder], check=True)
    version = subprocess.run(
        ["dpkg-deb", "-f", deb, "Version"], check=True, capture_output=True, text=True
    )
    return Origin(
        f"Debian {package} {version.stdout.strip()}", author, licence, folder / "usr/share"
    )


def fetch_all(root: Path) -> dict[str, Origin]:
    effects = fetch("fluid-soundfont-gs", "Frank Wen", "MIT", root)
    instruments = fetch("fluid-soundfont-gm", "Frank Wen", "MIT", root)
    voice = fetch("asterisk-core-sounds-it-g722", "Carlo Flora", "CC BY 3.0", root)
    hits = fetch(
        "sonic-pi-samples",
        "menegass, Zajo, Sub-d, Autistic Lucario (freesound.org)",
        "CC0 1.0",
        root,
    )
    packaged = {
        "dog": effects,
        "rain": effects,
        "piano": instruments,
        "speech": voice,
        "music": hits,
    }
    return packaged | {"siren": OWN, "silence": OWN}


def read(path: Path) -> Wave:
    with av.open(str(path), metadata_errors="replace") as container:
        resampler = av.AudioResampler("fltp", "stereo", RATE)
        frames = (*container.decode(audio=0), None)  # the last None flushes the resampler
        blocks = [block.to_ndarray() for frame in frames for block in resampler.resample(frame)]
    return np.concatenate(blocks, axis=1, dtype=np.float32).T


def loud(wave: Wave, peak: float) -> Wave:
    return wave * np.float32(peak / np.abs(wave).max())


def lay(seconds: float, parts: Iterable[tuple[float, Wave]]) -> Wave:
    """Sums the parts on a strip of that length; what runs over is cut, and both ends are faded."""
    strip = np.zeros((round(seconds * RATE), 2), np.float32)
    for start, sound in parts:
        into = strip[round(start * RATE) :]
        into[: len(sound)] += sound[: len(into)]
    ramp = np.minimum(1, np.arange(len(strip)) / (0.02 * RATE)).astype(np.float32)[:, None]
    return strip * ramp * ramp[::-1]


def variable_length(number: int) -> bytes:
    head = b"" if number < 128 else variable_length(number >> 7)
    return bytes(byte | 128 for byte in head) + bytes([number & 127])


def midi(notes: Iterable[Note], bank: int, program: int) -> bytes:
    """One tick is a millisecond: 500 ticks to a quarter note at the default 120 beats a minute."""
    events = [(0, bytes([0xB0, 0, bank])), (0, bytes([0xC0, program]))]
    for start, length, key, velocity in notes:
        events.append((round(start * 1000), bytes([0x90, key, velocity])))
        events.append((round((start + length) * 1000), bytes([0x80, key, 0])))
    events.sort(key=lambda event: event[0])
    ticks = [0, *(tick for tick, _ in events)]
    body = (
        b"".join(variable_length(at - ticks[i]) + data for i, (at, data) in enumerate(events))
        + b"\x00\xff\x2f\x00"
    )
    return (
        struct.pack(">4sIHHH", b"MThd", 6, 0, 1, 500)
        + struct.pack(">4sI", b"MTrk", len(body))
        + body
    )


def render(font: Path, notes: Iterable[Note], bank: int, program: int) -> Wave:
    with tempfile.TemporaryDirectory() as folder:
        score, sound = Path(folder, "score.mid"), Path(folder, "sound.wav")
        score.write_bytes(midi(notes, bank, program))
        options = ["-n", "-i", "-q", "-C", "0", "-g", "0.8", "-r", str(RATE), "-F", str(sound)]
        subprocess.run(["fluidsynth", *options, font, score], check=True, capture_output=True)
        return read(sound)


def dog(files: Path, seconds: float, rng: np.random.Generator) -> Wave:
    notes: list[Note] = []
    at = 0.15
    while at < seconds - 0.4:
        notes.append((at, 0.4, int(rng.integers(56, 64)), int(rng.integers(95, 125))))
        at += float(rng.choice([0.42, 0.5, 0.95]))
    return loud(render(files / "sounds/sf2/FluidR3_GS.sf2", notes, 1, 123), 0.8)


def rain(files: Path, seconds: float) -> Wave:
    notes: list[Note] = [(0, seconds, 60, 110), (0.3, seconds, 55, 100)]
    return loud(render(files / "sounds/sf2/FluidR3_GS.sf2", notes, 1, 122), 0.6)


def piano(files: Path, seconds: float) -> Wave:
    notes: list[Note] = []
    for bar in range(int(seconds / 2) + 1):
        root, third = ((45, 3), (41, 4), (48, 4), (43, 4))[bar % 4]
        notes.append((bar * 2, 1.9, root, 85))
        for step, above in enumerate((12, 19, 24, 24 + third, 31, 24 + third, 24, 19)):
            notes.append((bar * 2 + step * 0.25, 0.45, root + above, 70 + step % 4 * 8))
    return loud(render(files / "sounds/sf2/FluidR3_GM.sf2", notes, 0, 0), 0.7)


def music(files: Path, seconds: float) -> Wave:
    plan = {  # gain, first time, time between
        "ambi_drone": (0.8, 0, 4),
        "guit_em9": (1, 0, 8),
        "drum_heavy_kick": (0.3, 0, 1),
        "drum_snare_soft": (0.25, 0.5, 1),
        "drum_cymbal_closed": (0.2, 0, 0.25),
    }
    parts: list[tuple[float, Wave]] = []
    for name, (gain, first, every) in plan.items():
        sound = read(files / f"sonic-pi/samples/{name}.flac") * np.float32(gain)
        parts += [(at, sound) for at in np.arange(first, seconds, every)]
    return loud(lay(seconds, parts), 0.4)


def siren(seconds: float) -> Wave:
    """A wail of one sweep each 2.5 s, driven into saturation as a horn is, with a street's echo."""
    time = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(950 - 400 * np.cos(2 * np.pi * time / 2.5)) / RATE
    horn = np.tanh(1.6 * np.sin(phase) + 0.5 * np.sin(2 * phase)).astype(np.float32)[:, None]
    voice = np.repeat(horn, 2, axis=1)
    return loud(lay(seconds, [(0, voice), (0.11, voice * 0.3), (0.23, voice * 0.15)]), 0.55)


def players(origins: dict[str, Origin], rng: np.random.Generator) -> dict[str, Player]:
    files = {label: origin.files for label, origin in origins.items()}
    prompts = (files["speech"] / f"asterisk/sounds/it_IT_m_Carlo/{name}.g722" for name in PROMPTS)
    return {
        "dog": lambda seconds: dog(files["dog"], seconds, rng),
        "rain": lambda seconds: rain(files["rain"], seconds),
        "piano": lambda seconds: piano(files["piano"], seconds),
        "music": lambda seconds: music(files["music"], seconds),
        "speech": lambda _: loud(read(next(prompts)), 0.7),
        "siren": siren,
        "silence": lambda seconds: lay(seconds, []),
    }


def arrange(events: tuple[Event, ...], play: dict[str, Player], rng: np.random.Generator) -> Wave:
    """Lays the events over a noise floor of -80 dB, as no real recording is digitally silent."""
    seconds = max(end for _, end, _ in events)
    floor = rng.normal(0, 1e-4, (round(seconds * RATE), 2)).astype(np.float32)
    parts = [
        (start, lay(end - start, [(0, play[label](end - start))])) for start, end, label in events
    ]
    return floor + lay(seconds, parts)


def save(wave: Wave, clip: Clip) -> None:
    mixed = wave if clip.channels == 2 else wave.mean(axis=1, keepdims=True)
    (save_aac if clip.file.endswith(".m4a") else save_plain)(
        soxr.resample(mixed, RATE, clip.rate), clip
    )


def save_plain(samples: Wave, clip: Clip) -> None:
    with soundfile.SoundFile(OUT / clip.file, "w", clip.rate, clip.channels) as file:
        for start in range(
            0, len(samples), clip.rate
        ):  # libsndfile's Vorbis encoder overflows on one long write
            file.write(samples[start : start + clip.rate])


def save_aac(samples: Wave, clip: Clip) -> None:
    with av.open(str(OUT / clip.file), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("aac", rate=clip.rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples.T), format="fltp", layout="stereo"
        )
        frame.sample_rate, frame.pts = clip.rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def row(clip: Clip, origins: dict[str, Origin]) -> tuple[object, ...]:
    labels = list(dict.fromkeys(label for _, _, label in clip.events))
    homes = list(dict.fromkeys(origins[label] for label in labels))
    credit = (
        " + ".join(dict.fromkeys(getattr(home, fact) for home in homes))
        for fact in COLUMNS.split(",")[5:8]
    )
    return (
        clip.file,
        "+".join(labels),
        clip.events[-1][1],
        clip.rate,
        clip.channels,
        *credit,
        clip.how,
    )


def write_table(name: str, header: str, rows: Iterable[tuple[object, ...]]) -> None:
    with (OUT / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header.split(","), *rows])


def main() -> None:
    rng = np.random.default_rng(2026)
    with tempfile.TemporaryDirectory() as folder:
        origins = fetch_all(Path(folder))
        play = players(origins, rng)
        for clip in CLIPS:
            save(arrange(clip.events, play, rng), clip)
    (OUT / "broken.wav").write_text(BROKEN_PAGE, encoding="utf-8")
    broken = (
        "broken.wav",
        "",
        0,
        0,
        0,
        OWN.source,
        OWN.author,
        OWN.licence,
        "an HTML error page saved as a recording",
    )
    write_table("clips.csv", COLUMNS, [*(row(clip, origins) for clip in CLIPS), broken])
    write_table("mixed.csv", "start_s,end_s,label", MIXED)
    write_table("long.csv", "start_s,end_s,label", LONG)


if __name__ == "__main__":
    main()
