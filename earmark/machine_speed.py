"""How fast a core of this machine decodes, a device scores, and how many cores it wants."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np

from earmark.core.settings import Audio
from earmark.demo import EXAMPLES

if TYPE_CHECKING:
    from workers.scoring.classifier import Classifier

#: An Ogg Vorbis file of five seconds, the commonest kind of clip.
SAMPLE, SAMPLE_S = EXAMPLES / "dog.ogg", 5.0
SAMPLE_RATE = 16_000
#: Decoded so often, and the quickest counts: other work on the machine only makes it slower.
TIMES = 11
#: What a clip costs the CPU beside its decoding, in the worker and its loaders.
REST_MS = 1.5
#: Batches scored to see how fast a device is.
BATCHES = 4


def decoding_ms(audio: Audio) -> float:
    """Return the milliseconds in which one decoder decodes a second of Ogg Vorbis here.

    Raises:
        ServiceError: no decoder can be started.
    """
    from workers.decoding.pool import Decoders

    decoders = Decoders(audio, 1)
    took = []
    try:
        for _ in range(TIMES):
            with SAMPLE.open("rb") as file:
                began = time.perf_counter()
                decoders.decode(file, SAMPLE_RATE)
                took.append(1000 * (time.perf_counter() - began))
    finally:
        decoders.close()
    return min(took) / SAMPLE_S


def scoring_ms(model: Classifier) -> float:
    """Return the milliseconds in which a device, or a core of a CPU, scores SAMPLE_S of sound."""
    from workers.scoring import devices

    if model.device == "cpu":
        devices.use_one_thread()
    card = model.card
    window_s = min(card.window_s, SAMPLE_S)
    size = max(round(window_s * card.sample_rate), card.min_samples)
    noise = 0.1 * np.random.default_rng(0).standard_normal(size, np.float32)
    batch = [noise] * len(model.choose([size] * model.limits.windows))
    model.outcomes(batch)
    began = time.perf_counter()
    for _ in range(BATCHES):
        model.outcomes(batch)
    took_ms = 1000 * (time.perf_counter() - began)
    return took_ms / (BATCHES * len(batch)) * math.ceil(SAMPLE_S / window_s)


def cores_wanted(clips_s: float, decode_ms: float) -> int:
    """Return how many cores give a device so many clips a second."""
    return math.ceil(clips_s * (decode_ms + REST_MS) / 1000)
