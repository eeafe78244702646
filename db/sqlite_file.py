"""SQLite files that this process may read but not write: how to notice and open them."""

from __future__ import annotations

import os
from pathlib import Path


def is_read_only(name: str | None) -> bool:
    """Return whether a file is there and cannot be written here."""
    file = Path(name or "")
    if not file.is_file():
        return False
    # A writer creates a file beside it, unless another writer has done so.
    beside = _log(file).exists() or os.access(file.parent, os.W_OK)
    return not (os.access(file, os.W_OK) and beside)


def read_only_uri(file: Path) -> str:
    """Return how to open a file for reading, in the form of SQLite's URIs."""
    option = "mode=ro"
    if is_read_only(str(file)) and not _log(file).exists():
        # A reader of a file in WAL mode writes beside it too, unless the file is immutable.
        option = "immutable=1"
    return f"{file.absolute().as_uri()}?{option}"


def _log(file: Path) -> Path:
    return file.with_name(f"{file.name}-wal")
