"""On the import path of a worker, this causes faults that no server or signal can.

FAULT_CLIPS: a clip with `poison` in its URI kills its worker, one with `venom` its loader. The host
`nowhere.test` has no address. A host whose name begins with `flaky` is on loopback, but its first
look-up fails. Clips with a result are noted in a file. FAULT_MEMORY: the model has room for one
window at a time. FAULT_MEMORY_OF: the model of this name has room for no clip. FAULT_DEVICE: the
device is lost after so many batches. FAULT_CLOCK_S: the process's clock is wrong by so much.
FAULT_NO_RECOVERY: the feeder takes nothing back. FAULT_START: the model fails to load with an
unexpected error.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

if "FAULT_CLIPS" in os.environ:
    from workers.clip import ClipInWork
    from workers.fetching.polite import PoliteFetcher
    from workers.loading.process import Known

    _fetch, _getaddrinfo = PoliteFetcher.fetch, socket.getaddrinfo
    _close = ClipInWork._close

    def _fetch_or_die(self: Any, uri: str, *part: Any) -> Any:
        in_loader = "loader" in sys.modules["__main__"].__spec__.name
        if "poison" in uri and in_loader:
            os.kill(int(os.environ.get("FAULT_WORKER", sys.argv[1])), signal.SIGKILL)
        if "poison" in uri or "venom" in uri:
            os.kill(os.getpid(), signal.SIGKILL)
        return _fetch(self, uri, *part)

    def _note(clip_id: int) -> None:
        with suppress(OSError), Path("classified.log").open("a") as log:
            log.write(f"{clip_id}\n")

    def _close_and_note(self: Any, end: Any) -> None:
        if end is None or isinstance(end, Known):  # its scores are here, or those of its bytes
            _note(self.clip_id)
        _close(self, end)

    def _found_or_not(host: Any, *where: Any, **how: Any) -> Any:
        flaky = str(host).startswith("flaky")
        if host == "nowhere.test" or (flaky and not Path(host).exists()):
            Path(host).touch()
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return _getaddrinfo("127.0.0.1" if flaky else host, *where, **how)

    PoliteFetcher.fetch = _fetch_or_die  # type: ignore[method-assign]
    ClipInWork._close = _close_and_note  # type: ignore[method-assign]
    socket.getaddrinfo = _found_or_not

if "FAULT_MEMORY" in os.environ:
    import torch

    from workers.scoring.classifier import Classifier

    _forward = Classifier._forward

    def _forward_if_small(self: Any, windows: Any, **how: Any) -> Any:
        if len(windows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return _forward(self, windows, **how)

    Classifier._forward = _forward_if_small  # type: ignore[method-assign]

if "FAULT_MEMORY_OF" in os.environ:
    import torch

    from workers.scoring.batcher import Batcher

    _score = Batcher._score

    def _fail_to_score(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def _score_or_fail(self: Any, lane: Any, batch: Any) -> None:
        if os.environ["FAULT_MEMORY_OF"] in lane.card.name:
            lane._scores = _fail_to_score
        _score(self, lane, batch)

    Batcher._score = _score_or_fail  # type: ignore[method-assign]

if "FAULT_DEVICE" in os.environ:
    from itertools import count

    from workers.scoring.classifier import Classifier

    _run_forward, _batches = Classifier._forward, count(1)

    def _forward_until_lost(self: Any, windows: Any, **how: Any) -> Any:
        if next(_batches) > int(os.environ["FAULT_DEVICE"]):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return _run_forward(self, windows, **how)

    Classifier._forward = _forward_until_lost  # type: ignore[method-assign]

if "FAULT_CLOCK_S" in os.environ:
    _time, _offset_s = time.time, float(os.environ["FAULT_CLOCK_S"])
    time.time = lambda: _time() + _offset_s

if "FAULT_NO_RECOVERY" in os.environ:
    from db import feeding

    feeding.take_back = feeding.take_back_queued = lambda *_: 0

if "FAULT_START" in os.environ:
    from workers.models import Models

    def _fail(*_: Any) -> None:
        raise ZeroDivisionError

    Models.load = _fail  # type: ignore[method-assign,assignment]
