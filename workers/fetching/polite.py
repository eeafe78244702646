"""A URI in, its bytes out if its host may be asked now; otherwise how long to wait."""

from __future__ import annotations

from urllib.parse import urlsplit

from earmark.core import broker
from earmark.core.clips import Part
from earmark.core.errors import DownloadError
from earmark.core.settings import Settings
from workers.fetching.breaker import NETWORK_CODES, Breaker
from workers.fetching.fetch import Fetched, Fetcher
from workers.fetching.host_limits import HostLimits

#: A clip is put off by this while the network is down: rarely enough, and soon after it is back.
OFFLINE_S = 10.0


class HostBusyError(Exception):
    """The host must not be asked for `wait_s` seconds."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(wait_s)
        self.wait_s = wait_s


class PoliteFetcher:
    """Fetches clips, keeps the limits per host, and notices when the network itself is down.

    Use one per worker process, shared by its threads, and close it. It needs the broker's Redis,
    where the workers share their limits.
    """

    def __init__(self, settings: Settings) -> None:
        self.breaker = Breaker()
        self._fetcher = Fetcher(settings.fetch)
        self._host_limits = HostLimits(broker.client(), settings.fetch, settings.ledger)

    def fetch(self, uri: str, part: Part | None = None) -> Fetched:
        """Return the clip's bytes in an open file; of a container, those of a member.

        Raises:
            DownloadError: the clip cannot be fetched.
            HostBusyError: the host must not be asked yet, or the network is down.
        """
        host = _host(uri)
        return self._fetch(host, uri, part) if host else self._fetcher.fetch(uri, part)

    def close(self) -> None:
        self._fetcher.close()

    def _fetch(self, host: str, uri: str, part: Part | None) -> Fetched:
        if wait_s := self._host_limits.wait_s(host):
            raise HostBusyError(wait_s)
        try:
            fetched = self._fetcher.fetch(uri, part)
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
    if "://" not in uri:
        return ""
    try:
        return urlsplit(uri).netloc.rpartition("@")[2].lower()
    except ValueError:
        return ""
