"""Containers that are fetched and unpacked as a whole, so that their members can be read."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from io import FileIO

from earmark.core import errors, unpacking
from earmark.core.answers import BLOCK_BYTES
from earmark.core.clips import Part

#: Containers kept on disk: the one in progress, and the next.
KEPT = 2


class _Whole:
    """A container on disk, closed when nobody refers to it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.descriptor: int | None = None

    def __del__(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


class WholeContainers:
    """The containers that a worker has fetched last, each once, in files without a name.

    Use one per process, shared by its threads. `fetch` opens a container for reading.
    """

    def __init__(self, fetch: Callable[[str], FileIO], max_bytes: int) -> None:
        self._fetch = fetch
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._wholes: OrderedDict[tuple[str, str], _Whole] = OrderedDict()

    def has(self, uri: str) -> bool:
        """Return whether a container had to be fetched as a whole though it is not packed."""
        return (uri, "") in self._wholes

    def read(self, uri: str, packing: str, part: Part) -> Iterator[bytes]:
        """Yield a member's bytes.

        Raises:
            DownloadError: the container cannot be fetched or unpacked.
        """
        with self._whole(uri, packing) as file:
            yield from read_slice(file, part)

    def _whole(self, uri: str, packing: str) -> FileIO:
        """Return the container unpacked; the caller closes the file."""
        with self._lock:
            whole = self._wholes.setdefault((uri, packing), _Whole())
            self._wholes.move_to_end((uri, packing))
            if len(self._wholes) > KEPT:
                self._wholes.popitem(last=False)
        with whole.lock:
            if whole.descriptor is None:
                with self._unpacked(uri, packing) as file:
                    whole.descriptor = os.dup(file.fileno())
            return FileIO(os.dup(whole.descriptor))

    def _unpacked(self, uri: str, packing: str) -> FileIO:
        container = self._fetch(uri)
        if not packing:
            return container
        with container:
            out = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - the caller closes it
            if not unpacking.unpack(packing, self._max_bytes, container, out):
                out.close()
                raise unusable()
        return out

    def close(self) -> None:
        with self._lock:
            self._wholes.clear()


def unusable() -> errors.HttpError:
    return errors.HttpError(
        reason="its container is damaged, or larger than EARMARK_FETCH__MAX_CONTAINER_BYTES"
    )


def read_slice(file: FileIO, part: Part) -> Iterator[bytes]:
    """Yield the bytes that a part names, as far as the file has them."""
    assert part.member_offset is not None
    assert part.member_bytes is not None
    at, end = part.member_offset, part.member_offset + part.member_bytes
    while block := os.pread(file.fileno(), min(BLOCK_BYTES, end - at), at):
        at += len(block)
        yield block
