"""Where the files of a model are: `starter`, a folder, or the hub. It loads no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from huggingface_hub import errors as hub_errors

from earmark.core import errors
from workers.scoring import onnx_description

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from earmark.core.options import RunOptions

STARTER = Path(__file__).with_name("starter")
#: What says how a model is built, and what a person reads of it.
CONFIG, _CARD = "config.json", "README.md"
#: Configurations, extractors and tokenizers: JSON or text. Safe weights are preferred to pickles.
EXTRACTORS = "*processor_config.json"
_FILES = [CONFIG, _CARD, onnx_description.NAME, EXTRACTORS, "*token*.json", "vocab.*", "merges.txt"]
SAFE_WEIGHTS, PICKLES = "model*.safetensors*", "pytorch_model*.bin*"
#: The type of the models that are told what to listen for.
ZERO_SHOT = "clap"


def check(options: RunOptions, *, here: bool) -> None:
    """Check what is quick to know of a run's model: that it is there, and has what is wanted.

    Args:
        here: this machine does the work, so that it needs the model; else it is asked for nothing
            that it does not have.

    Raises:
        ServiceError: a run with this model could not begin.
    """
    try:
        config = _content(options, CONFIG, here=here)
        described = _content(options, onnx_description.NAME, here=here)
    except errors.ServiceError:
        if here:
            raise
        return
    name = options.model
    if config:
        check_labels(name, options.labels, zero_shot=config.get("model_type") == ZERO_SHOT)
    if described and not described.get("embeddings") and (options.embeddings or options.head):
        raise errors.ServiceError(
            reason=f"{name} gives no embeddings: its {onnx_description.NAME} names no such output."
        )


def _content(options: RunOptions, file: str, *, here: bool) -> dict[str, Any]:
    """Return a JSON file of a model; nothing if it cannot be read, as loading it says why."""
    folder = _folder(options.model)
    if folder is None and here:
        folder = _download(options.model, options.revision, [CONFIG, onnx_description.NAME])
    try:
        path = folder / file if folder else _cached(options.model, options.revision, file)
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def check_labels(name: str, labels: Sequence[str], *, zero_shot: bool) -> None:
    """Raise ServiceError if a run's labels do not fit its model."""
    if zero_shot and not labels:
        raise errors.ServiceError(
            reason=f"{name} has no labels of its own; say what to listen for with --labels."
        )
    if labels and not zero_shot:
        raise errors.ServiceError(
            reason=f"{name} has its own labels; --labels is for zero-shot models (CLAP)."
        )


def license_of(name: str, revision: str | None) -> str | None:
    """Return the licence that a model's card states, if the card is on this machine."""
    try:
        folder = _folder(name)
        card = folder / _CARD if folder else _cached(name, revision, _CARD)
        stated = (huggingface_hub.metadata_load(card) or {}).get("license")
    except (OSError, ValueError, errors.ServiceError):
        return None
    return str(stated) if stated else None


def _cached(name: str, revision: str | None, file: str) -> Path:
    """Return a file of a hub model in this machine's cache; raise OSError if it is not there."""
    cached = huggingface_hub.try_to_load_from_cache(name, file, revision=revision or None)
    if not isinstance(cached, str):
        raise FileNotFoundError(file)
    return Path(cached)


def folder_here(name: str, revision: str | None) -> Path | None:
    """Return the folder with those files of a model that are on this machine already."""
    try:
        return _folder(name) or _cached(name, revision, CONFIG).parent
    except (OSError, errors.ServiceError):
        return None


def _folder(name: str) -> Path | None:
    """Return the folder of a model that is no hub model; raise ServiceError if it is missing."""
    if name == "starter":
        return STARTER
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise errors.ServiceError(
            reason=f"There is no folder {name} on this machine; check the model's path."
        )
    return None


def locate(name: str, revision: str | None) -> tuple[Path, str | None]:
    """Return the folder of a model's files, and the commit of a hub model, downloaded once.

    Raises:
        ServiceError: it is not there, or out of reach.
    """
    folder = _folder(name)
    if folder is not None:
        return folder, None
    snapshot = _download(name, revision, [*_FILES, SAFE_WEIGHTS])
    if is_described(snapshot):
        content = onnx_description.Described(name, snapshot, snapshot.name).description()
        # External data lies beside the graph, and is named as the graph is.
        named = [f"{content.model}*", content.labels, content.reference]
        snapshot = _download(name, snapshot.name, [*_FILES, *named])
    elif not any(snapshot.glob(SAFE_WEIGHTS)):
        snapshot = _download(name, snapshot.name, [*_FILES, PICKLES])
    return snapshot, snapshot.name


def sha256(files: Iterable[Path]) -> str:
    """Return the digest of the digests of these files, in this order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def is_described(folder: Path) -> bool:
    """Return whether an `earmark.json` in a folder says that its model is an ONNX graph."""
    return (folder / onnx_description.NAME).exists()


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        )
    except (OSError, hub_errors.HFValidationError, hub_errors.EntryNotFoundError) as error:
        raise errors.ServiceError(reason=_why_not(name, revision, error)) from error


def _why_not(name: str, revision: str | None, error: Exception) -> str:
    match error:
        case hub_errors.GatedRepoError():
            cure = "accept its terms on huggingface.co and set HF_TOKEN"
            return f"The hub asks for permission to use {name}: {cure}."
        case hub_errors.RepositoryNotFoundError():
            cure = "check the id, or set HF_TOKEN if it is private"
            return f"The hub has no model {name}: {cure}."
        case hub_errors.RevisionNotFoundError():
            return f"{name} has no revision {revision}; check --revision."
        case hub_errors.HFValidationError():
            cure = "give `starter`, a folder, or a hub id such as owner/model"
            return f"{name} names no model: {cure}."
    cure = "connect once to download it, or give a folder"
    return f"{name} is not in this machine's model cache and the hub cannot be reached: {cure}."
