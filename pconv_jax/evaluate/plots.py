"""Plots of the report, as SVG files that do not depend on when they were drawn."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pconv_jax.evaluate.bootstrap import Interval

_COLORS = (
    "#2a78d6", "#e8623a", "#159a6c", "#d99a00",
    "#c657a0", "#6a51c9", "#5b8c1f", "#8c6d4f",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D")
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
_INK = "#7a8087"  # Text and grid; readable on white and on dark pages.

Dash = str | tuple[int, tuple[float, ...]]


class LineStyle(NamedTuple):
    """The look of a method's line."""

    color: str
    marker: str
    dash: Dash


def line_style(number: int) -> LineStyle:
    """Get the style of the line with this number; the first 24 are different."""
    turn, color = divmod(number, len(_COLORS))
    return LineStyle(
        _COLORS[color],
        _MARKERS[number % len(_MARKERS)],
        _DASHES[turn % len(_DASHES)],
    )


def plot_intervals(
    lines: Mapping[str, Sequence[Interval | None]],
    styles: Mapping[str, LineStyle],
    *,
    ticks: Sequence[str],
    joined: int,
    xlabel: str,
) -> bytes | None:
    """Plot means with their intervals as error bars, one line for each method.

    Args:
      lines: The intervals of each method, one for each tick; None where there is none.
      styles: The style of each method.
      ticks: Labels of the horizontal axis.
      joined: Number of the first ticks whose values a line joins.
      xlabel: Title of the horizontal axis.

    Returns:
      An SVG file, or None if there is no value.
    """
    figure = Figure(figsize=(4.4, 2.7), layout="constrained")
    axes = figure.add_subplot()
    is_empty = True
    # Lines are shifted a little, so that their error bars do not overlap.
    spread = min(0.06, 0.5 / max(len(lines), 1))
    for number, (method, line) in enumerate(lines.items()):
        shift = (number - (len(lines) - 1) / 2) * spread
        points = [
            (x + shift, interval)
            for x, interval in enumerate(line)
            if interval and math.isfinite(interval.mean)
        ]
        first = [point for point in points if point[0] < joined - 0.5]
        for part in (first, *([point] for point in points[len(first) :])):
            if part:
                is_empty = False
                _draw_line(axes, part, styles[method])
    if is_empty:
        return None
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlim(-0.5, len(ticks) - 0.5)
    axes.set_xlabel(xlabel)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    _make_plain(axes)
    return to_svg(figure)


def draw_key(style: LineStyle) -> bytes:
    """Draw a short piece of a line, for legends, as an SVG file."""
    figure = Figure(figsize=(0.3, 0.16))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set_xlim(0, 2)
    axes.plot(
        [0.1, 1, 1.9],
        [0, 0, 0],
        color=style.color,
        linestyle=style.dash,
        marker=style.marker,
        markevery=[1],
        markersize=5.5,
        linewidth=1.8,
    )
    return to_svg(figure)


def to_svg(figure: Figure, *, transparent: bool = True) -> bytes:
    """Save a figure as an SVG file.

    Equal figures give equal bytes: the file has neither a date nor random ids.

    Args:
      figure: The figure.
      transparent: Whether the background is transparent (the default).
    """
    file = io.BytesIO()
    # Text stays text. Without a salt, element ids would be random.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pconv_jax"}):
        figure.savefig(
            file, format="svg", transparent=transparent, metadata={"Date": None}
        )
    return file.getvalue()


def _draw_line(
    axes: Axes, points: Sequence[tuple[float, Interval]], style: LineStyle
) -> None:
    x = [place for place, _ in points]
    means = [interval.mean for _, interval in points]
    axes.plot(
        x,
        means,
        color=style.color,
        linestyle=style.dash,
        marker=style.marker,
        markersize=4.5,
        linewidth=1.6,
    )
    bars = [(place, i) for place, i in points if math.isfinite(i.low)]
    axes.vlines(
        [place for place, _ in bars],
        [i.low for _, i in bars],
        [i.high for _, i in bars],
        colors=style.color,
        linewidth=1.2,
        alpha=0.55,
    )


def _make_plain(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color=_INK, alpha=0.3, linewidth=0.7)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=_INK)
    axes.xaxis.label.set(color=_INK, fontsize=8.5)
