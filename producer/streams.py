"""The place of a list in, its bytes out: local or remote, standard input, compressed or not."""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from earmark.core.container_child import packing_of, unpacked
from earmark.core.errors import UsageError
from earmark.core.settings import Fetch
from producer import elsewhere

#: The endings of compressed lists and containers.
COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst", ".zstd"})


@contextmanager
def opened(place: str, shown: str, fetch: Fetch) -> Iterator[io.BufferedReader]:
    with ExitStack() as files:
        try:
            if place == "-":
                raw = cast("io.BufferedReader", sys.stdin.buffer)
            elif "://" in place:
                raw = files.enter_context(elsewhere.stream(place, fetch))
            else:
                raw = files.enter_context(Path(place).open("rb"))
            stream = _decompressed(raw)
            if stream is not raw:
                files.enter_context(stream)
                stream.peek(1)  # raises if it is damaged
        except Exception as error:
            # File systems of fsspec raise any exception of their libraries.
            reason = f"The list {shown} cannot be read: {elsewhere.why(place, error)}."
            raise UsageError(reason=reason) from None
        yield stream


def _decompressed(raw: io.BufferedReader) -> io.BufferedReader:
    packing = packing_of(raw)
    if not packing:
        return raw
    return io.BufferedReader(unpacked(raw, packing))


@contextmanager
def seekable(place: str, stream: io.BufferedReader) -> Iterator[Path]:
    # A parquet is read from its end, so a remote one is copied first.
    if stream.seekable() and isinstance(stream.raw, io.FileIO) and place != "-":
        yield Path(place)
        return
    with tempfile.NamedTemporaryFile(suffix=".parquet") as copy:
        shutil.copyfileobj(cast("BinaryIO", stream), copy)
        copy.flush()
        yield Path(copy.name)
