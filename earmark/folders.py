"""The folders that a run reads and writes on this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from earmark.core.errors import ServiceError
from earmark.core.settings import Settings

#: With less room, SQLite and Valkey refuse to write.
FULL_BYTES = 1024**2
CURE = "Set EARMARK_DATA_DIR to a folder that can be written."


def check(settings: Settings) -> None:
    """Make the data folder.

    Raises:
        ServiceError: it cannot be written, or there is no folder for temporary files.
    """
    check_data(settings.data_dir)
    check_temporary()


def check_data(folder: Path) -> None:
    """Make the data folder; raise ServiceError if it cannot be written, or has no room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServiceError(
            reason=f"The data folder {folder} cannot be made: {error.strerror}. {CURE}"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ServiceError(reason=f"The data folder {folder} cannot be written. {CURE}")
    if _is_full(folder):
        raise ServiceError(reason=f"The disk of the data folder {folder} is full. {CURE}")


def check_temporary() -> None:
    """Raise ServiceError if no folder for temporary files can be written."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ServiceError(
            reason="No temporary file can be written: set TMPDIR to a folder that can be."
        ) from error


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < FULL_BYTES
    except OSError:  # the folder was removed: the process that writes there says so
        return False


def file_roots(sources: Iterable[str]) -> tuple[Path, ...]:
    """Return the folders that workers of this machine may read to classify these sources.

    A list or a link may name any file of this machine: the person who types `run` owns them. The
    workers of a cluster keep their own setting.
    """
    roots = []
    for source in sources:
        path = Path(source).expanduser().absolute()
        if "://" not in source or os.path.isdir(path):  # noqa: PTH112 - never raises
            roots.append(Path(path.anchor))
    return tuple(dict.fromkeys(roots))


def uri_of(named: str) -> str:
    """Return the URI of a file or URL that a person names."""
    if "://" in named:
        return named
    return str(Path(named).expanduser().absolute())


def readable(uri: str, settings: Settings) -> Settings:
    """Return settings with which a file that a person names is read; the same if some are set."""
    if settings.fetch.file_roots or not (roots := file_roots([uri])):
        return settings
    return settings.changed(fetch={"file_roots": roots})


class DiskWatch:
    """Tells once that the disk of a folder is full, and again if it fills up again later."""

    def __init__(self, folders: Iterable[Path], tell: Callable[[str], None]) -> None:
        self._folders = set(folders)
        self._tell = tell
        self._full: set[Path] = set()

    def look(self) -> None:
        """Look at the room in each folder."""
        full = {folder for folder in self._folders if _is_full(folder)}
        for folder in sorted(full - self._full):
            self._tell(f"The disk of {folder} is full; the run waits until there is room.")
        self._full = full
