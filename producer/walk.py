"""The files of a folder, and of the folders that its links lead to."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path


def files(folder: Path, refuse: Callable[[OSError], None]) -> Iterator[Path]:
    """Yield all files but hidden ones, from each real folder once.

    Folders behind links come last, so that a folder inside keeps the path it has there. A folder
    that cannot be read is refused.
    """
    seen: set[tuple[int, int]] = set()
    waiting = deque([folder])
    while waiting:
        top = waiting.popleft()
        if not _is_new(top, seen):
            continue
        for parent, folders, names in os.walk(top, onerror=refuse):
            shown = [Path(parent, name) for name in sorted(folders) if not name.startswith(".")]
            links = [path for path in shown if path.is_symlink()]
            waiting += [link for link in links if not _is_loop(link)]
            folders[:] = [path.name for path in shown if path not in links and _is_new(path, seen)]
            for name in sorted(names):
                if not name.startswith("."):
                    yield Path(parent, name)


def _is_new(folder: Path, seen: set[tuple[int, int]]) -> bool:
    """Return whether a real folder has not been seen, and remember it."""
    try:
        status = folder.stat()
    except OSError:  # the walk refuses it
        return True
    identity = status.st_dev, status.st_ino
    new = identity not in seen
    seen.add(identity)
    return new


def _is_loop(link: Path) -> bool:
    """Return whether a link leads to a folder that holds it, such as the root of the disk."""
    target = os.path.realpath(link)
    return Path(os.path.realpath(link.parent)).is_relative_to(target)
