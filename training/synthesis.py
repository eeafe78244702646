"""Synthetic sounds of five seconds: noise, hums, beeps, rings, bells and plucked strings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import signal

from training.clips import RATE, SAMPLES, Wave

Array: TypeAlias = NDArray[np.float64]
Maker: TypeAlias = Callable[[np.random.Generator], Array]
_TIME = np.arange(SAMPLES) / RATE


def other(number: int, rng: np.random.Generator) -> tuple[str, Wave]:
    """Return the name and the sound of one of the kinds in turn."""
    maker = _OTHERS[number % len(_OTHERS)]
    return maker.__name__.strip("_"), _finish(maker(rng), rng)


def guitar(rng: np.random.Generator) -> Wave:
    """Pluck strings, some in chords, on a resonant body, at times through an amplifier."""
    strip = np.zeros(SAMPLES)
    beat, root = rng.uniform(0.2, 0.9), rng.integers(40, 60)
    bright, decay, body = rng.uniform(0.3, 0.95), rng.uniform(0.992, 0.9995), _body(rng)
    at = rng.uniform(0, 0.4)
    chords = rng.random() < 0.5
    while at < 5:
        steps = (
            rng.choice([(0, 7, 12, 16), (0, 7, 12, 15), (0, 4, 7, 12)])
            if chords
            else rng.integers(0, 25, 1)
        )
        for order, step in enumerate(steps):
            start = int((at + order * rng.uniform(0.005, 0.04)) * RATE)
            string = _string(440 * 2 ** ((root + step - 69) / 12), bright, decay, rng)[
                : max(0, SAMPLES - start)
            ]
            strip[start : start + len(string)] += string
        at += beat * rng.choice([0.5, 1, 1, 2])
    strip = signal.sosfilt(body, strip) + 0.6 * strip
    if rng.random() < 0.25:
        strip = np.tanh(strip / np.abs(strip).max() * rng.uniform(2, 20))
    return _finish(strip, rng)


def _string(hertz: float, bright: float, decay: float, rng: np.random.Generator) -> Array:
    """Return a plucked string: noise in a delay line that loses its highs (Karplus and Strong)."""
    delay = max(2, round(RATE / hertz - 0.5))
    burst = np.zeros(int(RATE * rng.uniform(0.3, 2.5)) + delay)
    burst[:delay] = signal.lfilter([bright], [1, bright - 1], rng.normal(size=delay))
    place = max(1, int(delay * rng.uniform(0.08, 0.4)))
    burst[place:] -= burst[:-place].copy()
    loop = np.zeros(delay + 2)
    loop[0], loop[delay], loop[delay + 1] = 1, -decay / 2, -decay / 2
    string = signal.lfilter([1], loop, burst)
    return np.asarray(string * np.minimum(1, np.arange(len(string), 0, -1) / 400))


def _body(rng: np.random.Generator) -> Array:
    low = rng.uniform(80, 130)
    return np.asarray(
        signal.butter(1, [low, low * rng.uniform(3, 12)], "band", fs=RATE, output="sos")
    )


def _finish(wave: Array, rng: np.random.Generator) -> Wave:
    return np.asarray(wave / (np.abs(wave).max() + 1e-9) * rng.uniform(0.08, 0.9), np.float32)


def _slow(rng: np.random.Generator, points: int = 6) -> Array:
    return np.asarray(np.interp(_TIME, np.linspace(0, 5, points), rng.normal(size=points)))


def _noise(rng: np.random.Generator) -> Array:
    """White to brown, steady or in gusts."""
    bins = np.fft.rfftfreq(SAMPLES, 1 / RATE)
    bins[0] = bins[1]
    spectrum = (
        rng.normal(size=len(bins)) + 1j * rng.normal(size=len(bins))
    ) * bins ** -rng.uniform(0, 1.1)
    return np.asarray(
        np.fft.irfft(spectrum, SAMPLES) * np.exp(_slow(rng) * rng.choice([0, 0.1, 0.7]))
    )


def _band(rng: np.random.Generator) -> Array:
    low = rng.uniform(60, 4000)
    edges = [low, min(7900, low * rng.uniform(1.2, 4))]
    filtered = signal.sosfilt(
        signal.butter(2, edges, "band", fs=RATE, output="sos"), rng.normal(size=SAMPLES)
    )
    return np.asarray(filtered * np.exp(_slow(rng) * rng.choice([0, 0.5])))


def _tones(rng: np.random.Generator) -> Array:
    """Steady: a test tone, a dial tone, a few at once."""
    sines = [
        np.sin(2 * np.pi * rng.uniform(80, 6000) * _TIME) * rng.uniform(0.1, 1)
        for _ in range(rng.integers(1, 4))
    ]
    return np.asarray(sum(sines) + rng.normal(size=SAMPLES) * 10 ** rng.uniform(-4, -1))


def _hum(rng: np.random.Generator) -> Array:
    """Mains, transformers, refrigerators, fans."""
    base = rng.choice([50, 60, 100, 120, rng.uniform(40, 250)])
    sines = [
        np.sin(2 * np.pi * base * k * _TIME + rng.uniform(0, 6)) * rng.uniform(0, 1) / k
        for k in range(1, 20)
    ]
    return np.asarray(
        sum(sines) + rng.uniform(0, 2) * signal.lfilter([0.1], [1, -0.9], rng.normal(size=SAMPLES))
    )


def _beeps(rng: np.random.Generator) -> Array:
    """Alarm clocks, microwaves, reversing lorries, smoke detectors: pitches switched on and off."""
    hertz = rng.uniform(400, 4500) * (
        1 + (_TIME % rng.uniform(0.2, 2) < rng.uniform(0.1, 1)) * rng.choice([0, 0.25])
    )
    sound = signal.square(2 * np.pi * np.cumsum(hertz) / RATE) if rng.random() < 0.4 else None
    sound = np.sin(2 * np.pi * np.cumsum(hertz) / RATE) if sound is None else sound
    period, group = rng.uniform(0.08, 0.9), rng.integers(1, 5)
    on = (_TIME % period < period * rng.uniform(0.2, 0.7)) & (
        _TIME % (period * (group + 2)) < period * group
    )
    return np.asarray(_echo(sound * _smooth(on), rng))


def _ring(rng: np.random.Generator) -> Array:
    """Telephones: a warble of two pitches or struck bells, in bursts."""
    low = rng.uniform(350, 2200)
    warble = np.where(_TIME * rng.uniform(12, 28) % 1 < 0.5, low, low * rng.uniform(1.1, 1.4))
    on = _TIME % rng.uniform(1.5, 5) < rng.uniform(0.4, 1.8)
    return np.asarray(
        _echo(np.tanh(2 * np.sin(2 * np.pi * np.cumsum(warble) / RATE)) * _smooth(on), rng)
    )


def _keys(rng: np.random.Generator) -> Array:
    """Dialled digits: two steady pitches a key."""
    strip = np.zeros(SAMPLES)
    length = rng.uniform(0.06, 0.4)
    for start in np.arange(rng.uniform(0, 0.5), 5 - length, length * rng.uniform(1.3, 3)):
        time = np.arange(int(length * RATE)) / RATE
        pair = (rng.choice([697, 770, 852, 941]), rng.choice([1209, 1336, 1477, 1633]))
        strip[int(start * RATE) :][: len(time)] += sum(
            np.sin(2 * np.pi * hertz * time) for hertz in pair
        )
    return _echo(strip, rng)


def _bell(rng: np.random.Generator) -> Array:
    """A bell struck at even times: inharmonic partials that decay, the high ones first."""
    base, decay = rng.uniform(250, 2500), rng.uniform(0.3, 3)
    ratios = np.array([0.5, 1, 1.19, 1.5, 2, 2.52, 3.01, 4.16]) * rng.uniform(0.98, 1.02, 8)
    stroke = sum(
        np.sin(2 * np.pi * base * ratio * _TIME)
        * np.exp(-_TIME * ratio / decay)
        * rng.uniform(0.2, 1)
        for ratio in ratios
        if base * ratio < 7500
    )
    strip = np.zeros(SAMPLES)
    for start in np.arange(rng.uniform(0, 0.5), 5, rng.uniform(0.12, 3)):
        strip[int(start * RATE) :] += np.asarray(stroke)[
            : SAMPLES - int(start * RATE)
        ] * rng.uniform(0.5, 1)
    return strip


def _thumps(rng: np.random.Generator) -> Array:
    """Knocks, falls, steps, crackles: filtered bursts at uneven times."""
    strip = np.zeros(SAMPLES)
    centre = rng.uniform(80, 4000)
    for _ in range(rng.integers(1, 15)):
        length, start = rng.uniform(0.02, 0.5), rng.integers(0, SAMPLES - RATE // 2)
        time = np.arange(int(length * RATE)) / RATE
        burst = rng.normal(size=len(time)) * np.exp(-time * 5 / length) * rng.uniform(0.2, 1)
        strip[start : start + len(time)] += burst
    edges = [centre * 0.5, min(7900, centre * rng.uniform(1.5, 3))]
    return _echo(
        np.asarray(signal.sosfilt(signal.butter(1, edges, "band", fs=RATE, output="sos"), strip)),
        rng,
    )


def _smooth(on: NDArray[np.bool_]) -> Array:
    return np.asarray(np.convolve(on, np.ones(80) / 80, "same"))


def _echo(wave: Array, rng: np.random.Generator) -> Array:
    if rng.random() < 0.5:
        return wave
    response = (
        rng.normal(size=RATE // 2)
        * np.exp(-np.arange(RATE // 2) / RATE * rng.uniform(8, 40))
        * 0.05
    )
    return np.asarray(wave + signal.fftconvolve(wave, response)[:SAMPLES])


_OTHERS: tuple[Maker, ...] = (
    _noise,
    _noise,
    _band,
    _tones,
    _hum,
    _beeps,
    _beeps,
    _ring,
    _keys,
    _bell,
    _thumps,
)
