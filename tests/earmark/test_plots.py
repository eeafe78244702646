"""The picture of a clip: four drawings on one clock, written as PNG or SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from earmark.core.clips import Waveform
from earmark.core.errors import UsageError
from tests.end_to_end.conftest import Earmark

if TYPE_CHECKING:
    from pathlib import Path

    from tests.faults.nursery import Nursery


@pytest.mark.slow
def test_a_clip_is_drawn_over_its_seconds() -> None:
    from earmark import plots

    waveform = Waveform(np.sin(np.arange(32_000) / 5).astype(np.float32), 16_000)
    windows = [(0.0, 1.0, "a $1", 0.9), (0.5, 1.5, "a $1", 0.95), (1.0, 2.0, "siren", 0.8)]
    drawn = plots.figure(waveform, windows, [("a $1", 0.6), ("siren", 0.4)], title="clip $x$")
    sound, timeline, mel, top = drawn.axes
    assert sound.get_xlim() == mel.get_xlim() == (0, 2)
    assert [text.get_text().strip() for text in timeline.texts] == ["a $1 0.95", "siren 0.80"]
    assert [bar.get_width() for bar in timeline.patches] == [1.0, 1.0]
    assert [label.get_text() for label in top.get_yticklabels()] == ["a $1", "siren"]
    drawn.draw_without_rendering()


@pytest.mark.slow
def test_plot_writes_what_the_suffix_says_and_names_what_it_hears(
    tmp_path: Path, nursery: Nursery
) -> None:
    from earmark.demo import EXAMPLES

    earmark = Earmark({}, tmp_path, nursery)
    earmark("plot", str(EXAMPLES / "mixed.m4a"), "--window-s", "5", "-o", "mixed.svg")
    picture = (tmp_path / "mixed.svg").read_text()
    assert picture.startswith("<?xml")
    assert "speech 0.9" in picture
    assert "siren 0.9" in picture


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from earmark import plots

    with pytest.raises(UsageError, match=r"not as \.gif"):
        plots.save(Figure(), tmp_path / "a.gif")
    plots.save(Figure(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
