"""Files that appear under their name only when they are whole, and standard output."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from earmark.core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetOptions:
    """How a Parquet file is written."""

    #: The columns are those of the views, whose types are known.
    of_views: bool = True
    #: Returns what made the rows, for the file's metadata.
    made_by: Callable[[], dict[str, Any]] = dict
    #: A folder of files, each with some hundred thousand rows.
    parts: bool = False


@contextmanager
def opened(file: Path | None) -> Iterator[TextIO]:
    """Yield standard output, or a file that appears under its name at the end.

    Raises:
        UsageError: it cannot be written, such as on a full disk.
    """
    if file is None:
        with _standard_output():
            yield sys.stdout
            sys.stdout.flush()
        return
    with whole(file) as part, part.open("w", encoding="utf-8", newline="") as out:
        yield out


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Yield a path for a file or a folder; it takes the real name at the end if all went well."""
    if file.exists() and not (file.is_file() or file.is_dir()):
        # A device or a pipe, whose place a file must not take.
        with _sentence(str(file)):
            yield file
        return
    # A person who has a link to a file wants the file written.
    target = file.resolve()
    part = target.with_name(f".{target.name}.part")
    try:
        with _sentence(str(file)):
            yield part
            part.replace(target)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)


@contextmanager
def _standard_output() -> Iterator[None]:
    try:
        with _sentence("Standard output"):
            yield
    except (UsageError, BrokenPipeError):
        # What is left in Python's buffer would fail once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


@contextmanager
def _sentence(name: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        # The reader has enough, as `head` has: click ends the command without a word.
        raise
    except OSError as error:
        raise UsageError(reason=f"{name} cannot be written: {error.strerror or error}.") from error
