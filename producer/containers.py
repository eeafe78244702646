"""A container in (tar, ZIP, Parquet with sounds), its members as clips out."""

from __future__ import annotations

import io
import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from io import FileIO
from pathlib import PurePosixPath
from typing import Any, cast

from earmark.core import unpacking
from earmark.core.clips import Clip, Part, display_uri
from earmark.core.container_child import PACKINGS
from earmark.core.errors import UsageError
from earmark.core.settings import Fetch
from earmark.core.spelling import storable
from producer import elsewhere
from producer.clip_uris import AUDIO_SUFFIXES
from producer.elsewhere import Ranged
from producer.list_formats import named_format
from producer.streams import COMPRESSED
from producer.tally import Tally

KINDS = {".tar": "tar", ".tgz": "tar", ".tbz2": "tar", ".txz": "tar", ".zip": "zip"}
#: The longest line about a member: its name, and the files beside it.
MAX_LINE_BYTES = 1024**2
MAX_FOOTER_BYTES = 64 * 1024**2
#: A Parquet file ends with the length of its footer and four letters.
FOOTER_END = 8


def kind_of(place: str, fetch: Fetch, column: str | None = None) -> str | None:
    """Return the kind of a container by its name; a Parquet file is one if it holds sounds."""
    name = display_uri(place)
    if named_format(name) == "parquet":
        return _sound_column(place, fetch, column)
    path = PurePosixPath(name.lower())
    if path.suffix in COMPRESSED:
        path = path.with_suffix("")
        return "tar" if path.suffix == ".tar" else None
    return KINDS.get(path.suffix)


class Container:
    """Reads one container in a process of its own. Use one per container, and iterate `clips`."""

    def __init__(self, place: str, kind: str, tally: Tally, fetch: Fetch) -> None:
        self._place = place
        self._shown = display_uri(place)
        self._kind = kind
        self._tally = tally
        self._fetch = fetch
        self._number = 0
        #: Of a remote container that is read by ranges: our end of the socket.
        self._remote: tuple[Ranged, socket.socket] | None = None

    def clips(self, uri: str) -> Iterator[Clip]:
        """Yield each sound of the container as a clip of this URI, with its member and place.

        A member that cannot be used goes into the tally.

        Raises:
            UsageError: the container cannot be opened.
        """
        with ExitStack() as files:
            try:
                container, size = self._opened(files)
            except Exception as error:
                # File systems of fsspec raise any exception of their libraries.
                why = elsewhere.why(self._place, error)
                reason = f"The container {self._shown} cannot be read: {why}."
                raise UsageError(reason=reason) from None
            process = files.enter_context(unpacking.index(self._kind, size, container))
            files.callback(process.kill)
            assert process.stdout is not None
            while line := process.stdout.readline(MAX_LINE_BYTES):
                told = json.loads(line)
                if "read" in told:
                    self._answer(*told["read"])
                elif "broken" in told:
                    self._number += 1
                    self._refuse(f"the container breaks off here: {told['broken']}")
                elif clip := self._clip(uri, told):
                    yield clip
            self._tally.lines += self._number
        if process.wait() not in (0, 1):
            raise UsageError(reason=f"The container {self._shown} broke the process that reads it.")

    def _opened(self, files: ExitStack) -> tuple[FileIO | socket.socket, int]:
        if "://" not in self._place:
            return files.enter_context(FileIO(self._place)), 0
        if not self._kind.startswith("parquet"):
            remote = files.enter_context(elsewhere.ranges(self._place, self._fetch))
            # A compressed one has to be read as a whole.
            if remote and not remote.head.startswith(tuple(PACKINGS)):
                ours, theirs = socket.socketpair()
                self._remote = remote, files.enter_context(ours)
                return files.enter_context(theirs), remote.size
        copy = files.enter_context(elsewhere.copied(self._place, self._fetch))
        return cast("FileIO", copy), 0

    def _answer(self, start: int, size: int) -> None:
        assert self._remote
        remote, to = self._remote
        try:
            data = remote.read(start, size)
        except Exception as error:
            self._number += 1
            why = elsewhere.why(self._place, error)
            self._refuse(f"the container cannot be read any more: {why}")
            data = b""
        if len(data) == size:
            to.sendall(data)
        else:
            to.shutdown(socket.SHUT_RDWR)

    def _clip(self, uri: str, told: dict[str, Any]) -> Clip | None:
        self._number += 1
        parts = re.split(r"[/\\]", told["member"])
        name = storable(told["member"])
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

    def _refuse(self, reason: str) -> None:
        self._tally.refuse(self._shown, self._number, reason)


def _sound_column(place: str, fetch: Fetch, named: str | None) -> str | None:
    """Return `parquet:` and the column of a Parquet file that holds sounds as bytes, if it does."""
    import polars as pl

    try:
        footer = _footer(place, fetch) if "://" in place else place
        schema = pl.scan_parquet(footer, glob=False).collect_schema()
    except Exception:
        return None
    for name in (named, "audio"):
        kind = schema.get(name or "")
        if isinstance(kind, pl.Struct) and kind.to_schema().get("bytes") == pl.Binary:
            return f"parquet:{name}"
    return None


def _footer(url: str, fetch: Fetch) -> io.BytesIO:
    """Return the end of a remote Parquet file, which has its columns, as a file without rows."""
    with elsewhere.ranges(url, fetch) as remote:
        if remote is None:
            return io.BytesIO()
        end = remote.read(remote.size - FOOTER_END, FOOTER_END)
        size = min(int.from_bytes(end[:4], "little"), MAX_FOOTER_BYTES)
        return io.BytesIO(b"PAR1" + remote.read(remote.size - FOOTER_END - size, size) + end)
