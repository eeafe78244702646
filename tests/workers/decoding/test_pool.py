import io
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import librosa
import numpy as np
import psutil
import pytest
import soundfile

from earmark.core import errors, settings
from tests.workers.decoding import bad_audio
from workers.decoding import pool as decoder_pool

pytestmark = pytest.mark.slow

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc as on Linux")


@pytest.fixture(scope="module")
def decoders():
    pool = decoder_pool.Decoders(settings.Audio(), 2)
    yield pool
    pool.close()


@pytest.fixture
def pool():
    """Make a pool of one child with other limits."""
    made = []

    def make(processes=1, **limits):
        made.append(decoder_pool.Decoders(settings.Audio(**limits), processes))
        return made[-1]

    yield make
    for decoders in made:
        decoders.close()


def decoded(decoders, content, sample_rate=16000):
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return decoders.decode(file, sample_rate)


def whole_clip(seconds=1.0):
    return bad_audio.written("WAV", "PCM_16", 16000, seconds=seconds)


def children():
    return {child.pid: child for child in psutil.Process().children()}


def loaded_by_librosa(path, sample_rate=16000):
    with warnings.catch_warnings():  # its audioread imports modules that Python 3.13 has no more
        warnings.simplefilter("ignore", DeprecationWarning)
        return librosa.load(path, sr=sample_rate)[0]


# waveforms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    "pair",
    [
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("MP3", "MPEG_LAYER_III"),
    ],
)
def test_a_waveform_equals_librosas_bit_by_bit(decoders, tmp_path, pair, channels, sample_rate):
    content = bad_audio.written(*pair, sample_rate, channels, seconds=2.0)
    path = tmp_path / "clip"
    path.write_bytes(content)
    expected = loaded_by_librosa(path)
    waveform = decoded(decoders, content).waveform
    assert waveform.sample_rate == 16000
    assert waveform.samples.dtype == np.float32
    assert np.array_equal(waveform.samples, expected)


def test_an_mp3_without_a_declared_length_is_read_to_its_end(decoders):
    untagged = bad_audio.without_tag(bad_audio.written("MP3", "MPEG_LAYER_III", 44100, seconds=10))
    assert decoded(decoders, untagged).waveform.duration_s == pytest.approx(10, abs=0.1)


def test_a_long_clip_read_in_blocks_equals_librosas_whole_one(decoders, tmp_path):
    path = tmp_path / "clip.flac"
    path.write_bytes(bad_audio.written("FLAC", "PCM_16", 48000, 2, seconds=90.0))
    expected = loaded_by_librosa(path)
    with path.open("rb") as file:
        assert np.array_equal(decoders.decode(file, 16000).waveform.samples, expected)


def test_any_sample_rate_can_be_requested(decoders, tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(whole_clip())
    expected = loaded_by_librosa(path, 32000)
    assert np.array_equal(decoded(decoders, path.read_bytes(), 32000).waveform.samples, expected)


@pytest.mark.parametrize("name", ["m4a", "webm", "opus", "wma", "amr", "flac32", "caf-alac"])
def test_formats_that_libsndfile_lacks_are_decoded_correctly(decoders, name):
    arguments = next(rest for pair, *rest in bad_audio.FFMPEG_PAIRS if pair == name)
    samples = decoded(decoders, bad_audio.encoded(*arguments)).waveform.samples
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    loudest_hz = np.argmax(spectrum) * 16000 / len(samples)
    assert loudest_hz == pytest.approx(440, abs=3)
    assert np.sqrt(np.mean(samples**2)) == pytest.approx(0.28, rel=0.25)


def test_the_first_sound_track_of_a_video_is_taken(decoders):
    video = bad_audio.encoded("mp4", "aac", 44100, "fltp", with_picture=True)
    assert decoded(decoders, video).facts.codec == "mp4/aac"


def test_the_facts_describe_the_file_and_not_the_waveform(decoders):
    facts = decoded(decoders, bad_audio.written("FLAC", "PCM_24", 48000, 2)).facts
    assert (facts.source_sample_rate, facts.channels, facts.duration_s) == (48000, 2, 1.0)
    assert (facts.codec, facts.truncated, facts.silent) == ("flac/pcm_24", False, False)


def test_a_silent_clip_is_decoded_and_marked(decoders):
    assert decoded(decoders, bad_audio.wav(bytes(32000))).facts.silent


def test_a_truncated_file_is_decoded_and_marked(decoders):
    half = whole_clip()[:16000]
    result = decoded(decoders, half)
    assert result.facts.truncated
    assert 0.4 < result.waveform.duration_s < 0.5


def test_clips_of_many_threads_are_not_mixed_up(decoders):
    contents = [bad_audio.wav(np.full(16000, level, "<i2").tobytes()) for level in range(1, 33)]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda content: decoded(decoders, content), contents))
    assert [result.waveform.samples[0] * 32768 for result in results] == list(range(1, 33))


# refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("html", "an HTML page"),
        ("json", "JSON text"),
        ("s3", "an XML document"),
        ("lfs", "a Git LFS pointer"),
    ],
)
def test_a_file_without_audio_is_named_by_its_kind(decoders, name, words):
    with pytest.raises(errors.NotAudio, match=words):
        decoded(decoders, bad_audio.NOT_AUDIO[name])


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (bad_audio.wav(rate=1), errors.Unsupported),
        (bad_audio.wav(channels=33, bits=8), errors.Unsupported),
        (bad_audio.wav(bytes(100)), errors.TooShort),
        (bad_audio.wav(np.full(16000, np.nan, "<f4").tobytes(), code=3, bits=32), errors.NotFinite),
        (bad_audio.wav(np.full(16000, 1e6, "<f4").tobytes(), code=3, bits=32), errors.NotFinite),
        (whole_clip()[:44], errors.Corrupt),
        (
            bad_audio.with_entry(b"stts", 8, 2**31 - 1),
            errors.Corrupt,
        ),  # FFmpeg would allocate what it asks for
        (bad_audio.with_entry(b"stsz", 8, 2**30 - 1), errors.Corrupt),
    ],
)
def test_impossible_audio_is_refused_with_a_named_error(decoders, content, kind):
    with pytest.raises(kind):
        decoded(decoders, content)


def test_a_clip_longer_than_the_limit_is_refused_and_one_at_the_limit_is_not(pool):
    decoders = pool(max_duration_s=1.0)
    assert decoded(decoders, whole_clip(1.0)).waveform.duration_s == 1.0
    with pytest.raises(errors.TooLong):
        decoded(decoders, whole_clip(1.1))


def test_many_channels_count_as_much_as_many_seconds(pool):
    decoders = pool(max_samples=100_000)
    with pytest.raises(errors.TooLong, match="EARMARK_AUDIO__MAX_SAMPLES"):
        decoded(decoders, bad_audio.written("WAV", "PCM_16", 16000, 8))


def test_an_irregular_file_is_refused_without_reading_it(decoders, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path, flags in (
        (tmp_path / "pipe", os.O_RDWR),
        (tmp_path / "link", os.O_RDONLY),
        (tmp_path, os.O_RDONLY),
    ):
        descriptor = os.open(path, flags)
        with pytest.raises(errors.NotAudio):
            decoders.decode(Descriptor(descriptor), 16000)
        os.close(descriptor)


class Descriptor(io.BytesIO):
    """A file that is nothing but its descriptor."""

    def __init__(self, descriptor):
        super().__init__()
        self._descriptor = descriptor

    def fileno(self):
        return self._descriptor


def test_a_sparse_file_of_3_gb_is_refused_by_its_header(decoders):
    with tempfile.TemporaryFile() as file:
        file.write(bad_audio.wav(b"", data_size=3 * 2**30))
        file.truncate(3 * 2**30)
        file.seek(0)
        with pytest.raises(errors.TooLong):
            decoders.decode(file, 16000)


# children that die, hang or swell -----------------------------------------------------------------


def act_on_the_child_at_work(decoders, child, act):
    """Decode a clip that takes a while, and do this to the child as soon as it is at work."""
    at_rest = child.cpu_times().user
    content = bad_audio.silence("FLAC", "PCM_16", 96000, 2, 600)
    with ThreadPoolExecutor(1) as threads:
        result = threads.submit(decoded, decoders, content)
        while child.cpu_times().user < at_rest + 0.1 and not result.done():
            time.sleep(0.005)
        act(child)
        return result.result()


def test_a_crash_costs_its_own_clip_alone(pool):
    others = set(children())
    decoders = pool()
    (child,) = set(children()) - others
    with pytest.raises(errors.DecoderCrashed):
        act_on_the_child_at_work(
            decoders, psutil.Process(child), lambda child: child.send_signal(signal.SIGSEGV)
        )
    assert decoded(decoders, whole_clip()).waveform.duration_s == 1.0


def test_a_hang_costs_its_own_clip_alone(pool):
    others = set(children())
    decoders = pool(decode_timeout_s=2)
    (child,) = set(children()) - others
    with pytest.raises(errors.DecoderTimeout, match="2 s"):
        act_on_the_child_at_work(decoders, psutil.Process(child), lambda child: child.suspend())
    assert decoded(decoders, whole_clip()).waveform.duration_s == 1.0


@LINUX
def test_a_clip_that_needs_too_much_memory_costs_itself_alone(pool):
    decoders = pool(decode_memory=320 * 2**20, max_channels=1024)
    with pytest.raises(errors.DecoderMemory):
        # A block of 65,536 frames takes 268 MB.
        decoded(decoders, bad_audio.wav(bytes(1024 * 8000), channels=1024, bits=8))
    assert decoded(decoders, whole_clip()).waveform.duration_s == 1.0


def test_a_child_killed_between_clips_costs_none(pool):
    others = set(children())
    decoders = pool()
    (child,) = set(children()) - others
    os.kill(child, signal.SIGKILL)
    wait_until_dead(child)
    assert decoded(decoders, whole_clip()).waveform.duration_s == 1.0
    assert child not in children()


def wait_until_dead(child):
    while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.005)


