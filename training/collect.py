"""Makes a second training folder of Debian packages and synthesis.

Run it with `python -m training.collect FOLDER`.
"""

from __future__ import annotations

import csv
import hashlib
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr

from training import examples, synthesis
from training.clips import COLUMNS, OTHER, RATE, SAMPLES, Wave

if TYPE_CHECKING:
    from collections.abc import Iterator

CC_BY_SA = "CC BY-SA 3.0"
SEED = 2026


@dataclass(frozen=True, slots=True)
class Wanted:
    """Files of a Debian package that are recordings of one label."""

    package: str
    author: str
    licence: str
    label: str
    pattern: str
    #: At most so many five-second pieces of each file, and so many files.
    pieces: int = 8
    files: int = 80
    split: str = "train"


@dataclass(frozen=True, slots=True)
class Effect:
    """A recorded effect in a sound font."""

    label: str
    name: str
    bank: int
    program: int


KENTA_CHO, CLINT_BELLANGER = "Kenta Cho", "Clint Bellanger and others"
WANTED = (
    *(
        Wanted(f"{game}-data", KENTA_CHO, "BSD-2-Clause", "music", "**/*.ogg", 6, split=split)
        for game, split in (
            ("rrootage", "train"),
            ("noiz2sa", "train"),
            ("parsec47", "train"),
            ("gunroar", "train"),
            ("torus-trooper", "train"),
            ("tumiki-fighters", "train"),
            ("titanion", "valid"),
        )
    ),
    *(
        Wanted(package, author, licence, "music", pattern, 4)
        for package, author, licence, pattern in (
            ("singularity-music", "Max McCracken", CC_BY_SA, "**/*.ogg"),
            ("hyperrogue-music", "Shawn Parrotte", CC_BY_SA, "**/hr3*.ogg"),
            (
                "naev-data",
                "Nikola Whallon, Askyel, Zeropage",
                "CC BY 3.0, CC BY-SA 3.0",
                "**/music/[efntuvz]*.ogg",
            ),
            (
                "supertuxkart-data",
                "0zone0ne, Krobonil, Claude Werner and others",
                CC_BY_SA,
                "**/music/[!cfklPst]*.ogg",
            ),
            ("flare-game", CLINT_BELLANGER, CC_BY_SA, "**/music/*.ogg"),
        )
    ),
    Wanted("flare-game", CLINT_BELLANGER, CC_BY_SA, "fire", "**/environment/open_fire*.ogg", 2),
    Wanted("flare-game", CLINT_BELLANGER, CC_BY_SA, OTHER, "**/environment/[abcfmrst][!a]*.ogg", 2),
    Wanted(
        "supertuxkart-data",
        "Mike Koenig and others",
        "CC0, CC BY, CC BY-SA",
        OTHER,
        "**/sfx/[ceht][!la]*[rsp2n].ogg",
        2,
    ),
    Wanted("fretsonfire-songs-muldjord", "El Senator", CC_BY_SA, "guitar", "**/guitar.ogg"),
    Wanted(
        "fretsonfire-songs-sectoid",
        "Carlos Viola Iborra",
        "MIT",
        "guitar",
        "**/guitar.ogg",
        split="valid",
    ),
    *(
        Wanted(
            "0ad-data",
            "Wildfire Games (http://www.wildfiregames.com/)",
            CC_BY_SA,
            label,
            f"**/audio/{pattern}.ogg",
            pieces,
            files,
            split,
        )
        for label, pattern, pieces, files, split in (
            ("music", "music/*", 6, 80, "train"),
            ("rain", "ambient/weather/rain*", 6, 9, "train"),
            ("sea_waves", "ambient/water/wave*", 6, 9, "train"),
            ("speech", "voice/[!p]*/**/*", 1, 140, "train"),
            ("speech", "voice/persian/**/*", 1, 40, "valid"),
            (OTHER, "ambient/[bd]*/*", 3, 30, "train"),
            (OTHER, "ambient/weather/[tw]*", 4, 9, "train"),
            (OTHER, "actor/fauna/animal/[!cp]*", 1, 50, "train"),
            (OTHER, "actor/fauna/animal/[p]*", 1, 50, "valid"),
            (OTHER, "resource/[!m]*/**/*", 1, 70, "train"),
            (OTHER, "resource/mining/*", 1, 20, "valid"),
            (OTHER, "attack/[!f]*/**/*", 1, 60, "train"),
        )
    ),
    *(
        Wanted("megaglest-data", "The Glest Team", CC_BY_SA, label, pattern, pieces, split="valid")
        for label, pattern, pieces in (
            ("music", "**/music/*.ogg", 6),
            ("rain", "**/sounds/rain.*", 4),
            (OTHER, "**/tilesets/**/[dnhw]*.ogg", 3),
        )
    ),
    Wanted(
        "asterisk-prompt-it-menardi-wav",
        "Marco Menardi e Paola Dal Zot (http://www.voip.ammdomus.it)",
        CC_BY_SA,
        "speech",
        "**/*.wav",
        1,
        120,
    ),
    Wanted(
        "asterisk-core-sounds-en-g722",
        "Allison Smith, Digium",
        CC_BY_SA,
        "speech",
        "**/*.g722",
        1,
        100,
    ),
    Wanted(
        "asterisk-core-sounds-fr-g722",
        "June Wallack, Digium",
        CC_BY_SA,
        "speech",
        "**/*.g722",
        1,
        100,
    ),
)
EFFECTS = (
    *(
        Effect(OTHER, name, 1, program)
        for name, program in (
            ("cut noise", 120),
            ("key click", 121),
            ("telephone", 124),
            ("engine", 125),
            ("laughs", 126),
            ("gun", 127),
        )
    ),
    *(
        Effect(OTHER, name, 2, program)
        for name, program in (
            ("slap", 120),
            ("thunder", 122),
            ("gallop", 123),
            ("creak", 124),
            ("car stops", 125),
            ("scream", 126),
        )
    ),
    *(
        Effect(OTHER, name, 3, program)
        for name, program in (
            ("wind", 122),
            ("bird", 123),
            ("slam", 124),
            ("car passes", 125),
            ("punch", 126),
            ("explosion", 127),
        )
    ),
    *(
        Effect(OTHER, name, 4, program)
        for name, program in (("scratch", 124), ("crash", 125), ("heartbeat", 126))
    ),
    *(
        Effect(OTHER, name, 5, program)
        for name, program in (("bubbles", 122), ("chimes", 124), ("footsteps", 126))
    ),
    *(Effect(OTHER, name, bank, 125) for name, bank in (("train", 6), ("jet", 7), ("starship", 8))),
    Effect("siren", "siren", 5, 125),
)


