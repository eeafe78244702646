"""The models on this machine: the starter, and those in the cache of the hub. It loads no torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import huggingface_hub
from huggingface_hub import errors as hub_errors

from earmark.core import errors
from earmark.core.spelling import did_you_mean
from workers.scoring import heads, hub
from workers.scoring.onnx_description import Described

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from earmark.core.options import RunOptions

#: Labels that a refusal of another one names.
_SHOWN = 10


class Local(NamedTuple):
    """A model whose files are on this machine."""

    name: str
    folder: Path
    #: The commit of a hub model.
    revision: str | None

    def labels(self) -> tuple[str, ...]:
        """Return the labels that its files state, in any order; none if it has none of its own."""
        try:
            if hub.is_described(self.folder):
                described = Described(*self)
                return described.labels(described.description().labels)
            return tuple(self._config().get("id2label", {}).values())
        except (OSError, ValueError, errors.ServiceError):  # loading it says what is wrong
            return ()

    def is_zero_shot(self) -> bool:
        return bool(self._config().get("model_type") == hub.ZERO_SHOT)

    def is_audio(self) -> bool:
        """Return whether it takes sound, by its extractor or description."""
        extractors = self.folder.glob(hub.EXTRACTORS)
        hears = any("sampling_rate" in file.read_text() for file in extractors)
        return hears or hub.is_described(self.folder)

    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def _config(self) -> dict[str, Any]:
        file = self.folder / hub.CONFIG
        config: dict[str, Any] = {}
        if file.is_file():
            config = json.loads(file.read_text())
        return config


def check_then(options: Sequence[RunOptions]) -> None:
    """Check the labels that let clips through, if the files of the first model are here.

    Raises:
        UsageError: the first model has no such label.
    """
    first, wanted = options[0], options[-1].then_label
    known = _labels(first) if wanted else ()
    for label in wanted:
        if known and label not in known:
            meant = did_you_mean(label, known) or f" It has {', '.join(known[:_SHOWN])}."
            raise errors.UsageError(reason=f"{first.model} has no label {label}.{meant}")


def _labels(options: RunOptions) -> tuple[str, ...]:
    if options.labels:
        return options.labels
    if options.head:
        return heads.load(options.head).labels
    folder = hub.folder_here(options.model, options.revision)
    return Local(options.model, folder, None).labels() if folder else ()


def local_models() -> Iterator[Local]:
    """Yield the starter, then the audio models in the cache."""
    yield Local("starter", hub.STARTER, None)
    try:
        repositories = huggingface_hub.scan_cache_dir().repos
    except hub_errors.CacheNotFound:
        return
    for repository in sorted(repositories, key=lambda each: each.repo_id):
        main = repository.refs.get("main")
        if main and repository.repo_type == "model":
            model = Local(repository.repo_id, main.snapshot_path, main.commit_hash)
            if model.is_audio():
                yield model
