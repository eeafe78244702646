"""Text for people and databases, and the name that somebody may have meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def printable(text: str, instead: str = "?") -> str:
    """Return a text without control characters: a server's words must not steer the terminal."""
    return "".join(char if char.isprintable() else instead for char in text)


def storable(text: str) -> str:
    """Return a text as databases take it: without NUL and half a surrogate pair."""
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return a question such as ` Did you mean siren?`, or nothing if no known name is close."""
    close = get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {close[0]}?" if close else ""