class Folder:
    """A folder of FLAC files that grows with its manifest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[tuple[object, ...]] = []

    def add(self, wave: Wave, label: str, split: str, facts: tuple[str, str, str]) -> None:
        """Write one clip; `facts` are its source, original and licence."""
        name = f"{label}/{split}_{len(self._rows):05d}.flac"
        (self.path / label).mkdir(parents=True, exist_ok=True)
        soundfile.write(self.path / name, np.clip(wave, -1, 1), RATE)
        self._rows.append((name, label, split, *facts, round(len(wave) / RATE, 2)))

    def close(self) -> None:
        with (self.path / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *self._rows])


def packaged(
    wanted: Wanted, origin: examples.Origin, folder: Folder, rng: np.random.Generator
) -> None:
    licence, source = f"{wanted.licence} {wanted.author}", f"{wanted.package} (Debian)"
    for path in _originals(wanted, origin.files, rng):
        for wave in _pieces(_mono(examples.read(path)), wanted.pieces):
            original = str(path.relative_to(origin.files))
            folder.add(wave, wanted.label, wanted.split, (source, original, licence))


def _originals(wanted: Wanted, root: Path, rng: np.random.Generator) -> list[Path]:
    for archive in root.glob("**/public.zip"):
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(
                archive.parent, [name for name in opened.namelist() if name.startswith("audio/")]
            )
        archive.unlink()
    different = {
        hashlib.sha256(path.read_bytes()).digest(): path
        for path in sorted(root.glob(wanted.pattern))
    }
    paths = sorted(different.values())
    return [paths[place] for place in sorted(rng.permutation(len(paths))[: wanted.files])]


def _mono(wave: examples.Wave) -> Wave:
    return np.asarray(soxr.resample(wave.mean(axis=1), examples.RATE, RATE), np.float32)


def _pieces(wave: Wave, count: int) -> Iterator[Wave]:
    """Yield evenly spread pieces that are heard, or the whole where it is short."""
    last = max(0, len(wave) - SAMPLES)
    starts = np.unique(np.linspace(0, last, count + 2, dtype=int)[1:-1]) if last > SAMPLES else [0]
    for start in starts:
        piece = wave[start : start + SAMPLES]
        if len(piece) > 0.15 * RATE and np.sqrt(np.square(piece).mean()) > 2e-3:
            yield piece


def effects(origin: examples.Origin, folder: Folder, rng: np.random.Generator) -> None:
    font = origin.files / "sounds/sf2/FluidR3_GS.sf2"
    for effect in EFFECTS:
        for _ in range(5 if effect.label == OTHER else 12):
            notes = [
                (
                    float(rng.uniform(0, 1)),
                    4.0,
                    int(rng.integers(52, 68)),
                    int(rng.integers(70, 127)),
                )
            ]
            wave = _mono(examples.render(font, notes, effect.bank, effect.program))
            for piece in _pieces(wave[:SAMPLES], 1):
                facts = ("fluid-soundfont-gs (Debian)", effect.name, "MIT Frank Wen")
                folder.add(piece, effect.label, "train", facts)


def synthesised(folder: Folder, rng: np.random.Generator) -> None:
    for number in range(440):
        name, wave = synthesis.other(number, rng)
        folder.add(wave, OTHER, "train", ("synthetic", f"{name} {number}", "own work (generated)"))
    for number in range(44):
        name, wave = synthesis.other(number, rng)
        folder.add(
            wave, OTHER, "valid", ("synthetic", f"{name} {440 + number}", "own work (generated)")
        )
    for number in range(200):
        facts = ("synthetic strings", f"guitar {number}", "own work (generated)")
        folder.add(synthesis.guitar(rng), "guitar", "train", facts)


def main() -> None:
    folder, rng = Folder(Path(sys.argv[1])), np.random.default_rng(SEED)
    packages = folder.path / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    origins = {}
    for name in {wanted.package: None for wanted in WANTED} | {"fluid-soundfont-gs": None}:
        kept = examples.Origin(name, "", "", packages / name / "usr/share")
        origins[name] = kept if kept.files.is_dir() else examples.fetch(name, "", "", packages)
    synthesised(folder, rng)
    effects(origins["fluid-soundfont-gs"], folder, rng)
    for wanted in WANTED:
        packaged(wanted, origins[wanted.package], folder, rng)
        print(wanted.package, wanted.label, flush=True)
    folder.close()


if __name__ == "__main__":
    main()
