"""Fetches clips for somebody who watches: each request, its answer and the file are told."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from earmark.core import formats
from earmark.core.errors import ClipError
from earmark.core.guard import Guard
from workers.fetching.breaker import Breaker
from workers.fetching.fetch import Fetcher
from workers.loading import messages

if TYPE_CHECKING:
    from collections.abc import Callable

    from urllib3 import BaseHTTPResponse

    from earmark.core.clips import Part
    from earmark.core.settings import Settings
    from workers.fetching.fetch import Fetched


class ObservedFetcher:
    """Fetches clips without the limits that workers share, and sends what it sees."""

    def __init__(self, settings: Settings, send: Callable[[bytes], None]) -> None:
        self.breaker = Breaker()
        self._send = send
        self._fetcher = Fetcher(settings.fetch, Guard(settings.fetch, self))

    def fetch(self, uri: str, part: Part | None = None) -> Fetched:
        fetched = self._fetcher.fetch(uri, part)
        try:
            kind = formats.recognise(fetched.file.fileno()).name
        except ClipError as error:
            kind = str(error)
        self._tell("fetched", fetched.source.bytes, fetched.source.sha256, kind)
        return fetched

    def close(self) -> None:
        self._fetcher.close()

    def sending(self, url: str) -> None:
        self._tell("sending", url)

    def answered(self, url: str, answer: BaseHTTPResponse) -> None:
        self._tell("answered", url, answer.status, dict(answer.headers))

    def _tell(self, step: str, *facts: Any) -> None:
        self._send(messages.SEEN + json.dumps([step, *facts]).encode())