def test_children_are_renewed_so_that_leaks_stay_small(pool):
    others = set(children())
    decoders = pool(clips_per_decoder=3)
    seen = set()
    for _ in range(7):
        decoded(decoders, whole_clip())
        seen |= set(children()) - others
    assert len(seen) == 3
    assert len(set(children()) - others) == 1


@LINUX
def test_a_long_clip_is_decoded_in_the_memory_of_a_piece(pool):
    others = set(children())
    decoders = pool()
    (child,) = set(children()) - others
    decoded(decoders, whole_clip())
    before_mb = bad_audio.peak_mb(child)
    decoded(decoders, bad_audio.silence("FLAC", "PCM_16", 16000, 1, 3600))  # 230 MB of samples
    assert bad_audio.peak_mb(child) < before_mb + 30


@LINUX
def test_a_day_of_sound_may_take_hours_of_processor_time(pool):
    others = set(children())
    decoders = pool()
    (child,) = set(children()) - others
    decoded(decoders, whole_clip(60))
    assert resource.prlimit(child, resource.RLIMIT_CPU)[0] == resource.RLIM_INFINITY


def test_a_reader_that_takes_its_time_costs_a_decoder_none(pool):
    decoders = pool(decode_timeout_s=1.0)
    with tempfile.TemporaryFile() as file:
        file.write(bad_audio.silence("FLAC", "PCM_16", 16000, 1, 200))
        file.flush()
        samples = 0
        for piece in decoders.pieces(file, 16000):
            samples += len(piece.samples)
            if piece.end is None:
                time.sleep(0.4)
    assert samples == 200 * 16000


def test_closing_leaves_no_child_and_no_caller_waiting():
    others = set(children())
    decoders = decoder_pool.Decoders(settings.Audio(), 2)
    assert len(set(children()) - others) == 2
    decoders.close()
    assert set(children()) == others
    with pytest.raises(errors.ServiceError, match="closed"):
        decoded(decoders, whole_clip())


def test_decoders_that_cannot_start_raise_a_service_error(monkeypatch):
    others = set(children())
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(errors.ServiceError, match="does not start"):
        decoder_pool.Decoders(settings.Audio(), 2)
    assert set(children()) == others


def python_with(kib, folder, monkeypatch):
    """Have children started with so much address space."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nulimit -v {kib}\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


@LINUX
def test_a_decoder_that_cannot_start_gives_the_reason(tmp_path, monkeypatch):
    python_with(100_000, tmp_path, monkeypatch)
    with pytest.raises(errors.ServiceError, match=r"does not start: .*(MemoryError|failed to map)"):
        decoder_pool.Decoders(settings.Audio(), 1)


@LINUX
def test_a_decoder_works_within_a_limit_below_its_own(pool, tmp_path, monkeypatch):
    python_with(1_000_000, tmp_path, monkeypatch)
    assert len(decoded(pool(), whole_clip()).waveform.samples) == 16000


ORPHANS = """
    import tempfile, threading
    from earmark.core import settings
    from tests.workers.decoding import bad_audio
    from workers.decoding import pool

    decoders = pool.Decoders(settings.Audio(decode_timeout_s=5), 2)
    clip = tempfile.TemporaryFile(buffering=0)
    clip.write(bad_audio.silence("FLAC", "PCM_16", 96000, 2, 600))
    threading.Thread(target=decoders.decode, args=(clip, 16000)).start()
    print("ready", flush=True)
    threading.Event().wait()
