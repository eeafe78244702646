"""How fast a core of this machine decodes, a device scores, and how many cores it wants."""

from __future__ import annotations

import math
import time
from statistics import median
from typing import TYPE_CHECKING

from earmark.demo import EXAMPLES

if TYPE_CHECKING:
    import numpy as np

    from earmark.core.settings import Audio
    from workers.scoring.classifier import Classifier

#: An Ogg Vorbis file of five seconds, the commonest kind of clip.
SAMPLE, SAMPLE_S = EXAMPLES / "dog.ogg", 5.0
SAMPLE_RATE = 16_000
#: Decoded so often. The first times are slower, and a busy machine disturbs some.
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
    return median(took) / SAMPLE_S


def clips_per_s(model: Classifier, samples: np.ndarray) -> float:
    """Return how many such windows a second the device scores, in full batches."""
    batch = [samples] * len(model.choose([len(samples)] * model.limits.windows))
    model.outcomes(batch)
    began = time.perf_counter()
    for _ in range(BATCHES):
        model.outcomes(batch)
    return BATCHES * len(batch) / (time.perf_counter() - began)


def cores_wanted(clips_s: float, decode_ms: float) -> int:
    """Return how many cores give a device so many clips a second."""
    return math.ceil(clips_s * (decode_ms + REST_MS) / 1000)
