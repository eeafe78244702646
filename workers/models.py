"""A run's id in, its plan out: its options, its model behind a batcher, its labels' ids."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from db import ledger, runs
from earmark.core.errors import ModelError
from earmark.core.options import ModelKey, RunOptions
from earmark.core.settings import Settings
from workers.loading.cutter import Shape
from workers.loading.process import Job

if TYPE_CHECKING:
    from workers.scoring.batcher import Batcher
    from workers.scoring.model import ModelCard

    #: Takes scored windows and their outcomes, a batch at a time.
    Scored = Callable[[list[Any], list[Any]], None]


#: What a model's row has of its card, besides the revision.
IDENTITY = ("name", "sha256", "sample_rate", "function_to_apply", "window_s")


@dataclass(slots=True)
class LoadedModel:
    """A model in memory, with the number of chunks that use it."""

    card: ModelCard
    batcher: Batcher
    model_id: int
    label_ids: tuple[int, ...]
    users: int = 0


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The way in which the clips of one run are classified."""

    options: RunOptions
    model: LoadedModel
    run_id: int = 0
    reuse_urls: bool = False

    @property
    def job(self) -> Job:
        """Return what loaders have to know."""
        return Job(self.run_id, self.shape, self.reuse_urls, self.options.decoded_channels)

    @property
    def shape(self) -> Shape:
        """Return the windows to cut."""
        card, options = self.model.card, self.options
        window_s = card.usable_window_s(options.window_s)
        hop_s = options.hop_s or card.hop_s
        return Shape.of(card.sample_rate, window_s, hop_s, card.min_samples)


class Models:
    """The models in this process's memory.

    Use one per worker, shared by its threads, and close it. `take` a run's plan before its clips
    are classified and `give_back` the plan afterwards. EARMARK_MODEL__KEEP models are kept; the
    one that was idle longest is unloaded for another.
    """

    def __init__(self, engine: sa.Engine, settings: Settings, scored: Scored) -> None:
        self._engine = engine
        self._settings = settings
        self._scored = scored
        self._loaded: dict[ModelKey, LoadedModel] = {}
        self._changing = threading.Lock()

    def load(
        self, name: str, revision: str | None, labels: tuple[str, ...] = (), head: str | None = None
    ) -> LoadedModel:
        """Return a model, loaded now unless it is in memory.

        Raises:
            ServiceError: it cannot be loaded; the sentence names the cure.
        """
        with self._changing:
            return self._in_memory((name, revision, labels, head))

    def take(self, run_id: int) -> RunPlan:
        """Return a run's plan, with its model loaded; give it back after use.

        Raises:
            ServiceError: the run's model cannot be loaded.
            ModelError: this worker's copy of the model is not the one that the run began with.
        """
        run = runs.get_run(self._engine, run_id)
        options = run.options
        with self._changing:
            loaded = self._in_memory(options.model_key)
            model_id = run.model_id or ledger.settle_model(self._engine, run_id, loaded.model_id)
            if model_id != loaded.model_id:
                raise ModelError(
                    reason=f"this worker's {options.model} is not the one that the run began with"
                )
            loaded.users += 1
        return RunPlan(options, loaded, run_id, run.reuse_urls)

    def give_back(self, plan: RunPlan) -> None:
        """End a chunk's use of the model."""
        with self._changing:
            plan.model.users -= 1

    @property
    def batchers(self) -> list[Batcher]:
        """The queues in front of the loaded models."""
        return [loaded.batcher for loaded in list(self._loaded.values())]

    def close(self) -> None:
        for loaded in self._loaded.values():
            loaded.batcher.close()

    def _in_memory(self, key: ModelKey) -> LoadedModel:
        if key not in self._loaded:
            self._make_room()
            self._loaded[key] = self._load(key)
        # The order of the dictionary is the order of use.
        self._loaded[key] = loaded = self._loaded.pop(key)
        return loaded

    def _make_room(self) -> None:
        idle = [key for key, loaded in self._loaded.items() if not loaded.users]
        too_many = len(self._loaded) + 1 - self._settings.model.keep
        for key in idle[: max(0, too_many)]:
            self._loaded.pop(key).batcher.close()

    def _load(self, key: ModelKey) -> LoadedModel:
        card, batcher = open_model(key, self._settings, self._scored)
        identity = {name: getattr(card, name) for name in IDENTITY}
        identity["revision"] = card.revision or ""
        model_id, label_ids = ledger.register_model(self._engine, card.labels, **identity)
        return LoadedModel(card, batcher, model_id, label_ids)


def plan_alone(options: RunOptions, settings: Settings, scored: Scored) -> RunPlan:
    """Return the plan for clips that are scored outside of a run, with a model of its own."""
    card, batcher = open_model(options.model_key, settings, scored)
    return RunPlan(options, LoadedModel(card, batcher, model_id=0, label_ids=()))


def open_model(key: ModelKey, settings: Settings, scored: Scored) -> tuple[ModelCard, Batcher]:
    """Load a model and put a batcher in front of it; raises ServiceError."""
    # Imported here because torch takes seconds, and Flower and the command line load this module.
    from workers.scoring import batcher, classifier

    name, revision, labels, head = key
    model = classifier.load(
        settings.model.model_copy(update={"name": name, "revision": revision}), labels, head
    )
    return model.card, batcher.Batcher(model, settings.worker, scored)
