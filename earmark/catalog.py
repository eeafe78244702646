"""`earmark models`: the models on this machine, what they hear, and what a clip costs here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from earmark import machine_speed
from earmark.core.errors import ServiceError
from earmark.core.settings import Settings
from workers.scoring import hub
from workers.scoring.local_models import Local, local_models

#: The columns of a table, the most important first.
COLUMNS = ("model", "ms", "labels", "problem", "cheaper", "license", "mb", "window_s", "hears")
_EXAMPLES = 3
#: What a zero-shot model listens for while it is measured.
_ANY_SOUND = ("sound",)


@dataclass(slots=True)
class Entry:
    """A model on this machine; of one that cannot be loaded, the problem."""

    model: str
    mb: float
    labels: int
    hears: str
    sample_rate: int | None = None
    window_s: float | None = None
    license: str | None = None
    device: str | None = None
    #: Milliseconds for a clip of five seconds, of one core if the device is a CPU.
    ms: float | None = None
    #: A model with the same labels that takes less time.
    cheaper: str | None = None
    problem: str | None = None


def models(names: Sequence[str], settings: Settings) -> list[Entry]:
    """Measure these models or, without names, all on this machine.

    Raises:
        ServiceError: a named model cannot be found.
    """
    if names:
        return _compared([Local(name, *hub.locate(name, None)) for name in names], settings)
    return _compared(local_models(), settings)


def cheaper(name: str, revision: str | None, settings: Settings) -> str | None:
    """Return a sentence on the cheapest model here with the labels of this one, unless it is this.

    Nothing is measured if no other model has its labels.
    """
    own = Local(name, *hub.locate(name, revision))
    labels = set(own.labels())
    others = [model for model in local_models() if model.name != name]
    rivals = [model for model in others if labels and set(model.labels()) == labels]
    entry = _compared([own, *rivals], settings)[0] if rivals else None
    if entry is None or entry.cheaper is None:
        return None
    return f"{name} takes {entry.ms:g} ms for 5 s of sound; with the same labels {entry.cheaper}"


def _compared(models: Iterable[Local], settings: Settings) -> list[Entry]:
    """Measure models, and note for each the cheapest one with the same labels."""
    alike: dict[frozenset[str], list[Entry]] = defaultdict(list)
    entries = []
    for model in models:
        labels = model.labels()
        entry = _measured(model, labels, settings)
        entries.append(entry)
        if entry.ms is not None and entry.labels:
            alike[frozenset(labels)].append(entry)
    for group in alike.values():
        best = min(group, key=lambda entry: entry.ms or 0)
        for entry in group:
            if entry is not best:
                entry.cheaper = f"{best.model}: {best.ms:g} ms"
    return entries


def _measured(model: Local, labels: tuple[str, ...], settings: Settings) -> Entry:
    from workers.scoring import classifier

    entry = Entry(
        model.name, round(model.bytes() / 1e6, 1), len(labels), ", ".join(labels[:_EXAMPLES])
    )
    named = settings.model.model_copy(update={"name": model.name, "revision": model.revision})
    try:
        loaded = classifier.load(named, _ANY_SOUND if model.is_zero_shot() else ())
    except ServiceError as error:
        entry.problem = str(error)
        return entry
    card = loaded.card
    entry.sample_rate, entry.window_s, entry.license = card.sample_rate, card.window_s, card.license
    entry.device, entry.ms = loaded.device, round(machine_speed.scoring_ms(loaded), 1)
    return entry
