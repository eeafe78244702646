"""Channels: mixed, each by itself, or one of them; the mix of those that cancel is not heard."""

import io
import tempfile
from collections import defaultdict

import numpy as np
import pytest
import soundfile

from earmark.core import clips, errors, settings
from tests.workers.decoding import odd_lengths
from workers.decoding import child, pool, wire

NOISE = (np.random.default_rng(0).standard_normal((32, 48_000)) * 0.1).astype(np.float32)


def file_of(*channels, rate=48_000):
    file = io.BytesIO()
    soundfile.write(file, np.stack(channels, axis=1), rate, "FLOAT", format="WAV")
    return file.getvalue()


def heard(content, channels, rate=16_000, **limits):
    """Decode in this process; return the samples of each channel, and the facts."""
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(content)
        parts, meter = child.decode(file.fileno(), rate, settings.Audio(**limits), channels)
        blocks = defaultdict(list)
        for channel, samples in parts:
            blocks[channel].append(samples)
        facts = meter.facts()
    return {channel: np.concatenate(samples) for channel, samples in blocks.items()}, facts


@pytest.mark.parametrize("rate", [16_000, 48_000])
@pytest.mark.parametrize("count", [1, 2, 32])
def test_each_channel_is_as_if_it_were_alone(count, rate):
    found, facts = heard(file_of(*NOISE[:count]), clips.EACH, rate)
    assert list(found) == list(range(1, count + 1))
    for channel, samples in found.items():
        alone, _ = heard(file_of(NOISE[channel - 1]), clips.MIX, rate)
        assert np.array_equal(samples, alone[0])
    assert facts.channels == count


@pytest.mark.parametrize("channel", [1, 2])
def test_one_channel_is_heard_by_its_number(channel):
    found, _ = heard(file_of(*NOISE[:2]), channel)
    alone, _ = heard(file_of(NOISE[channel - 1]), clips.MIX)
    assert list(found) == [channel]
    assert np.array_equal(found[channel], alone[0])


def test_a_channel_that_a_file_does_not_have_is_an_error_with_the_number_it_has():
    with pytest.raises(errors.Unsupported, match=r"2 channel\(s\), so no channel 3 \(--channels\)"):
        heard(file_of(*NOISE[:2]), 3)


@pytest.mark.parametrize("name", ["vorbis", "mp3"])
def test_channels_that_come_or_go_on_the_way_keep_their_time(name):
    (encoding,) = [one for one in odd_lengths.ENCODINGS if one.name == name]
    mono, stereo = odd_lengths.written(encoding, 0), odd_lengths.written(encoding, 1, 2)
    found, _ = heard(mono + stereo + mono, clips.EACH)
    assert list(found) == [1, 2]
    part = round(odd_lengths.PART_S * 16_000)
    assert [len(found[1]), len(found[2])] == pytest.approx([3 * part, 2 * part], abs=2400)
    assert not found[2][: part - 800].any()
    # Its second channel is its first one, softer.
    middle = slice(part + 2400, 2 * part - 2400)
    assert np.corrcoef(found[1][middle], found[2][middle])[0, 1] > 0.99


@pytest.fixture(scope="module")
def decoders():
    decoders = pool.Decoders(settings.Audio(), 1)
    yield decoders
    decoders.close()


def pieces_of(decoders, content, channels):
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(content)
        return list(decoders.pieces(file, 16_000, channels))


def test_the_mix_is_heard_unless_channels_cancel_each_other_who_then_are_heard_one_by_one(decoders):
    mixed = pieces_of(decoders, file_of(*NOISE[:2]), clips.MIX_UNLESS_CANCELLING)
    assert [(piece.channel, len(piece.samples)) for piece in mixed] == [(0, 16_000)]
    assert not mixed[-1].end.cancelling
    pairs = file_of(NOISE[0], -NOISE[0], NOISE[1], -NOISE[1])
    apart = pieces_of(decoders, pairs, clips.MIX_UNLESS_CANCELLING)
    assert [piece.channel for piece in apart] == [1, 2, 3, 4]
    assert np.array_equal(apart[2].samples, -apart[3].samples)
    assert apart[2].samples.any()
    assert apart[-1].end.cancelling
    assert not apart[-1].end.silent


def test_the_channels_of_a_long_file_come_side_by_side_in_small_pieces(decoders):
    minute = np.tile(NOISE[:4], 50)
    pieces = pieces_of(decoders, file_of(*minute), clips.EACH)
    assert {piece.channel for piece in pieces[:4]} == {1, 2, 3, 4}
    assert sum(len(piece.samples) for piece in pieces[:4]) <= wire.PIECE_SAMPLES
    for channel in range(1, 5):
        lengths = [len(piece.samples) for piece in pieces if piece.channel == channel]
        assert sum(lengths) == 50 * 16_000


def test_channels_that_cancel_later_are_heard_as_the_loud_one_and_marked(decoders):
    minute = np.tile(NOISE[0], 60)
    sign = np.where(np.arange(len(minute)) < 40 * 48_000, 1, -1).astype(np.float32)
    pieces = pieces_of(decoders, file_of(minute, sign * minute), clips.MIX_UNLESS_CANCELLING)
    assert {piece.channel for piece in pieces} == {0}
    samples = np.concatenate([piece.samples for piece in pieces])
    assert samples[50 * 16_000 :].std() == pytest.approx(samples[: 30 * 16_000].std(), rel=0.01)
    assert pieces[-1].end.cancelling
