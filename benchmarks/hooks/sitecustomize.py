"""Gives threads their Python names in the system's account; Python itself does so from 3.14 on."""

import ctypes
import sys
import threading
from typing import Any

PR_SET_NAME = 15


def name_threads() -> None:
    libc = ctypes.CDLL(None)
    begin: Any = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def begin_named(thread: threading.Thread) -> None:
        # A thread without a name has that of its function: `Thread-3 (feed)`.
        name = thread.name.partition("(")[2].rstrip(")") or thread.name
        libc.prctl(PR_SET_NAME, name.encode()[:15])
        begin(thread)

    threading.Thread._bootstrap_inner = begin_named  # type: ignore[attr-defined]


if sys.platform == "linux":
    name_threads()
