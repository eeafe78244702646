"""The program that reads a container: a tar, ZIP or Parquet in, its members or their bytes out.

It runs in a process of its own, without credentials and with limits, for hostile files. The
container is its standard input: the open file, or a socket on which it asks for the bytes of a
remote one.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import resource
import shutil
import socket
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple, cast

from earmark.core import processes

CONTAINER = 0
#: The longest description of a member, such as a WebDataset's JSON.
MAX_SIDE_BYTES = 64 * 1024
#: Fetched at once of a remote container: a tar's header and the byte before it, in one request.
ASKED_BYTES = 1024
#: Rows of a Parquet file in memory at once.
ROWS_AT_ONCE = 100
SIDES = (".json", ".txt", ".cls")
PACKINGS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
#: Address space; a Parquet reader maps more than it uses.
MEMORY_BYTES = 4 * 1024**3
CPU_S = 3600
#: Raised for a container that is damaged, or hostile.
BROKEN = (
    OSError, EOFError, ValueError, RuntimeError, MemoryError, tarfile.TarError, zipfile.BadZipFile,
    lzma.LZMAError, struct.error, zlib.error,
)  # fmt: skip


class Member(NamedTuple):
    """A regular file in a container, and where its bytes lie."""

    name: str
    start: int
    size: int
    #: How these bytes are packed: `deflate`, or empty for not at all.
    packing: str = ""
    #: The content of a small file that may describe its neighbours.
    side: bytes | None = None
    refused: str = ""


def main() -> None:
    """Do the work that the command line names: `index KIND` or `unpack PACKING MOST_BYTES`."""
    work, kind, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # Nothing can be imported once no file can be opened.
    zstd()
    codecs.lookup("cp437")  # names in a ZIP
    confine(most if work == "unpack" else 0, opens=kind.startswith("parquet"))
    try:
        if work == "unpack":
            unpack(kind)
        else:
            index(kind, most)
    except BROKEN as error:
        tell({"broken": str(error)[:200] or type(error).__name__})
        sys.exit(1)


def confine(most_written: int, *, opens: bool) -> None:
    """Give up, for good, every right that reading a container does not need."""
    processes.limit(resource.RLIMIT_CORE, 0)
    processes.limit(resource.RLIMIT_FSIZE, most_written)
    processes.limit(resource.RLIMIT_CPU, CPU_S)
    if sys.platform == "linux":  # other systems refuse RLIMIT_AS
        processes.limit(resource.RLIMIT_AS, MEMORY_BYTES)
    if not opens:
        processes.limit(resource.RLIMIT_NOFILE, 3)


def tell(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


# index --------------------------------------------------------------------------------------------


def index(kind: str, size: int) -> None:
    """Tell each member of a container on a line, with its description as `meta`."""
    if kind.startswith("parquet:"):
        for member, meta in parquet_rows(kind.partition(":")[2]):
            _tell_member(member, meta)
        return
    stream = opened(size)
    group: list[Member] = []
    try:
        for member in zip_members(stream) if kind == "zip" else tar_members(stream):
            if group and _stem(member.name) != _stem(group[0].name):
                _tell_group(group)
                group = []
            group.append(member)
    finally:  # members before a damage are told too
        _tell_group(group)


def _tell_group(members: list[Member]) -> None:
    meta = described(members)
    for member in members:
        if member.side is None:
            _tell_member(member, meta)


def _tell_member(member: Member, meta: dict[str, Any]) -> None:
    line = {"member": member.name, "place": member[1:4], "meta": meta, "refused": member.refused}
    tell(line)


def opened(size: int) -> io.BufferedReader:
    """Return the container as a stream of bytes that can seek."""
    if not stat.S_ISSOCK(os.fstat(CONTAINER).st_mode):
        return open(CONTAINER, "rb", closefd=False)
    return io.BufferedReader(_Asked(size), ASKED_BYTES)


class _Asked(io.RawIOBase):
    """A remote container, whose bytes the parent sends when asked."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._at = 0
        self._parent = socket.socket(fileno=CONTAINER)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        if count:
            tell({"read": [self._at, count]})
            if self._parent.recv_into(buffer, count, socket.MSG_WAITALL) < count:
                raise EOFError("the container cannot be read any more")
        self._at += count
        return count


