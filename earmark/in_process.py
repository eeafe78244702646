"""Classify one clip in this process, with the parts of a worker and without a queue."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from db.claims import Claimed
from earmark import folders
from earmark.core import guard
from earmark.core.clips import Failure, Part, Postponed, Prediction, Success, Waveform
from earmark.core.errors import ServiceError
from earmark.core.options import RunOptions
from earmark.core.settings import Settings
from workers import single
from workers.decoding.pool import Decoders
from workers.fetching.fetch import Fetched, Fetcher
from workers.models import LoadedModel, RunPlan, open_model

if TYPE_CHECKING:
    from workers.scoring.batcher import Batcher


class Observer(guard.Observer, Protocol):
    """Sees every request for a clip, and its file."""

    def fetched(self, fetched: Fetched) -> None: ...


@dataclass(frozen=True, slots=True)
class Classified:
    """How one clip ended, the model that scored it, and its waveform if it was decoded."""

    outcome: Success | Failure | Postponed
    labels: tuple[str, ...]
    batcher: Batcher
    waveform: Waveform | None

    @property
    def success(self) -> Success:
        """The outcome of a clip that has a result; of any other, the reason is raised."""
        match self.outcome:
            case Success():
                return self.outcome
            case Failure():
                raise self.outcome.error
        raise ServiceError(reason="The clip could not be worked on here; the log above says why.")

    def named(self, predictions: Iterable[Prediction]) -> list[tuple[str, float]]:
        """Return predictions as pairs of label and score."""
        return [(self.labels[each.label], each.score) for each in predictions]


@contextmanager
def classified(
    uri: str,
    settings: Settings,
    options: RunOptions,
    observer: Observer | None = None,
    part: Part | None = None,
) -> Iterator[Classified]:
    """Yield how the clip ended, while the model is still loaded.

    Raises:
        ServiceError: the model or the decoder cannot be had.
    """
    folders.check_temporary()
    fetcher = Fetcher(settings.fetch, guard.Guard(settings.fetch, observer))
    clip = _Clip(observer)
    decoders = Decoders(settings.audio, 1)
    try:
        card, batcher = open_model(options.model_key, settings, single.scored)
        try:
            plan = RunPlan(options, LoadedModel(card, batcher, model_id=0, label_ids=()))
            way = single.SingleClip(fetcher, decoders, settings.audio.max_windows, clip)
            outcome = way.classify(Claimed(0, uri, attempts=1, crashes=0, part=part), plan)
            yield Classified(outcome, card.labels, batcher, clip.waveform(card.sample_rate))
        finally:
            batcher.close()
    finally:
        fetcher.close()
        decoders.close()


class _Clip:
    """Keeps the waveform of the first channel that is heard, and passes on what it sees."""

    def __init__(self, observer: Observer | None) -> None:
        self._observer = observer
        self._pieces: list[np.ndarray] = []
        self._channel: int | None = None

    def fetched(self, fetched: Fetched) -> None:
        if self._observer:
            self._observer.fetched(fetched)

    def decoded(self, samples: np.ndarray, channel: int) -> None:
        if self._channel is None:
            self._channel = channel
        if self._channel == channel:
            self._pieces.append(samples)

    def waveform(self, sample_rate: int) -> Waveform | None:
        """Return what was decoded, if anything was."""
        if not self._pieces:
            return None
        return Waveform(np.concatenate(self._pieces), sample_rate)
