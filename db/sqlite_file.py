"""A SQLite file that this process may read and not write: whether it is one, and how it is opened."""

from __future__ import annotations

import os
from pathlib import Path


def is_read_only(name: str | None) -> bool:
    """Return whether a file is there and cannot be written here."""
    file = Path(name or "")
    if not file.is_file():
        return False
    # A writer makes a file beside it, unless another writer has.
    beside = _log(file).exists() or os.access(file.parent, os.W_OK)
    return not (os.access(file, os.W_OK) and beside)


def read_only_uri(file: Path) -> str:
    """Return how to open a file for reading, in the form of SQLite's URIs."""
    # Of a file in WAL mode, a reader too would write beside it, unless it is told that nobody changes the file.
    option = "mode=ro" if _log(file).exists() else "immutable=1"
    return f"{file.absolute().as_uri()}?{option}"


def _log(file: Path) -> Path:
    return file.with_name(f"{file.name}-wal")
