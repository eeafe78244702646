"""What holds a run back, as a sentence with its cure."""

from __future__ import annotations

from db.pace import Workload
from earmark.core.settings import Worker

#: A model that waits less than this share of the time has nothing to gain.
WAITS = 0.1
#: Clips that spend most of their time at the model wait for it.
MOSTLY = 0.5


def bottleneck(workload: Workload | None, worker: Worker) -> str | None:
    """Return what the workers wait for and its cure, where that is known."""
    if workload is None:
        return None
    # No clip is at the model at least this share of the time, however clips overlap.
    waits = 1 - workload.classifying
    if waits < WAITS:
        return _at_the_model(workload)
    begin = f"The model waits at least {waits:.0%} of the time"
    if workload.decoding > workload.fetching:
        return f"{begin} for decoding: add workers on other processors."
    in_chunks = worker.concurrency * workload.chunk_size
    if workload.fetching > MOSTLY * min(worker.clips_in_flight, in_chunks):
        cure = "--concurrency"
        if worker.clips_in_flight <= in_chunks:
            cure = "EARMARK_WORKER__CLIPS_IN_FLIGHT"
        return f"{begin} for downloads: raise {cure} or add workers."
    return (
        f"{begin}, with {workload.fetching:.1f} downloads a worker at once: raise"
        " EARMARK_FETCH__HOST_CONCURRENCY if the limits on one host hold them back."
    )


def _at_the_model(workload: Workload) -> str | None:
    stages = workload.fetching + workload.decoding + workload.classifying
    share = workload.classifying / stages
    if share <= MOSTLY:
        return None
    return (
        f"Clips spend {share:.0%} of their time at the model: add workers, each with a device of"
        " its own, or take a faster device or a cheaper model (`earmark models` times them)."
    )
