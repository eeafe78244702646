"""A run's id in, what its clips need out: its options, its model behind a batcher, its labels' ids."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from db import ledger, runs
from db.reuse import reuse
from earmark.core.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    import sqlalchemy as sa

    from earmark.core.clips import Source, Success
    from earmark.core.options import RunOptions
    from earmark.core.settings import Settings
    from workers.scoring.batcher import Batcher
    from workers.scoring.classifier import ModelCard

Key = tuple[str, str | None, tuple[str, ...]]


@dataclass(slots=True)
class LoadedModel:
    """A model at hand, and for how many chunks it is in use."""

    card: ModelCard
    batcher: Batcher
    model_id: int
    label_ids: tuple[int, ...]
    users: int = 0


@dataclass(frozen=True, slots=True)
class RunPlan:
    """How the clips of one run are classified."""

    options: RunOptions
    model: LoadedModel
    #: The result that the bytes of a clip have already, if any; without them, its URL.
    known: Callable[[int, Source | None], Success | None] = lambda _clip_id, _source: None
    reuse_urls: bool = False


class Models:
    """The models this process has loaded; the one that was idle longest makes room for another run's."""

    def __init__(self, engine: sa.Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._loaded: dict[Key, LoadedModel] = {}
        self._changing = threading.Lock()

    def load(self, name: str, revision: str | None, labels: tuple[str, ...] = ()) -> LoadedModel:
        """Return a model, loaded now unless it is at hand.

        Raises:
            ServiceError: it cannot be had; the sentence says how to mend that.
        """
        with self._changing:
            return self._at_hand((name, revision, labels))

    def take(self, run_id: int) -> RunPlan:
        """Return what a run's clips need, to be given back after use.

        Raises:
            ServiceError: the run's model cannot be had.
            ModelError: this worker's copy of the model is not the one the run began with.
        """
        run = runs.get_run(self._engine, run_id)
        options = run.options
        with self._changing:
            loaded = self._at_hand((options.model, options.revision, options.labels))
            settled = run.model_id or ledger.settle_model(self._engine, run_id, loaded.model_id)
            if settled != loaded.model_id:
                raise ModelError(
                    reason=f"this worker's {options.model} is not the one that the run began with"
                )
            loaded.users += 1
        return RunPlan(options, loaded, partial(reuse, self._engine, run_id), run.reuse_urls)

    def give_back(self, plan: RunPlan) -> None:
        """Say that a chunk's work with the model is over."""
        with self._changing:
            plan.model.users -= 1

    @property
    def batchers(self) -> list[Batcher]:
        """The queues in front of the models at hand."""
        return [loaded.batcher for loaded in list(self._loaded.values())]

    def close(self) -> None:
        for loaded in self._loaded.values():
            loaded.batcher.close()

    def _at_hand(self, key: Key) -> LoadedModel:
        if key not in self._loaded:
            self._make_room()
            self._loaded[key] = self._load(key)
        # The order of the dictionary is the order of use.
        self._loaded[key] = loaded = self._loaded.pop(key)
        return loaded

    def _make_room(self) -> None:
        idle = [key for key, loaded in self._loaded.items() if not loaded.users]
        for key in idle[: max(0, len(self._loaded) - self._settings.model.keep + 1)]:
            self._loaded.pop(key).batcher.close()

    def _load(self, key: Key) -> LoadedModel:
        card, batcher = open_model(key, self._settings)
        model_id, label_ids = ledger.register_model(
            self._engine,
            card.labels,
            name=card.name,
            revision=card.revision or "",
            sha256=card.sha256,
            sample_rate=card.sample_rate,
            function_to_apply=card.function_to_apply,
            window_s=card.window_s,
        )
        return LoadedModel(card, batcher, model_id, label_ids)


def open_model(key: Key, settings: Settings) -> tuple[ModelCard, Batcher]:
    """Load a model and put a batcher in front of it; raises ServiceError."""
    # Imported here because torch takes seconds, and Flower and the command line load this package too.
    from workers.scoring import batcher, classifier

    name, revision, labels = key
    model = classifier.load(
        settings.model.model_copy(update={"name": name, "revision": revision}), labels
    )
    return model.card, batcher.Batcher(model, settings.worker)
