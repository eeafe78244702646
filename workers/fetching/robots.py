"""The rules of sites' robots.txt files, which each worker process reads for itself."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.robotparser import RobotFileParser

from earmark.core import errors

ROBOTS_KEPT_S = 3600.0
#: Crawlers read at least this much of the file (RFC 9309, section 2.5); we read no more.
ROBOTS_BYTES = 500 * 1024
#: The most sites remembered.
SITES = 1000


class RobotsRules:
    """Reads each site's robots.txt once an hour; one per worker process, shared by its threads."""

    def __init__(self, download: Callable[[str], BinaryIO]) -> None:
        """Take a function that downloads a URL to an open file, or raises a DownloadError."""
        self._download = download
        self._rules: dict[str, tuple[float, RobotFileParser]] = {}
        #: One thread asks a site, and the others wait for the answer.
        self._asking: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def check(self, url: str) -> None:
        """Check a URL against its site's rules.

        Raises:
            Robots: the site asks not to fetch this URL.
            DownloadError: robots.txt cannot be read for now; it is asked for again next time.
        """
        site = "{0.scheme}://{0.netloc}".format(urlsplit(url))
        with self._asking[site]:
            rules = self._current(site)
        if not rules.can_fetch("Earmark", url):
            raise errors.Robots

    def _current(self, site: str) -> RobotFileParser:
        asked_at, rules = self._rules.get(site, (0.0, None))
        if rules is None or time.monotonic() - asked_at > ROBOTS_KEPT_S:
            rules = self._read(site)
            if len(self._rules) >= SITES:
                self._rules.clear()
                self._asking.clear()
            self._rules[site] = time.monotonic(), rules
        return rules

    def _read(self, site: str) -> RobotFileParser:
        rules = RobotFileParser()
        lines: list[str] = []
        try:
            with self._download(f"{site}/robots.txt") as file:
                lines = file.read(ROBOTS_BYTES).decode(errors="replace").splitlines()
        except errors.DownloadError as error:
            if error.transient:
                raise
        rules.parse(lines)
        return rules
