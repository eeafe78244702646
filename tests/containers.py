"""Containers of sounds for tests, and a server that sends ranges of them and counts."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from typing import TYPE_CHECKING, Any

import polars as pl
from werkzeug import Request, Response

from earmark.core import settings
from producer.sources import read_clips

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pytest_httpserver import HTTPServer

    from earmark.core.clips import Clip

#: Sent at once: what a client that hangs up did not want is not counted.
BLOCK_BYTES = 64 * 1024
KINDS = ("x.tar", "x.tar.gz", "x.tar.bz2", "x.tar.xz", "x.tgz", "deflated.zip", "stored.zip")


def write(path: Path, files: Mapping[str, bytes]) -> Path:
    """Write a container of these files, of the kind that its name says."""
    if path.suffix == ".zip":
        stored = path.name.startswith("stored")
        with zipfile.ZipFile(
            path, "w", zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
        ) as z:
            for name, content in files.items():
                z.writestr(name, content)
    elif path.suffix == ".parquet":
        rows = [{"bytes": content, "path": name} for name, content in files.items()]
        pl.DataFrame({"audio": rows, "label": range(len(rows))}).write_parquet(path)
    else:
        packing = path.suffix.replace(".tgz", ".gz").lstrip(".")
        with tarfile.open(path, "w" if packing == "tar" else f"w:{packing}") as tar:  # type: ignore[call-overload]
            for name, content in files.items():
                add(tar, tarfile.TarInfo(name), content)
    return path


def add(tar: tarfile.TarFile, info: tarfile.TarInfo, content: bytes = b"") -> None:
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def webdataset(sounds: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return sounds with a file of JSON and one of text beside each."""
    files = {}
    for name, content in sounds.items():
        stem = name.partition(".")[0]
        files[f"{stem}.json"] = json.dumps({"city": "Zürich", "of": name}).encode()
        files[name] = content
        files[f"{stem}.txt"] = b"a dog barks\n"
    return files


def on(server: HTTPServer, **limits: Any) -> settings.Fetch:
    """Return settings with which a loopback server may be asked."""
    return settings.Fetch(allow_networks="127.0.0.0/8,::1", ports=(server.port,), **limits)


class Served:
    """A file on a loopback server, the ranges asked for, and the bytes sent."""

    def __init__(self, server: HTTPServer, path: Path, *, ranges: bool = True) -> None:
        self._content = path.read_bytes()
        self._ranges = ranges
        self.size = len(self._content)
        self.sent = 0
        self.requests: list[str] = []
        self.token = ""
        self.fetch = on(server)
        server.expect_request(f"/{path.name}").respond_with_handler(self._answer)
        self.url = server.url_for(f"/{path.name}")

    def clips(self) -> list[Clip]:
        """Return the clips of this container."""
        return list(read_clips([self.url], fetch=self.fetch))

    def _answer(self, request: Request) -> Response:
        asked = request.headers.get("Range", "")
        self.requests.append(asked)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return Response(status=403)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        headers = {"Accept-Ranges": "bytes"} if self._ranges else {}
        content = self._content
        if match and self._ranges:
            first, last = int(match[1]), int(match[2])
            content = self._content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{self.size}"
        headers["Content-Length"] = str(len(content))
        status = 206 if match and self._ranges else 200
        return Response(self._blocks(content), status, headers)

    def _blocks(self, content: bytes) -> Iterator[bytes]:
        for start in range(0, len(content), BLOCK_BYTES):
            block = content[start : start + BLOCK_BYTES]
            self.sent += len(block)
            yield block
