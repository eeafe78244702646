import io
import json
import struct
import tempfile

import pytest
import soundfile

from earmark.core import settings
from tests.workers.decoding import bad_audio
from workers.decoding import child, tags


def facts_of(content):
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(content)
        blocks, meter = child.decode(file.fileno(), 16000, settings.Audio())
        for _ in blocks:
            pass
        return meter.facts()


def tags_of(content):
    return json.loads(facts_of(content).tags or "{}")


def chunk(name, content):
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def test_a_wav_gives_its_guano_its_comment_its_bext_and_its_song_meter():
    comment = b"Recorded at 04:00:00 01/05/2026 (UTC) by AudioMoth 1 at medium gain"
    bext = b"dawn".ljust(256, b"\0") + b"Zoom".ljust(32, b"\0") + bytes(32) + b"2026-05-0104:00:00"
    found = tags_of(
        bad_audio.wav(
            before=chunk(b"LIST", b"INFO" + chunk(b"ICMT", comment))
            + chunk(b"bext", bext)
            + chunk(b"wamd", struct.pack("<HI", 1, 4) + b"SM4\0")
        )
        + chunk(b"guan", b"GUANO|Version: 1.0\nTimestamp: 2026-05-01T05:00:00+02:00\nMake: X\n")
    )
    assert found["info.ICMT"].endswith("medium gain")
    assert (found["bext.description"], found["bext.originator"]) == ("dawn", "Zoom")
    assert found["bext.origination"] == "2026-05-01 04:00:00"
    assert found["wamd.model"] == "SM4"
    assert (found["guano.Make"], found["guano.GUANO|Version"]) == ("X", "1.0")


@pytest.mark.parametrize(
    ("container", "subtype"), [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")]
)
def test_compressed_files_give_their_title(container, subtype):
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 16000, 1, subtype, format=container) as sound:
        sound.title = "Dawn, höher"
        sound.write(bad_audio.tone(16000))
    found = {name.lower(): value for name, value in tags_of(file.getvalue()).items()}
    assert found["title"] == "Dawn, höher"


def test_tags_are_bounded_and_without_control_characters():
    hostile = "\n".join(f"Key{number}: \x1b[31m\u202e{'x' * 5000}" for number in range(500))
    text = facts_of(bad_audio.wav() + chunk(b"guan", hostile.encode())).tags
    found = json.loads(text)
    assert found
    assert len(text) <= tags.MAX_BYTES
    assert text.isascii()
    assert all(value.isprintable() and len(value) <= 1000 for value in found.values())


def test_the_time_of_the_recording_comes_with_its_source():
    content = bad_audio.wav() + chunk(b"guan", b"Timestamp: 2026-05-01T05:00:00+02:00\n")
    facts = facts_of(content)
    assert (facts.recorded_at, facts.recorded_from) == ("2026-05-01T03:00:00Z", "guano")


def test_a_file_without_tags_has_none():
    facts = facts_of(bad_audio.wav())
    assert (facts.tags, facts.recorded_at, facts.recorded_from) == ("", "", "")
