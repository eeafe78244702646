"""Lists as people have them: each is read as it is meant, or refused with what to type."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile

from earmark.core.clips import Part
from earmark.core.errors import UsageError
from earmark.core.options import Listing
from producer.sources import read_clips
from producer.tally import Tally

if TYPE_CHECKING:
    from pathlib import Path

AUDIOSET = (
    "# Segments csv created Sun Mar  5 10:54:31 2017\n"
    "# num_ytids=2, num_segs=2, num_unique_labels=527, num_positive_labels=4\n"
    "# YTID, start_seconds, end_seconds, positive_labels\n"
    'a, 0.000, 10.000, "/m/068hy,/m/07q6cd_"\n'
    'b, 30.500, 40.500, "/m/03j1ly"\n'
)
LONG = "A caption that was not quoted and so stands where the address should be. " * 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files that the lists below name."""
    for name in ("a.wav", "b.wav", "audio/fold1/a.wav", "clips/a.wav", "ä.wav", "x#t=1,2.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def read(*sources: Path | str, **options: Any) -> tuple[list[Any], Tally]:
    tally = Tally()
    clips = list(read_clips([str(source) for source in sources], Listing(**options), tally))
    assert tally.clips + tally.blank + tally.refused + tally.extra + tally.not_audio == tally.lines
    return clips, tally


#: Each name a clip has, or its name and its meta, its span.
READ: dict[str, tuple[str, str | bytes, dict[str, Any], list[Any]]] = {
    "semicolons, as Excel writes them": (
        "l.csv",
        "url;site\na.wav;A\nb.wav;B\n",
        {},
        [("a.wav", {"site": "A"}), ("b.wav", {"site": "B"})],
    ),
    "empty columns and rows of Excel": (
        "l.csv",
        "url;site;;\na.wav;A;;\n;;;\n",
        {},
        [("a.wav", {"site": "A"})],
    ),
    "a pipe": ("l.csv", "site|url\nA|a.wav\n", {}, [("a.wav", {"site": "A"})]),
    "tabs in a csv": ("l.csv", "url\tsite\na.wav\tA\n", {}, [("a.wav", {"site": "A"})]),
    "commas in a tsv": ("l.tsv", "url,site\na.wav,A\n", {}, [("a.wav", {"site": "A"})]),
    "a table called txt": ("l.txt", "url\tsite\na.wav\tA\n", {}, [("a.wav", {"site": "A"})]),
    "a line for Excel": ("l.csv", "sep=;\nurl;site\na.wav;A\n", {}, [("a.wav", {"site": "A"})]),
    "a delimiter that is said": (
        "l.csv",
        "url^site\na.wav^A\n",
        {"delimiter": "^"},
        [("a.wav", {"site": "A"})],
    ),
    "cp1252 that is said": (
        "l.csv",
        "url,site\nä.wav,Wörth\n".encode("cp1252"),
        {"encoding": "cp1252"},
        [("ä.wav", {"site": "Wörth"})],
    ),
    "UTF-16 without a mark": (
        "l.csv",
        "url,site\nä.wav,Wörth\n".encode("utf-16-le"),
        {},
        [("ä.wav", {"site": "Wörth"})],
    ),
    "UTF-16 the other way round": ("l.txt", "a.wav\n".encode("utf-16-be"), {}, ["a.wav"]),
    "no header": (
        "l.csv",
        "7,a.wav\n8,b.wav\n",
        {},
        [("a.wav", {"1": "7"}), ("b.wav", {"1": "8"})],
    ),
    "no header, which is said": (
        "l.csv",
        "7,a.wav\n",
        {"no_header": True, "url_col": "2"},
        [("a.wav", {"1": "7"})],
    ),
    "comments before the header": (
        "l.csv",
        "# made by hand\n\n# twice\nurl,site\na.wav,A\n",
        {},
        [("a.wav", {"site": "A"})],
    ),
    "space and capitals in the header": (
        "l.csv",
        " URL , site\na.wav, A\n",
        {},
        [("a.wav", {"site": "A"})],
    ),
    "a JSON array": (
        "l.json",
        '[{"url": "a.wav", "site": "A"},\n {"url": "b.wav"}, "a.wav"]',
        {},
        [("a.wav", {"site": "A"}), "b.wav", "a.wav"],
    ),
    "JSON of an object a line": (
        "l.json",
        '{"url": "a.wav"}\n{"url": "b.wav"}\n',
        {},
        ["a.wav", "b.wav"],
    ),
    "JSON objects over several lines": (
        "l.json",
        '{\n "url": "a.wav"\n}\n{\n "url": "b.wav"\n}\n',
        {},
        ["a.wav", "b.wav"],
    ),
    "lines in quotes": ("l.txt", "\"a.wav\"\n'b.wav'\n", {}, ["a.wav", "b.wav"]),
    "backslashes in a relative name": ("l.txt", "audio\\fold1\\a.wav\n", {}, ["audio/fold1/a.wav"]),
    "ESC-50": (
        "meta/esc50.csv",
        "filename,fold,target\na.wav,1,0\n",
        {"base": "{folder}/audio/fold1"},
        [("audio/fold1/a.wav", {"fold": "1", "target": "0"})],
    ),
    "UrbanSound8K": (
        "metadata/us8k.csv",
        "slice_file_name,start,end,fold\na.wav,0.5,4.5,1\n",
        {"base": "{folder}", "template": "audio/fold{fold}/{slice_file_name}"},
        [
            (
                "audio/fold1/a.wav",
                {"slice_file_name": "a.wav", "start": "0.5", "end": "4.5", "fold": "1"},
            )
        ],
    ),
    "FSD50K": (
        "dev.csv",
        "fname,labels,split\na,Bark,train\n",
        {"template": "clips/{fname}.wav"},
        [("clips/a.wav", {"fname": "a", "labels": "Bark", "split": "train"})],
    ),
    "Common Voice": (
        "validated.tsv",
        "client_id\tpath\tsentence\nx\ta.wav\tSay \"hi\n",
        {"base": "{folder}/clips"},
        [("clips/a.wav", {"client_id": "x", "sentence": 'Say "hi'})],
    ),
    "AudioSet": (
        "eval_segments.csv",
        AUDIOSET,
        {"template": "{YTID}.wav"},
        [
            ("a.wav", {"YTID": "a", "positive_labels": "/m/068hy,/m/07q6cd_"}, (0.0, 10.0)),
            ("b.wav", {"YTID": "b", "positive_labels": "/m/03j1ly"}, (30.5, 40.5)),
        ],
    ),
    "a NeMo manifest": (
        "manifest.json",
        '{"audio_filepath": "a.wav", "offset": 1.5, "duration": 2.25, "text": "hi"}\n'
        '{"audio_filepath": "b.wav", "duration": 4.0, "text": "ho"}\n',
        {},
        [("a.wav", {"text": "hi"}, (1.5, 3.75)), ("b.wav", {"duration": 4.0, "text": "ho"})],
    ),
    "spans in columns that are said": (
        "l.csv",
        "url;from;to\na.wav;0:01;2,5\na.wav;;\n",
        {"start_col": "from", "end_col": "to"},
        [("a.wav", {}, (1.0, 2.5)), "a.wav"],
    ),
    "spans that are not wanted": (
        "l.csv",
        "url,start_s,end_s\na.wav,1,2\n",
        {"start_col": ""},
        [("a.wav", {"start_s": "1", "end_s": "2"})],
    ),
    "media fragments": (
        "l.txt",
        "a.wav#t=4,8\na.wav#t=npt:1:02\nx#t=1,2.wav\n",
        {},
        [("a.wav", {}, (4.0, 8.0)), ("a.wav", {}, (62.0, None)), "x#t=1,2.wav"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("situation", READ)
def test_a_list_is_read_as_it_is_meant(folder: Path, situation: str) -> None:
    name, content, options, expected = READ[situation]
    options = {
        key: value.format(folder=folder) if key == "base" else value
        for key, value in options.items()
    }
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    clips, tally = read(file, **options)
    assert not tally.examples
    assert not tally.missing
    rows = [each if isinstance(each, tuple) else (each,) for each in expected]
    for clip, (uri, *others) in zip(clips, rows, strict=True):
        assert clip.uri == str(folder / uri)
        assert clip.meta == (others[0] if others else {})
        assert clip.part == (Part(*others[1]) if others[1:] else None)


#: What is told of the one row that is refused; the row after it is read.
REFUSED = {
    "a caption instead of a URL": (f"url,caption\n{LONG},a.wav\na.wav,", "shifted, for 'caption'"),
    "a caption with a comma": ("caption,url\nrain, far away,a.wav\n,a.wav", "shifted, for 'more'"),
    "a data: URI": (f"url\ndata:audio/wav;base64,{'A' * 5000}\na.wav", "data: URI"),
    "a path beyond all limits": (f"url\n/{'x/' * 3000}a.wav\na.wav", "neither a URL nor"),
    "a name beyond all limits": (f"url\n/{'x' * 300}.wav\na.wav", "neither a URL nor"),
    "words": ("url\nno recording\na.wav", "{folder}/no recording, and 'no recording' is no URL"),
    "a path of Windows": ("url\nC:\\sounds\\a.wav\na.wav", "path of Windows: write it as this"),
    "a share of Windows": ("url\n\\\\nas\\a.wav\na.wav", "--base"),
    "a URL without slashes": ("url\nhttps:example.org/a.wav\na.wav", "begins like https://"),
    "no time": ("url,start_s,end_s\na.wav,soon,2\na.wav,,", "'soon' is no number of seconds"),
    "a span that ends too early": ("url,start_s,end_s\na.wav,3,2\na.wav,,", "not after its"),
}  # fmt: skip


@pytest.mark.parametrize("situation", REFUSED)
def test_an_odd_row_is_refused_with_its_line_and_the_rest_is_read(
    folder: Path, situation: str
) -> None:
    content, reason = REFUSED[situation]
    (folder / "l.csv").write_text(content)
    clips, tally = read(folder / "l.csv")
    assert [clip.uri for clip in clips] == [f"{folder}/a.wav"]
    (refused,) = tally.examples
    assert refused.line == 2
    assert reason.format(folder=folder) in refused.reason
    assert len(str(refused)) < 400


def test_a_row_that_is_not_utf8_shows_what_it_would_be(folder: Path) -> None:
    (folder / "l.csv").write_bytes(b"url,site\n\xe4.wav,W\xf6rth\na.wav,B\n")
    clips, tally = read(folder / "l.csv")
    assert [clip.uri for clip in clips] == [f"{folder}/a.wav"]
    assert "--encoding cp1252 (Excel in Western Europe) it has 'ä.wav,Wörth'" in str(
        tally.examples[0]
    )


def test_nothing_private_of_a_url_is_told(folder: Path) -> None:
    rows = [
        "some words here,https://me:secret@h.org/a.wav?sig=secret",
        "https:h.org/a.wav?sig=secret,",
        "https://me:secret@h.org/\xe4.wav?sig=secret,\xe4",
    ]
    (folder / "l.csv").write_bytes("\n".join(["url,note", *rows, "a.wav,"]).encode("cp1252"))
    _, tally = read(folder / "l.csv")
    assert tally.refused == 3
    assert "secret" not in str([str(each) for each in tally.examples])


def test_a_file_that_is_not_there_is_a_clip_with_the_path_that_was_tried(folder: Path) -> None:
    (folder / "l.csv").write_text("filename\ngone.wav\nb.wav\n")
    clips, tally = read(folder / "l.csv")
    assert [clip.uri for clip in clips] == [f"{folder}/gone.wav", f"{folder}/b.wav"]
    assert (tally.missing, tally.tried) == (1, f"{folder}/gone.wav")
    # The workers' disk may hold what this machine does not.
    assert read(folder / "l.csv", base="/nowhere/here")[1].missing == 0


@pytest.mark.parametrize(
    ("name", "content", "options", "sentence"),
    [
        ("l.csv", b"lnk,site\na.wav,A\n", {"url_col": "link"}, "Did you mean lnk"),
        ("l.csv", b"url\na.wav\n", {"template": "{fold}.wav"}, "no column 'fold'"),
        ("l.csv", b"url\na.wav\n", {"template": "{fold"}, "template '{fold' cannot be read"),
        ("l.csv", b"url\na.wav\n", {"key_col": "id"}, "Say --key-col"),
        ("l.csv", b"url\na.wav\n", {"encoding": "latin0"}, "no text encoding 'latin0'"),
        ("l.csv", b"url\na.wav\n", {"delimiter": "::"}, "A delimiter is one character"),
        ("l.csv", b'"url,site"\n"a.wav,A"\n', {}, "take off the quotes at both ends"),
        ("l.csv", b"Stra\xdfe;url\nx;a.wav\n", {}, "first line of .* --encoding"),
        ("l.csv", b"PK\x03\x04", {}, "Excel workbook"),
        ("l.csv", b"<!DOCTYPE html><title>Sign in</title>", {}, "a web page, not a list"),
    ],
)
def test_a_list_that_cannot_be_read_says_what_to_type(
    folder: Path, name: str, content: bytes, options: dict[str, Any], sentence: str
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=sentence):
        read(folder / name, **options)


def test_a_damaged_json_array_gives_the_elements_before_the_damage(tmp_path: Path) -> None:
    urls = ",".join(f'"https://h/{n}"' for n in range(20_000))
    (tmp_path / "l.json").write_text(f"[{urls}, oops, " + " " * 3_000_000 + "]")
    clips, tally = read(tmp_path / "l.json")
    assert [clip.uri for clip in clips] == [f"https://h/{n}" for n in range(20_000)]
    assert (tally.examples[0].line, "breaks off here" in tally.examples[0].reason) == (20_001, True)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """A folder with sound, some of it without a usual name, and with what else lies in folders."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for name in ("a.wav", "voice.3gp", "noname"):
        soundfile.write(folder / name, np.zeros(800), 8000, format="WAV")
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(900))
    (folder / "Summary.txt").write_text("DATE,TIME,LAT\n2026-May-01,04:00:00,0.0\n")
    (folder / "list.txt").write_text("oddly named\na.wav\n")
    os.mkfifo(folder / "pipe")
    return folder


def test_in_a_folder_the_first_bytes_decide_and_other_files_are_counted(recordings: Path) -> None:
    clips, tally = read(recordings)
    assert [clip.uri for clip in clips] == [
        f"{recordings}/{name}" for name in ("a.wav", "noname", "voice.3gp")
    ]
    assert (tally.not_audio, tally.examples) == (4, [])
    assert len(read(recordings, strict=True)[0]) == 7


def test_a_member_of_a_glob_that_is_neither_audio_nor_a_list_is_told(recordings: Path) -> None:
    told = [
        f"{recordings}/{name}: neither audio nor a list" for name in ("Summary.txt", "Thumbs.db")
    ]
    (recordings / "pipe").unlink()
    by_glob, by_shell = read(f"{recordings}/*"), read(*sorted(recordings.iterdir()))
    for clips, tally in (by_glob, by_shell):
        assert [clip.uri.rpartition("/")[2] for clip in clips] == [
            "a.wav", "a.wav", "noname", "voice.3gp",
        ]  # fmt: skip
        assert [str(each) for each in tally.examples if not each.line] == told
    with pytest.raises(UsageError, match="neither audio nor a list known by name"):
        read(recordings / "Thumbs.db")
    assert read(recordings / "voice.3gp")[1].clips == 1