"""


def test_children_of_a_killed_worker_end_by_themselves():
    worker = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(ORPHANS)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    with worker:
        assert worker.stdout.readline() == b"ready\n"
        orphans = psutil.Process(worker.pid).children()
        assert len(orphans) == 2
        worker.kill()
    _, alive = psutil.wait_procs(orphans, timeout=60)
    assert not alive


@LINUX
def test_a_child_has_neither_torch_nor_our_secrets(monkeypatch, pool):
    monkeypatch.setenv("EARMARK_DATABASE__URL", "postgresql://user:secret@host/db")
    others = set(children())
    pool()
    (child,) = set(children()) - others
    assert b"secret" not in Path(f"/proc/{child}/environ").read_bytes()
    assert "torch" not in Path(f"/proc/{child}/maps").read_text()


# two thousand bad files ---------------------------------------------------------------------------

#: The limits of the fixed third, for bombs that are quicker to make.
SHORT = settings.Audio(max_duration_s=600, max_samples=50_000_000, decode_timeout_s=20)


@pytest.fixture(scope="module")
def corpus():
    with bad_audio.Canary() as canary:
        files = bad_audio.cases(canary_port=canary.port, bomb_s=660)
        verdicts = bad_audio.judge_all(files[::3], SHORT)
    return files, verdicts, canary


def test_every_bad_file_gives_a_result_or_a_named_error_and_kills_no_decoder(corpus):
    files, verdicts, _ = corpus
    assert len(files) >= 1800
    assert len(verdicts) == len(files[::3])
    assert bad_audio.deaths(verdicts) == []


def test_every_valid_file_is_decoded_whole(corpus):
    assert bad_audio.false_refusals(corpus[1]) == []


def test_no_file_makes_a_decoder_open_a_connection(corpus):
    assert corpus[2].hits == 0


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("wav", 1),
        ("flac", 1),
        ("aiff", 1),
        ("rf64", 1),
        ("w64", 1),
        ("caf", 1),
        ("ogg", 0.95),
        ("mp3", 0.95),
    ],
)
def test_a_truncated_file_is_noticed(corpus, name, share):
    assert bad_audio.seen(corpus[1], name) >= share


@LINUX
def test_decompression_bombs_are_refused_before_they_take_memory(pool):
    others = set(children())
    decoders = pool(max_duration_s=600, max_samples=50_000_000)
    (child,) = set(children()) - others
    outcomes = {case.name: bad_audio.judge(decoders, case).outcome for case in bad_audio.bombs(660)}
    assert {name for name, outcome in outcomes.items() if outcome == "too_long"} == set(
        outcomes
    ) - {
        "bomb/wav-1-hz",
        "bomb/wav-1-khz",
    }
    assert bad_audio.peak_mb(child) < 150


@LINUX
def test_a_bomb_without_a_declared_length_takes_no_memory(pool):
    others = set(children())
    decoders = pool(max_duration_s=3600)
    (child,) = set(children()) - others
    with pytest.raises(errors.TooLong, match="3600 s"):
        decoded(
            decoders, bad_audio.with_total(bad_audio.silence("FLAC", "PCM_16", 8000, 1, 3660), 0)
        )
    assert bad_audio.peak_mb(child) < 150


def test_a_clip_without_a_declared_length_is_decoded_whole(decoders, tmp_path):
    whole = bad_audio.written("FLAC", "PCM_16", 48000, 2, seconds=90.0)
    expected = decoded(decoders, whole).waveform.samples
    assert np.array_equal(
        decoded(decoders, bad_audio.with_total(whole, 0)).waveform.samples, expected
    )


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "VORBIS", "MPEG_LAYER_III"])
def test_a_stretch_is_as_in_the_file_with_all_channels_and_passes_over_the_rest(decoders, subtype):
    format = {"PCM_16": "WAV", "PCM_24": "FLAC", "VORBIS": "OGG", "MPEG_LAYER_III": "MP3"}[subtype]
    left = np.sin(np.arange(22_050 * 40) / 40)
    with io.BytesIO() as memory, tempfile.TemporaryFile() as file:
        frames = np.stack([left / 3, left[::-1] / 5], axis=1)
        soundfile.write(memory, frames, 22_050, format=format, subtype=subtype)
        file.write(memory.getvalue())
        file.flush()
        memory.seek(0)
        whole, _ = soundfile.read(memory, dtype="float32")
        for start_s, end_s in ((0, 1.5), (9.3, 10.1), (39.5, 50)):
            *_, last = pieces = list(decoders.stretch(file, start_s, end_s))
            found = np.concatenate([piece.samples for piece in pieces]).reshape(-1, 2)
            expected = whole[round(start_s * 22_050) : round(end_s * 22_050)]
            np.testing.assert_allclose(found, expected, atol=1e-6)
            assert (last.end.source_sample_rate, last.end.channels) == (22_050, 2)
            assert last.end.duration_s == len(expected) / 22_050
        assert not sum(len(piece.samples) for piece in decoders.stretch(file, 50, 60))
