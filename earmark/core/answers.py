"""An HTTP answer in; its state checked, its declared length and its bytes out."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError

from earmark.core import errors

BLOCK_BYTES = 64 * 1024
#: Too slow, too early, not ready yet: states that pass.
PASSING = (202, 408, 425)
COMPRESSIONS = frozenset(["gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd"])
GZIP = (["gzip"], ["x-gzip"])
SECONDS = re.compile(r"[0-9]{1,9}")


def check_status(answer: BaseHTTPResponse) -> None:
    status = answer.status
    if status in (404, 410):
        raise errors.NotFound(status=status)
    if status in (401, 403):
        raise errors.Forbidden(status=status)
    if status == 429:
        raise errors.RateLimited(retry_after_s=_retry_after_s(answer))
    if status >= 500 or status in PASSING:
        raise errors.ServerError(status=status, retry_after_s=_retry_after_s(answer))
    if status not in (200, 203):
        raise errors.HttpError(reason=f"HTTP {status}")


def _retry_after_s(answer: BaseHTTPResponse) -> float | None:
    text = answer.headers.get("Retry-After", "").strip()
    if SECONDS.fullmatch(text):
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def declared_bytes(answer: BaseHTTPResponse) -> int | None:
    transfer = answer.headers.get("Transfer-Encoding", "").strip().lower()
    length = answer.headers.get("Content-Length")
    if transfer not in ("", "chunked"):
        raise errors.HttpError(reason="its Transfer-Encoding is unknown")
    if transfer or length is None:
        return None
    if not (length.isascii() and length.isdigit()):
        raise errors.HttpError(reason="its Content-Length is not a number")
    return int(length)


def received(answer: BaseHTTPResponse, declared: int | None) -> Iterator[bytes]:
    received = 0
    with suppress(HTTPError, http.client.HTTPException, OSError, ValueError):
        while block := answer.read(BLOCK_BYTES, decode_content=False):
            received += len(block)
            yield block
        return
    total = "an unknown number" if declared is None else str(declared)
    raise errors.Incomplete(received=received, declared=total)


def is_gzip(answer: BaseHTTPResponse) -> bool:
    """Return whether to unpack the body. A coding that does not compress leaves its bytes alone."""
    names = answer.headers.get("Content-Encoding", "").lower().split(",")
    used = [name.strip() for name in names if name.strip() in COMPRESSIONS]
    if used and used not in GZIP:
        raise errors.HttpError(reason=f"it is compressed with {', '.join(used)}, unasked")
    return bool(used)


def check_range(answer: BaseHTTPResponse, first: int, last: int) -> None:
    if answer.status != 206:
        check_status(answer)
    expected = f"bytes {first}-{last}/"
    if is_gzip(answer) or not answer.headers.get("Content-Range", "").startswith(expected):
        raise errors.HttpError(reason="it sent another range than the one asked for")


def body(answer: BaseHTTPResponse, length: int) -> bytes:
    """Return the whole body, which has to be of this length."""
    return b"".join(exactly(received(answer, length), length))


def exactly(blocks: Iterable[bytes], length: int) -> Iterator[bytes]:
    received = 0
    for block in blocks:
        received += len(block)
        if received > length:
            break
        yield block
    if received != length:
        raise errors.Incomplete(received=received, declared=str(length))
