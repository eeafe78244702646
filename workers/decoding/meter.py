"""Checks and counts a clip's samples as they pass, picks their channels, and tells the facts."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, cast

import numpy as np

from earmark.core import clips, errors, recorded
from workers.decoding import lengths, tags

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from earmark.core import settings
    from workers.decoding.readers import Audio

#: Times full scale. Float files that hold scaled integers or garbage lie far above it.
MAX_AMPLITUDE = 1000.0
#: Samples of all channels beyond the declared ones, before the rest of the file is counted.
MAX_UNDECLARED = 2**20
#: The mix of channels that have nothing in common has their energy; of those that cancel, less.
CANCELLED = 0.05
#: The mean energy of a sample 80 dB below full scale.
INAUDIBLE = 1e-8


class Meter:
    """Counts and checks the samples that pass; raises a DecodeError for those over a limit."""

    def __init__(self, audio: Audio, audio_settings: settings.Audio, channels: int) -> None:
        self._audio, self._settings, self._heard = audio, audio_settings, channels
        self._rate, self._channels = audio.sample_rate, audio.channels
        self._refuse_kind()
        self._source_rate, self._source_channels = self._rate, self._channels
        #: Frames at this sample rate, seconds at earlier ones, samples of all channels.
        self._frames, self._earlier_s, self._samples = 0, 0.0, 0
        self._all_frames = 0
        self._silent, self._over_scale, self.cancelling = True, False, False
        self._refuse_longer(audio.declared_frames)
        self._count_from = audio.declared_frames + MAX_UNDECLARED / audio.channels

    def watch(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield what is heard of each block: (frames,), or (frames, channels) of each channel."""
        for block in blocks:
            yield self._choose(block, self.check(block))

    def check(self, block: np.ndarray) -> float:
        """Count a block, and refuse it if need be; return its energy."""
        if (self._audio.sample_rate, self._audio.channels) != (self._rate, self._channels):
            self._change()
        self._count(block)
        samples = block.ravel(order="K")
        energy = float(samples @ samples)
        self._check(samples, energy)
        return energy

    def _change(self) -> None:
        self._earlier_s, self._frames = self._seconds(0), 0
        self._rate, self._channels = self._audio.sample_rate, self._audio.channels
        self._refuse_kind()

    def _count(self, block: np.ndarray) -> None:
        self._refuse_longer(len(block))
        self._frames += len(block)
        self._all_frames += len(block)
        self._samples += block.size
        if self._all_frames > self._count_from:
            self._count_from = math.inf
            for frames in self._audio.count():
                self._refuse_longer(frames - self._all_frames)

    def _choose(self, block: np.ndarray, energy: float) -> np.ndarray:
        mono = downmix(block)
        if block.shape[1] > 1 and cancels(block, mono, energy):
            self.cancelling = True
            mono = loud_channel(block)
        if self._heard == clips.EACH:
            return block
        if self._heard > 0:
            return np.ascontiguousarray(block[:, self._heard - 1])
        return mono

    def _check(self, samples: np.ndarray, energy: float) -> None:
        # The energy of samples takes a third of the time of their peak, and tells most of it.
        self._silent = self._silent and not energy and not samples.any()
        if energy < MAX_AMPLITUDE**2 and not self._audio.holds_floats:
            return
        peak = float(max(samples.max(), -samples.min()))
        if math.isnan(peak) or peak > MAX_AMPLITUDE:
            raise _not_finite(peak)
        self._over_scale |= peak > 1 and self._audio.holds_floats

    def _seconds(self, more: int) -> float:
        return self._earlier_s + (self._frames + more) / self._rate

    def _refuse_longer(self, more: int) -> None:
        """Refuse so many more frames if they are too many."""
        longest_s, most = self._settings.max_duration_s, self._settings.max_samples
        if self._seconds(more) > longest_s:
            raise errors.TooLong(max_duration_s=longest_s, setting="EARMARK_AUDIO__MAX_DURATION_S")
        if self._samples + more * self._channels > most:
            longest_s = most / (self._rate * self._channels)
            raise errors.TooLong(max_duration_s=longest_s, setting="EARMARK_AUDIO__MAX_SAMPLES")

    def _refuse_kind(self) -> None:
        limits = self._settings
        reason = f"a sample rate of {self._rate:,} Hz"
        if self._rate < limits.min_sample_rate:
            raise errors.Unsupported(reason=f"{reason} (EARMARK_AUDIO__MIN_SAMPLE_RATE)")
        if self._rate > limits.max_sample_rate:
            raise errors.Unsupported(reason=f"{reason} (EARMARK_AUDIO__MAX_SAMPLE_RATE)")
        if not 1 <= self._channels <= limits.max_channels:
            reason = f"{self._channels:,} channels (EARMARK_AUDIO__MAX_CHANNELS)"
            raise errors.Unsupported(reason=reason)
        if self._heard > self._channels:
            reason = f"{self._channels} channel(s), so no channel {self._heard} (--channels)"
            raise errors.Unsupported(reason=reason)

    def facts(self) -> clips.AudioFacts:
        audio = self._audio
        truncated = audio.damaged or self._all_frames < audio.least_frames
        truncated = truncated or lengths.is_cut_short(audio.clip, audio.format.name, audio.length)
        if truncated and not self._all_frames:
            raise errors.Corrupt(reason="none of it can be decoded")
        duration_s = self._seconds(0)
        if duration_s < self._settings.min_duration_s:
            raise errors.TooShort(
                min_duration_s=self._settings.min_duration_s,
                setting="EARMARK_AUDIO__MIN_DURATION_S",
            )
        found = tags.read(audio)
        time, source = recorded.by_tags(found)
        return clips.AudioFacts(
            duration_s,
            self._source_rate,
            self._source_channels,
            audio.codec,
            truncated=truncated,
            silent=self._silent,
            over_scale=self._over_scale,
            cancelling=self.cancelling,
            tags=json.dumps(found) if found else "",
            recorded_at=time,
            recorded_from=source,
        )


def _not_finite(peak: float) -> errors.NotFinite:
    if math.isfinite(peak):
        return errors.NotFinite(reason=f"{peak:g} times full scale")
    return errors.NotFinite(reason="not a number, or infinite")


def downmix(block: np.ndarray) -> np.ndarray:
    """Average the channels of a block: (frames, channels) in, (frames,) out."""
    channels = block.shape[1]
    if channels == 1:
        return block[:, 0]
    # mean(axis=1) gives the same bits and takes ten times as long.
    mono = block[:, 0] + block[:, 1]
    for channel in range(2, channels):
        mono += block[:, channel]
    mono /= channels
    return cast("np.ndarray", mono)


def cancels(block: np.ndarray, mono: np.ndarray, energy: float) -> bool:
    """Return whether the channels of a block, (frames, channels), cancel each other in its mix."""
    mixed = float(mono @ mono) * block.shape[1] ** 2
    return mixed < CANCELLED * energy and energy > INAUDIBLE * len(block)


def loud_channel(block: np.ndarray) -> np.ndarray:
    """Return the first channel that has half the energy of the loudest."""
    energies = np.einsum("ij,ij->j", block, block)
    return np.ascontiguousarray(block[:, np.argmax(energies >= energies.max() / 2)])
