"""Classify one clip in this process, with the parts of a worker and without a queue."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from db.claims import Claimed
from earmark import folders
from earmark.core.clips import Failure, Part, Postponed, Prediction, Success, Waveform
from earmark.core.errors import ServiceError
from earmark.core.options import RunOptions
from earmark.core.settings import Settings
from workers.alone import Alone
from workers.clip import WindowQueue

if TYPE_CHECKING:
    from workers.loading.process import LoadedWindow, Observer
    from workers.scoring.batcher import Batcher


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

    Without settings for it, a file is read wherever it is: a person has named it.

    Raises:
        ServiceError: the model or the decoder cannot be had.
    """
    folders.check_temporary()
    heard = _Heard()
    alone = Alone(folders.readable(uri, settings), options, observer or _Nobody(), heard)
    try:
        card = alone.plan.model.card
        outcome = alone.classify(Claimed(0, uri, attempts=1, crashes=0, part=part))
        waveform = heard.waveform(card.sample_rate)
        yield Classified(outcome, card.labels, alone.plan.model.batcher, waveform)
    finally:
        alone.close()


class _Nobody:
    def seen(self, step: str, *facts: Any) -> None:
        """See nothing."""


class _Heard(WindowQueue):
    """Keeps the samples of the first channel that is heard."""

    def __init__(self) -> None:
        self._windows: list[tuple[int, np.ndarray]] = []
        self._channel: int | None = None

    def put(self, loaded: list[LoadedWindow]) -> list[LoadedWindow]:
        for window in loaded:
            if self._channel is None:
                self._channel = window.channel
            if self._channel == window.channel:
                self._windows.append((window.start, window.samples[: window.heard].copy()))
        return super().put(loaded)

    def waveform(self, sample_rate: int) -> Waveform | None:
        """Return what the model heard, if anything; silence where windows leave something out."""
        if not self._windows:
            return None
        begin = min(start for start, _ in self._windows)
        end = max(start + len(part) for start, part in self._windows)
        samples = np.zeros(end - begin, np.float32)
        for start, part in self._windows:
            samples[start - begin : start - begin + len(part)] = part
        return Waveform(samples, sample_rate)