def tar_members(stream: io.BufferedReader) -> Iterator[Member]:
    """Yield the regular files of a tar, compressed or not."""
    packing = packing_of(stream)
    plain = cast("Any", unpacked(stream, packing))
    with cast("Any", tarfile.open(fileobj=plain, mode="r:")) as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # it would keep all
            if info.issparse():
                yield Member(info.name, 0, 0, refused="it is a sparse file")
            elif info.isreg():
                side = None
                if _describes(info.name, info.size):
                    plain.seek(info.offset_data)
                    side = plain.read(info.size)
                yield Member(info.name, info.offset_data, info.size, packing, side)
        plain.seek(tar.offset)
        if plain.read(512).strip(b"\0"):
            raise ValueError(f"there is no header at byte {tar.offset}")


def _describes(name: str, size: int) -> bool:
    """Return whether a file may describe the sound beside it."""
    return name.lower().endswith(SIDES) and size <= MAX_SIDE_BYTES


def zip_members(stream: io.BufferedReader) -> Iterator[Member]:
    """Yield the files of a ZIP in the order in which they lie there."""
    with zipfile.ZipFile(stream) as archive:
        end = 0
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
                continue
            if info.header_offset < end:
                yield Member(info.filename, 0, 0, refused="it overlaps another, as bombs do")
                continue
            stream.seek(info.header_offset)
            name_bytes, extra_bytes = struct.unpack("<26x2H", stream.read(30))
            start = info.header_offset + 30 + name_bytes + extra_bytes
            end = start + info.compress_size
            packing = {zipfile.ZIP_STORED: "", zipfile.ZIP_DEFLATED: "deflate"}
            if info.flag_bits & 1 or info.compress_type not in packing:
                yield Member(info.filename, 0, 0, refused="it is encrypted, or packed unusually")
                continue
            side = archive.read(info) if _describes(info.filename, info.file_size) else None
            place = start, info.compress_size
            yield Member(info.filename, *place, packing[info.compress_type], side)


def described(members: list[Member]) -> dict[str, Any]:
    """Return what the small files beside a sound say of it."""
    meta: dict[str, Any] = {}
    for member in members:
        if member.side is None:
            continue
        text = member.side.decode("utf-8", "replace")
        suffix = member.name.rpartition(".")[2].lower()
        try:
            value = json.loads(text) if suffix == "json" else text.strip()
        except (ValueError, RecursionError):
            value = text
        meta |= value if isinstance(value, dict) else {suffix: value}
    return meta


def _stem(name: str) -> str:
    """Return a name up to the first dot of its last part, as WebDataset groups files."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def parquet_rows(column: str) -> Iterator[tuple[Member, dict[str, Any]]]:
    """Yield the sounds of a Parquet file; their bytes lie one behind the other once unpacked."""
    import polars as pl

    frame = pl.scan_parquet(f"/dev/fd/{CONTAINER}", glob=False)
    sound = pl.col(column).struct
    others = [name for name in frame.collect_schema().names() if name != column]
    size, path = sound.field("bytes").bin.size(), sound.field("path")
    names: set[str] = set()
    start = number = 0
    for piece in _pieces(frame.select(size.alias("\0size"), path.alias("\0path"), *others)):
        for row in piece.iter_rows(named=True):
            length = row.pop("\0size") or 0
            name = row.pop("\0path") or f"row {number}"
            if name in names:
                name = f"{name} (row {number})"
            names.add(name)
            refused = "" if length else "there are no bytes in it"
            member = Member(name, start, length, f"parquet:{column}", refused=refused)
            yield member, json.loads(json.dumps(row, default=str))
            start += length
            number += 1


def _pieces(frame: Any) -> Iterator[Any]:
    start = 0
    while len(piece := frame.slice(start, ROWS_AT_ONCE).collect()):
        yield piece
        start += ROWS_AT_ONCE


# unpack -------------------------------------------------------------------------------------------


def unpack(packing: str) -> None:
    """Write a container's bytes unpacked to standard output, which is a file."""
    with open(1, "wb", closefd=False) as out:
        if not packing.startswith("parquet:"):
            shutil.copyfileobj(unpacked(opened(0), packing), out)
            return
        import polars as pl

        sound = pl.col(packing.partition(":")[2]).struct.field("bytes")
        frame = pl.scan_parquet(f"/dev/fd/{CONTAINER}", glob=False).select(sound)
        for piece in _pieces(frame):
            out.writelines(value for value in piece.to_series() if value)


def packing_of(stream: io.BufferedReader) -> str:
    """Return the name of a stream's compression by its first bytes; empty if it has none."""
    head = stream.peek(6)
    for magic, name in PACKINGS.items():
        if head.startswith(magic):
            return name
    return ""


def unpacked(stream: io.BufferedReader, packing: str) -> Any:
    """Return a stream of the bytes before compression."""
    openers = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open, "zstd": zstd().open}
    return openers[packing](stream) if packing else stream


def zstd() -> Any:
    return import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


if __name__ == "__main__":
    main()
