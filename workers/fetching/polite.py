"""A URI in, its bytes out, when its host may be asked; else how long to leave the host alone."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from earmark.core import broker
from earmark.core.errors import DownloadError
from workers.fetching.breaker import NETWORK_CODES, Breaker
from workers.fetching.fetch import Fetcher
from workers.fetching.host_limits import HostLimits

if TYPE_CHECKING:
    from earmark.core.settings import Settings
    from workers.fetching.fetch import Fetched

#: While the network is down: long enough not to circle, short enough to go on soon after.
OFFLINE_S = 10.0


class HostBusyError(Exception):
    """The host is to be left alone for `wait_s` seconds."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(wait_s)
        self.wait_s = wait_s


class PoliteFetcher:
    """Fetches with limits, and notices when the network itself is down."""

    def __init__(self, settings: Settings) -> None:
        self.breaker = Breaker()
        self._fetcher = Fetcher(settings.fetch)
        self._host_limits = HostLimits(broker.client(), settings.fetch, settings.ledger)

    def fetch(self, uri: str) -> Fetched:
        """Return the clip's bytes.

        Raises:
            DownloadError: they cannot be had.
            HostBusyError: not now, and the host was not asked; or the network is down, and the clip is not to blame.
        """
        host = _host(uri)
        return self._fetch(host, uri) if host else self._fetcher.fetch(uri)

    def close(self) -> None:
        self._fetcher.close()

    def _fetch(self, host: str, uri: str) -> Fetched:
        if wait_s := self._host_limits.wait_s(host):
            raise HostBusyError(wait_s)
        try:
            fetched = self._fetcher.fetch(uri)
        except DownloadError as error:
            self._learn(host, error)
            raise
        finally:
            self._host_limits.done(host)
        self.breaker.record(host, None)
        return fetched

    def _learn(self, host: str, error: DownloadError) -> None:
        self.breaker.record(host, error)
        if after_s := error.facts.get("retry_after_s"):
            self._host_limits.block(host, after_s)
        if self.breaker.open and error.code in NETWORK_CODES:
            raise HostBusyError(OFFLINE_S) from error


def _host(uri: str) -> str:
    try:
        return urlsplit(uri).netloc.rpartition("@")[2].lower() if "://" in uri else ""
    except ValueError:
        return ""
