import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import librosa
import numpy as np
import pytest

from earmark.core import formats
from tests.workers.decoding import bad_audio
from workers.decoding import child as decoder_child
from workers.decoding import lengths
from workers.decoding.meter import downmix

CONFINED = """
    import os, resource, socket, subprocess
    from workers.decoding import child

    child.warm_up()
    child.confine(2 * 1024**3)
    assert os.dup(0) == child.CLIP
    attempts = {
        "open": lambda: open("/etc/passwd"),
        "create": lambda: open("/tmp/x", "w"),
        "connect": lambda: socket.create_connection(("127.0.0.1", 9)),
        "listen": socket.socket,
        "pipe": os.pipe,
        "list": lambda: os.listdir("/"),
        "run": lambda: subprocess.run(["true"]),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError:
            continue
        os.write(1, name.encode() + b" ")
    for name in ("AS", "CORE", "FSIZE", "NPROC", "NOFILE"):
        limit = resource.getrlimit(getattr(resource, "RLIMIT_" + name))
        os.write(1, f"{name}={limit[1]} ".encode())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits as on Linux")
def test_a_confined_decoder_can_open_no_file_and_no_socket():
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CONFINED)],
        capture_output=True,
        cwd=Path(__file__).parents[3],
        stdin=subprocess.DEVNULL,
    )
    assert child.stdout.decode().split() == [
        "AS=2147483648",
        "CORE=0",
        "FSIZE=0",
        "NPROC=0",
        "NOFILE=4",
    ]


@pytest.mark.parametrize(
    "source_rate",
    [100, 250, 1000, 8000, 11025, 22050, 44100, 44101, 48000, 96000, 192000, 500_000, 1_000_000],
)
@pytest.mark.parametrize("block", [65536, 1009])
def test_resampling_in_blocks_equals_librosas_bit_by_bit(source_rate, block):
    samples = bad_audio.tone(source_rate, 1.3)[:, 0]
    blocks = (samples[start : start + block] for start in range(0, len(samples), block))
    expected = librosa.resample(samples, orig_sr=source_rate, target_sr=16000)
    assert np.array_equal(
        np.concatenate(list(decoder_child.resample(blocks, source_rate, 16000))), expected
    )


@pytest.mark.parametrize("channels", range(1, 33))
def test_the_mean_of_the_channels_equals_librosas(channels):
    block = np.random.default_rng(channels).standard_normal((5000, channels)).astype(np.float32)
    assert np.allclose(downmix(block), librosa.to_mono(block.T), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (bad_audio.written("WAV", "PCM_16"), "wav"),
        (bad_audio.written("OGG", "VORBIS"), "ogg"),
        (b"ID3\x04\0\0\0\0\0\x05tags!" + bad_audio.written("FLAC", "PCM_16"), "flac"),
        (bad_audio.encoded("adts", "aac", 44100, "fltp"), "aac"),
        (b"\0\0\0\x18ftypM4A " + bytes(100), "mp4"),
        (b"\x12\x34\x56", "unknown"),
    ],
)
def test_a_format_is_known_by_the_first_bytes(content, name):
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        assert formats.recognise(file.fileno()).name == name


@pytest.mark.parametrize("container", ["WAV", "AIFF", "CAF", "W64", "RF64", "OGG"])
def test_one_missing_byte_of_audio_is_noticed(container):
    whole = bad_audio.written(container, "VORBIS" if container == "OGG" else "PCM_16")
    name = "wav" if container == "RF64" else container.lower()
    for content, expected in ((whole, False), (whole[:-1], True)):
        with tempfile.TemporaryFile() as file:
            file.write(content)
            file.flush()
            clip = file.fileno()
            length = lengths.declared_length(clip, name, lengths.chunks(clip, name))
            assert lengths.is_cut_short(clip, name, length) is expected


@pytest.mark.parametrize("size", [2**63 - 1, 2**64 - 1, 0])
def test_a_chunk_of_any_size_can_be_walked_over(size):
    content = bad_audio.written("W64", "PCM_16")
    at = content.index(b"data") + 16
    with tempfile.TemporaryFile() as file:
        file.write(content[:at] + size.to_bytes(8, "little") + content[at + 8 :])
        file.flush()
        names = [chunk.name[:4] for chunk in lengths.chunks(file.fileno(), "w64")]
    assert names[-1] == b"data"
