"""Windows are the same however a clip's samples come."""

from __future__ import annotations

import numpy as np
import pytest

from earmark.core import errors
from workers.loading.cutter import Cutter, Shape

RATE = 1000


def spans(
    seconds: float, *, window_s: float, hop_s: float | None = None, piece_s: float = 1e9
) -> list[tuple[float, float]]:
    """Cut a clip of numbers that comes in pieces; check each window's samples."""
    shape = Shape.of(RATE, window_s, hop_s, 1)
    samples = np.arange(round(seconds * RATE), dtype=np.float32)
    cutter, step, found = Cutter(shape, 10_000), round(piece_s * RATE), []
    for begin in range(0, len(samples), step):
        piece = samples[begin : begin + step]
        for _, start, window in cutter.cut(piece, last=begin + step >= len(samples)):
            assert np.array_equal(window, samples[start : start + shape.size])
            found.append(shape.span(start, len(window)))
    assert cutter.windows == len(found)
    return found


@pytest.mark.parametrize("piece_s", [1e9, 33.0, 10.0, 3.3, 0.7])
@pytest.mark.parametrize(
    ("seconds", "window_s", "hop_s", "expected"),
    [
        (25, 10, None, [(0, 10), (10, 20), (15, 25)]),  # the last one ends with the clip
        (20, 10, None, [(0, 10), (10, 20)]),  # a clip of whole windows has no extra one
        (21, 10, 5, [(0, 10), (5, 15), (10, 20), (11, 21)]),
        (40, 5, 15, [(0, 5), (15, 20), (30, 35), (35, 40)]),
        (3.5, 10, 1, [(0, 3.5)]),
    ],
)
def test_windows_do_not_depend_on_the_pieces(
    seconds: float,
    window_s: float,
    hop_s: float | None,
    piece_s: float,
    expected: list[tuple[float, float]],
) -> None:
    assert spans(seconds, window_s=window_s, hop_s=hop_s, piece_s=piece_s) == expected


def test_a_day_is_cut_in_the_memory_of_a_window_and_a_piece() -> None:
    cutter, piece = Cutter(Shape.of(RATE, 10, None, 1), 10_000), np.zeros(33 * RATE, np.float32)
    pieces, windows = 24 * 3600 // 33, 0
    for number in range(pieces):
        windows += sum(1 for _ in cutter.cut(piece, last=number == pieces - 1))
        assert len(cutter._tracks[0].kept) <= 10 * RATE
    assert windows == -(-pieces * 33 // 10)


def test_a_channel_that_ends_gives_its_last_window_once_and_keeps_nothing() -> None:
    cutter, piece = Cutter(Shape.of(RATE, 10, None, 1), 100), np.zeros(12 * RATE, np.float32)
    starts = []
    for channel, last in ((1, False), (2, False), (2, True)):
        samples = np.empty(0, np.float32) if last else piece
        found = list(cutter.cut(samples, channel, last=last, ends=channel == 1))
        starts.append([(cut.channel, cut.start) for cut in found])
        assert not len(cutter._tracks[1].kept)
    assert starts == [[(1, 0), (1, 2000)], [(2, 0)], [(2, 2000)]]


def test_too_many_windows_are_an_error_that_names_the_setting() -> None:
    cutter = Cutter(Shape.of(RATE, 10, 5, 1), 3)
    with pytest.raises(errors.TooLong, match=r"20 s \(EARMARK_AUDIO__MAX_WINDOWS"):
        list(cutter.cut(np.zeros(21 * RATE, np.float32), last=True))
