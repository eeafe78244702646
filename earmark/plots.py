"""`earmark plot`: a matplotlib figure of a clip: waveform, timeline, mel spectrogram, scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import librosa
import librosa.display
import numpy as np
from matplotlib.figure import Figure

from earmark import files, sound
from earmark.core.clips import Waveform, display_uri
from earmark.core.errors import EarmarkError, UsageError
from earmark.core.options import RunOptions
from earmark.core.settings import Settings
from earmark.in_process import classified

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from earmark.sound import Segment

ACCENT, QUIET = "#0b6e66", "#5f6368"
INCHES = (10.0, 7.5)
DPI = 120
#: Samples of the Fourier transform and between two of them, as librosa has them.
FFT, HOP, MELS = 2048, 512, 128
SEGMENT: Any = {"alpha": 0.3, "edgecolor": "white", "linewidth": 2}
SEGMENT_TEXT: Any = {"va": "center", "fontsize": 9, "clip_on": True, "parse_math": False}


def plot_clip(uri: str, settings: Settings, options: RunOptions) -> Figure:
    """Fetch and classify a clip as a worker would, and return its figure.

    Raises:
        UsageError: the clip has no result, and why.
    """
    with classified(uri, settings, options) as ended:
        try:
            success = ended.success
        except EarmarkError as error:
            raise UsageError(reason=str(error)) from error
    top = ended.named(success.predictions)
    windows: list[Segment] = []
    for window in success.windows:
        # Those of other channels would lie upon these.
        if window.channel == success.channel:
            best = ended.named(window.predictions[:1])
            windows += [(window.start_s, window.end_s, *each) for each in best]
    assert ended.waveform
    if top and not windows:
        windows = [(0.0, ended.waveform.duration_s, *top[0])]
    return figure(ended.waveform, windows, top, title=display_uri(uri).rpartition("/")[2])


def figure(
    waveform: Waveform, windows: Sequence[Segment], top: Sequence[tuple[str, float]], *, title: str
) -> Figure:
    """Return the figure of a clip.

    Args:
        waveform: mono float32 samples, shape (samples,), from -1 to 1, at its sample rate in Hz.
        windows: start and end in seconds, best label and score of each window, in order.
        top: label and score of the clip, the best first.
        title: the text above the figure.
    """
    drawn = Figure(figsize=INCHES, layout="constrained")
    grid = drawn.add_gridspec(4, 1, height_ratios=[2.2, 0.5, 3, 0.4 + 0.35 * max(1, len(top))])
    first = drawn.add_subplot(grid[0])
    timeline = drawn.add_subplot(grid[1], sharex=first)
    mel = drawn.add_subplot(grid[2], sharex=first)
    scores = drawn.add_subplot(grid[3])
    drawn.suptitle(title, parse_math=False, x=0.01, ha="left", fontsize=15, fontweight="bold")
    draw_waveform(first, waveform)
    draw_timeline(timeline, windows)
    draw_mel(mel, waveform)
    draw_top(scores, top)
    first.set_xlim(0, waveform.duration_s)
    return drawn


def draw_waveform(axes: Axes, waveform: Waveform) -> None:
    """Draw (samples,) over seconds."""
    librosa.display.waveshow(waveform.samples, sr=waveform.sample_rate, ax=axes, color=ACCENT)
    axes.set(xlabel="", ylabel="amplitude")
    _bare(axes)


def draw_mel(axes: Axes, waveform: Waveform) -> None:
    """Draw the mel spectrogram over seconds and hertz, in dB below its loudest part.

    Its shape is (MELS, 1 + samples // HOP).
    """
    rate, samples = waveform.sample_rate, waveform.samples
    power = librosa.feature.melspectrogram(
        y=samples, sr=rate, n_fft=FFT, hop_length=HOP, n_mels=MELS
    )
    level = librosa.power_to_db(power, ref=np.max)
    where: Any = {"sr": rate, "hop_length": HOP, "fmax": rate / 2}
    librosa.display.specshow(level, ax=axes, cmap="magma", x_axis="time", y_axis="mel", **where)
    axes.set(xlabel="seconds", ylabel="Hz")
    _bare(axes)


def draw_timeline(axes: Axes, windows: Sequence[Segment]) -> None:
    """Draw which label is the best when; windows of one label in a row are one bar."""
    colours: dict[str, str] = {}
    for start_s, end_s, label, score in sound.segments(windows):
        colour = colours.setdefault(label, f"C{len(colours)}")
        axes.barh(0, end_s - start_s, left=start_s, color=colour, **SEGMENT)
        axes.text(start_s, 0, f"  {label} {score:.2f}", **SEGMENT_TEXT)
    axes.set(yticks=[], ylim=(-0.4, 0.4))
    axes.axis("off")


def draw_top(axes: Axes, top: Sequence[tuple[str, float]]) -> None:
    """Draw the clip's labels as bars of their scores, the best one uppermost."""
    names, scores = [label for label, _ in top], [score for _, score in top]
    drawn = axes.barh(range(len(top)), scores, color=ACCENT, height=0.6)
    axes.bar_label(drawn, fmt="%.2f", padding=4, color=QUIET)
    axes.set_yticks(range(len(top)), names, parse_math=False)
    axes.set(xlim=(min(0.0, *scores, 0.0), max(1.0, *scores, 1.0)), xlabel="score")
    axes.invert_yaxis()
    _bare(axes)


def save(drawn: Figure, file: Path) -> None:
    """Write a figure to a PNG, SVG or PDF, as the file's suffix says."""

    kind = file.suffix.lower().lstrip(".") or "png"
    if kind not in ("png", "svg", "pdf"):
        raise UsageError(reason=f"A plot is written as .png, .svg or .pdf, not as {file.suffix}.")
    with files.whole(file) as part:
        drawn.savefig(part, format=kind, dpi=DPI)


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=QUIET, labelsize=9)
    axes.yaxis.label.set_color(QUIET)
    axes.xaxis.label.set_color(QUIET)
