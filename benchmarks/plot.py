"""Draws how time grows, as an SVG file.

python -m benchmarks.plot runs/benchmarks/REPORT.json growth.svg
"""

import json
import pathlib
import sys
from collections.abc import Mapping
from html import escape
from typing import Any

_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#7f7f7f")
_WIDTH, _HEIGHT, _MARGIN = 300, 220, 56

# The points of a line, (x, ms), by the line's name.
Lines = dict[str, list[tuple[float, float]]]


def growth(report: Mapping[str, Any]) -> str:
    """Returns a drawing of the time of inference over pixels, batch and hole ratio.

    Args:
      report: what `benchmarks.run` wrote, with the suites growth and inference.
    """
    pixels, batches, holes = {}, {}, {}
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
    panels = (
        ("megapixels, batch 1", pixels),
        ("images of 256 x 256 in a batch", batches),
        ("hole, % of the pixels", holes),
    )
    names = list(dict.fromkeys(name for _, lines in panels for name in lines))
    colors = dict(zip(names, _COLORS * len(names)))
    parts = [_panel(i, label, lines, colors) for i, (label, lines) in enumerate(panels)]
    for i, name in enumerate(names):
        x, y = _MARGIN + 150 * (i % 6), _HEIGHT + 2 * _MARGIN - 20
        parts.append(f'<path d="M{x} {y}h20" stroke="{colors[name]}"/>')
        parts.append(_text(x + 26, y + 4, name, "start"))
    width, height = 3 * (_WIDTH + _MARGIN) + 20, _HEIGHT + 2 * _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" fill="none" stroke-width="1.5">'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        + "".join(parts)
        + "</svg>\n"
    )


def _panel(index: int, label: str, lines: Lines, colors: Mapping[str, str]) -> str:
    left, top = _MARGIN + index * (_WIDTH + _MARGIN), 20
    points = [point for line in lines.values() for point in line]
    if not points:
        return _text(left, top + 20, f"{label}: not measured", "start")
    x_max, y_max = (1.05 * max(values) for values in zip(*points))

    def place(x: float, y: float) -> tuple[float, float]:
        return left + _WIDTH * x / x_max, top + _HEIGHT * (1 - y / y_max)

    parts = [
        f'<path d="M{left} {top}v{_HEIGHT}h{_WIDTH}" stroke="black"/>',
        _text(left + _WIDTH / 2, top + _HEIGHT + 36, label, "middle"),
        _text(left, top - 6, "ms", "end"),
    ]
    for tick in _ticks(x_max):
        parts.append(_text(place(tick, 0)[0], top + _HEIGHT + 16, f"{tick:g}"))
    for tick in _ticks(y_max):
        y = place(0, tick)[1]
        parts.append(f'<path d="M{left} {y:.1f}h{_WIDTH}" stroke="#ddd"/>')
        parts.append(_text(left - 6, y + 4, f"{tick:g}", "end"))
    for name, line in lines.items():
        placed = [f"{x:.1f} {y:.1f}" for x, y in (place(*p) for p in sorted(line))]
        parts.append(f'<path d="M{" L".join(placed)}" stroke="{colors[name]}"/>')
        for point in placed:
            x, y = point.split()
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colors[name]}"/>')
    return "".join(parts)


def _ticks(largest: float) -> list[float]:
    """Returns four to ten round numbers from 0 on."""
    step = 10.0 ** len(str(int(largest)))
    while largest / step < 4:
        step /= 2 if f"{step:e}"[0] != "5" else 2.5
    return [i * step for i in range(int(largest / step) + 1)]


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="black">'
        f"{escape(text)}</text>"
    )


if __name__ == "__main__":
    source, target = map(pathlib.Path, sys.argv[1:])
    target.write_text(growth(json.loads(source.read_text())))
