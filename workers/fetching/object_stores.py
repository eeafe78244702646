"""An object store's URI in (s3, gs, hf or another of fsspec's), its bytes out in blocks."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from earmark.core import errors
from earmark.core.clips import Part

BLOCK_BYTES = 1024**2


def read(uri: str, timeout_s: float, part: Part | None = None) -> Iterator[bytes]:
    """Yield the object's bytes, opened with the credentials of the worker's environment.

    Args:
        part: a member of a container; only its bytes are read.

    Raises:
        DownloadError: the object cannot be read, or not in time.
    """
    # Imported here because most workers fetch over HTTP only.
    import fsspec

    deadline = time.monotonic() + timeout_s
    try:
        # Without a cache no more than the part is read.
        options = {"cache_type": "none"} if part else {}
        with fsspec.open(uri, "rb", **options) as file:
            left = sys.maxsize
            if part:
                file.seek(part.member_offset)
                left = part.member_bytes or 0
            while time.monotonic() < deadline:
                block = file.read(min(left, BLOCK_BYTES))
                left -= len(block)
                if not block:
                    return
                yield block
    except ImportError:
        scheme = uri.partition("://")[0]
        raise errors.BadUrl(
            reason=f"this worker has no package for {scheme}://; install earmark[stores]"
        ) from None
    except FileNotFoundError:
        raise errors.NotFound(status=404) from None
    except PermissionError:
        raise errors.Forbidden(status=403) from None
    except Exception as error:
        raise errors.Connect(reason=f"the store answered with {type(error).__name__}") from None
    raise errors.Timeout(timeout_s=timeout_s)
