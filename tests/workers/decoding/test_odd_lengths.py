import io
import tempfile

import numpy as np
import pytest
import soundfile

from earmark.core import settings
from tests.workers.decoding import bad_audio, odd_lengths
from workers.decoding import pool

pytestmark = pytest.mark.slow

#: The encodings whose lengths go wrong in ways of their own.
QUICK = ("wav16", "rf64", "au", "caf", "flac", "vorbis", "mp3-xing", "mp3")
QUICK += ("m4a", "opus", "wma", "adts")


@pytest.fixture(scope="module")
def decoders():
    decoders = pool.Decoders(settings.Audio(), 1)
    yield decoders
    decoders.close()


def decoded(decoders, content):
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(content)
        return decoders.decode(file, 16000)


@pytest.mark.parametrize("name", QUICK)
def test_all_sound_is_decoded_or_the_result_is_marked(decoders, name):
    (encoding,) = [one for one in odd_lengths.ENCODINGS if one.name == name]
    for case in odd_lengths.cases([encoding]):
        verdict = odd_lengths.judge(decoders, case)
        assert not verdict.problem, case.name


def test_the_whole_corpus_is_as_large_as_promised():
    names = {encoding.name for encoding in odd_lengths.ENCODINGS}
    assert len(names) == len(odd_lengths.ENCODINGS) >= 40


@pytest.mark.parametrize(("factor", "over"), [(0.99, False), (1.5, True), (900.0, True)])
def test_floats_beyond_full_scale_are_marked(decoders, factor, over):
    samples = np.full(16000, factor, np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, "FLOAT", format="WAV")
    assert decoded(decoders, file.getvalue()).facts.over_scale is over


def stereo(left, right):
    file = io.BytesIO()
    soundfile.write(file, np.stack([left, right], axis=1), 16000, format="FLAC")
    return file.getvalue()


def test_channels_that_cancel_each_other_are_heard_and_marked(decoders):
    tone = bad_audio.tone(16000)[:, 0]
    result = decoded(decoders, stereo(tone, -tone))
    assert np.allclose(result.waveform.samples, tone, atol=1e-4)
    assert result.facts.cancelling
    assert not result.facts.silent


def test_channels_that_have_nothing_in_common_do_not_cancel(decoders):
    noise = np.random.default_rng(0).standard_normal((2, 16000)) * 0.1
    assert not decoded(decoders, stereo(*noise)).facts.cancelling
    assert not decoded(decoders, stereo(noise[0], 0 * noise[1])).facts.cancelling


def test_a_silent_file_is_silent_and_cancels_nothing(decoders):
    facts = decoded(decoders, stereo(np.zeros(16000), np.zeros(16000))).facts
    assert facts.silent
    assert not facts.cancelling


def test_chunks_behind_the_sound_without_a_byte_of_padding_are_no_lost_sound(decoders):
    guano = b"guan" + (13).to_bytes(4, "little") + b"GUANO|Version"
    result = decoded(decoders, bad_audio.wav(bytes(range(1, 256)) * 129) + guano)
    assert len(result.waveform.samples) == 255 * 129 // 2
    assert not result.facts.truncated
