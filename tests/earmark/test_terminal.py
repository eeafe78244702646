"""A person's terminal: Ctrl-C, and spans of time in words."""

from __future__ import annotations

import signal

import pytest

from earmark import terminal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_block_as_ctrl_c_does_and_once_only(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), terminal.terminable():
        _raise_twice(number)
    assert signal.getsignal(number) is before


def _raise_twice(number: signal.Signals) -> None:
    try:
        signal.raise_signal(number)
    finally:
        signal.raise_signal(number)


def test_nohup_is_obeyed() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminal.terminable():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (45, "45 s"), (3600, "1 h 0 min"), (200.4, "3 min 20 s"), (273_601, "3 d 4 h")],
)
def test_a_span_of_time_is_told_to_what_matters(seconds: float, words: str) -> None:
    assert terminal.in_words(seconds) == words
