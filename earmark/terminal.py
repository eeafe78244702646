"""A person's terminal: sentences, spans of time, Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console

screen = Console(stderr=True, highlight=False)


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 row` or `2 rows`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def tell(sentence: str) -> None:
    """Print a sentence, above the progress bar if there is one."""
    screen.print(sentence, markup=False, soft_wrap=True)


def tell_all(sentences: Iterable[str]) -> None:
    """Print some sentences, a line each."""
    for sentence in sentences:
        tell(sentence)


@contextmanager
def interruptible(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Answer Ctrl-C with a sentence, then let it end what has to be ended."""
    try:
        yield
    except KeyboardInterrupt:
        with suppress(OSError):  # the terminal may be closed
            tell(how_to_go_on())
        raise


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP of a terminal that is closed, end the block as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # `nohup` has SIGHUP ignored, and it stays so.
    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        handler = signal.getsignal(number)
        if handler is not signal.SIG_IGN:
            before[number] = handler or signal.SIG_DFL
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, _: Any) -> None:
    # A shell repeats SIGHUP, which must not interrupt the end.
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def in_words(seconds: float) -> str:
    """Return a span of time to two figures that matter: 45 s, 3 min 20 s, 5 h 12 min, 3 d 4 h."""
    parts: list[str] = []
    left = round(seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= length or parts or unit == "s":
            parts.append(f"{left // length} {unit}")
            left %= length
    return " ".join(parts[:2])
