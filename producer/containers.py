"""A container in (tar, ZIP, Parquet with sounds), its members as clips out."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import tempfile
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from earmark.core import unpacking
from earmark.core.clips import Clip, Part, display_uri
from earmark.core.containers import PACKINGS
from earmark.core.errors import UsageError
from producer.lists import named_format
from producer.places import AUDIO_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from producer.tally import Tally

KINDS = {".tar": "tar", ".tgz": "tar", ".tbz2": "tar", ".txz": "tar", ".zip": "zip"}
COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst"})
#: The longest line about a member: its name, and the files beside it.
MAX_LINE_BYTES = 1024**2
MAX_FOOTER_BYTES = 64 * 1024**2


def kind_of(place: str, column: str | None = None) -> str | None:
    """Return the kind of a container by its name; a Parquet file is one if it holds sounds."""
    name = display_uri(place)
    if named_format(name) == "parquet":
        return _sound_column(place, column)
    path = PurePosixPath(name.lower())
    if path.suffix in COMPRESSED:
        path = path.with_suffix("")
        return "tar" if path.suffix == ".tar" else None
    return KINDS.get(path.suffix)


class Container:
    """Reads one container in a process of its own. Use one per container, and iterate `clips`."""

    def __init__(self, place: str, kind: str, tally: Tally) -> None:
        self._place = place
        self._shown = display_uri(place)
        self._kind = kind
        self._tally = tally
        self._number = 0

    def clips(self, uri: str) -> Iterator[Clip]:
        """Yield each sound of the container as a clip of this URI, with its member and place.

        A member that cannot be used goes into the tally.

        Raises:
            UsageError: the container cannot be opened.
        """
        with ExitStack() as files:
            try:
                container, size, remote = self._opened(files)
            except Exception as error:
                # fsspec's file systems raise any exception of their libraries.
                reason = f"The container {self._shown} cannot be read: {self._reason(error)}."
                raise UsageError(reason=reason) from None
            process = files.enter_context(unpacking.index(self._kind, size, container))
            files.callback(process.kill)
            assert process.stdout is not None
            while line := process.stdout.readline(MAX_LINE_BYTES):
                told = json.loads(line)
                if "read" in told:
                    assert remote
                    self._answer(remote, *told["read"])
                elif "broken" in told:
                    self._number += 1
                    self._refuse(f"the container breaks off here: {told['broken']}")
                elif clip := self._clip(uri, told):
                    yield clip
            self._tally.lines += self._number
        if process.wait() not in (0, 1):
            raise UsageError(reason=f"The container {self._shown} broke the process that reads it.")

    def _opened(self, files: ExitStack) -> tuple[Any, int, _Remote | None]:
        if "://" not in self._place:
            return files.enter_context(FileIO(self._place)), 0, None
        remote = _Remote(self._place, files)
        if self._kind.startswith("parquet") or not remote.has_ranges():
            return files.enter_context(_copied(self._place)), 0, None
        ours, theirs = socket.socketpair()
        remote.to = files.enter_context(ours)
        return files.enter_context(theirs), remote.size, remote

    def _answer(self, remote: _Remote, start: int, size: int) -> None:
        try:
            data = remote.read(start, size)
        except Exception as error:
            self._number += 1
            self._refuse(f"the container cannot be read any more: {self._reason(error)}")
            data = b""
        assert remote.to
        if len(data) == size:
            remote.to.sendall(data)
        else:
            remote.to.shutdown(socket.SHUT_RDWR)

    def _clip(self, uri: str, told: dict[str, Any]) -> Clip | None:
        self._number += 1
        parts = re.split(r"[/\\]", told["member"])
        # Databases store neither NUL nor half a surrogate pair as text.
        name = told["member"].replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()
        if told["refused"]:
            self._refuse(f"{name!r} is left out: {told['refused']}")
        elif not parts[0] or ".." in parts:
            self._refuse(f"the name {name!r} leads out of the container")
        elif not self._is_sound(name, parts):
            self._tally.not_audio += 1
        else:
            self._tally.clips += 1
            return Clip(uri, told["meta"], Part(None, None, name, *told["place"]))
        return None

    def _is_sound(self, name: str, parts: list[str]) -> bool:
        if self._kind.startswith("parquet"):
            return True
        hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
        return not hidden and PurePosixPath(name).suffix.lower() in AUDIO_SUFFIXES

    def _reason(self, error: Exception) -> str:
        if isinstance(error, FileNotFoundError):
            return "there is no such file"
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if "://" in self._place:  # such a text may quote the URL with its signature
            return type(error).__name__
        return str(error).partition("\n")[0]

    def _refuse(self, reason: str) -> None:
        self._tally.refuse(self._shown, self._number, reason)


class _Remote:
    """A file elsewhere, read with fsspec, a range at a time if its server sends ranges."""

    def __init__(self, url: str, files: ExitStack) -> None:
        import fsspec

        filesystem, path = fsspec.url_to_fs(url)
        # Without a cache no byte is read that nobody asks for.
        self._file = files.enter_context(filesystem.open(path, "rb", cache_type="none"))
        self.size = self._file.size
        self.to: socket.socket | None = None

    def has_ranges(self) -> bool:
        """Return whether to read it by ranges; a compressed one has to be read as a whole."""
        with suppress(Exception):
            # A server without ranges answers with everything, and is not listened to.
            ends = len(self.read(self.size - 1, 1)) == 1
            return ends and not self.read(0, 6).startswith(tuple(PACKINGS))
        return False

    def read(self, start: int, size: int) -> bytes:
        self._file.seek(start)
        return bytes(self._file.read(size))


def _copied(url: str) -> BinaryIO:
    import fsspec

    copy = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    # Not the file that reads ranges: this one is a stream.
    with fsspec.open(url, "rb", **({"block_size": 0} if url.startswith("http") else {})) as file:
        shutil.copyfileobj(file, copy)
    copy.seek(0)
    return copy


def _sound_column(place: str, named: str | None) -> str | None:
    """Return `parquet:` and the column of a Parquet file that holds sounds as bytes, if it does."""
    import polars as pl

    try:
        footer = _footer(place) if "://" in place else place
        schema = pl.scan_parquet(footer, glob=False).collect_schema()
    except Exception:
        return None
    for name in (named, "audio"):
        kind = schema.get(name or "")
        if isinstance(kind, pl.Struct) and kind.to_schema().get("bytes") == pl.Binary:
            return f"parquet:{name}"
    return None


def _footer(url: str) -> io.BytesIO:
    """Return the end of a remote Parquet file, which has its columns, as a file without rows."""
    import fsspec

    with fsspec.open(url, "rb", cache_type="none") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - min(length, MAX_FOOTER_BYTES), os.SEEK_END)
        return io.BytesIO(b"PAR1" + file.read())
