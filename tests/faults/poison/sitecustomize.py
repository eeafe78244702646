"""Put on the path of a worker, this makes any clip with `poison` in its URI kill the process that works on it."""

from __future__ import annotations

import os
import signal
from typing import Any

from workers.pipeline import Pipeline

_classify = Pipeline.classify


def _classify_or_die(self: Pipeline, clip: Any, job: Any) -> Any:
    if "poison" in clip.uri:
        os.kill(os.getpid(), signal.SIGKILL)
    return _classify(self, clip, job)


Pipeline.classify = _classify_or_die  # type: ignore[method-assign]
