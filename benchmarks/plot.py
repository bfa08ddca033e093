"""Plots how the time of inference grows, and writes an SVG file.

python -m benchmarks.plot runs/benchmarks/REPORT.json growth.svg
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pconv_jax import _files
from pconv_jax.evaluate.plots import to_svg

# The points of a line, (x, ms), by the name of the line.
Lines = dict[str, list[tuple[float, float]]]


def plot_growth(report: Mapping[str, Any]) -> bytes:
    """Plot the time of inference over pixels, batch size and hole ratio.

    Args:
      report: The report of `benchmarks.run`, with the suites growth and inference.

    Returns:
      An SVG file.
    """
    panels = _read_panels(report)
    figure = Figure(figsize=(11.5, 3.9), layout="constrained")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colors = {name: f"C{i % 10}" for i, name in enumerate(names)}
    handles = {}
    for axes, (label, lines) in zip(figure.subplots(1, len(panels)), panels.items()):
        handles |= _plot_panel(axes, label, lines, colors)
    if handles:
        figure.legend(
            [handles[name] for name in names],
            names,
            loc="outside lower center",
            ncols=6,
            frameon=False,
            fontsize=9,
        )
    return to_svg(figure, transparent=False)


def _read_panels(report: Mapping[str, Any]) -> dict[str, Lines]:
    """Read the lines of each panel, by the label of its horizontal axis."""
    pixels: Lines = {}
    batches: Lines = {}
    holes: Lines = {}
    for case in report["cases"]:
        if case["suite"] not in ("growth", "inference"):
            continue
        for name, result in case.get("results", {}).items():
            if "error" in result:
                continue
            settings, ms = case["settings"][name], 1e3 * result["median_s"]
            if "hole_ratio" in settings:
                point = 100 * settings["hole_ratio"], ms
                holes.setdefault("jax float32", []).append(point)
                continue
            if settings["batch"] == 1:
                point = settings["size"] ** 2 / 1e6, ms
                pixels.setdefault(name, []).append(point)
            if settings["size"] == 256:
                batches.setdefault(name, []).append((settings["batch"], ms))
    return {
        "megapixels, batch 1": pixels,
        "images of 256 x 256 in a batch": batches,
        "hole, % of the pixels": holes,
    }


def _plot_panel(
    axes: Axes, label: str, lines: Lines, colors: Mapping[str, str]
) -> dict[str, Any]:
    """Plot a panel, and return the handle of each line."""
    axes.set_xlabel(label)
    axes.set_ylabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.4)
    axes.set_axisbelow(True)
    if not lines:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    handles = {}
    for name, points in lines.items():
        x, ms = zip(*sorted(points))
        (handles[name],) = axes.plot(x, ms, color=colors[name], marker="o", ms=4)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    return handles


def main() -> None:
    """Plot the report that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot",
        description="Plot how the time of inference grows, as an SVG file.",
    )
    parser.add_argument("report", type=Path, help="report of benchmarks.run")
    parser.add_argument("out", type=Path, help="SVG file to write")
    arguments = parser.parse_args()
    try:
        report = json.loads(arguments.report.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"cannot read {arguments.report}: {error}")
    _files.write_bytes(arguments.out, plot_growth(report))


if __name__ == "__main__":
    main()
