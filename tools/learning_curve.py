"""Draws a validation metric over training, of one run after another.

    python tools/learning_curve.py runs/release-coarse runs/release-fine --out curve.svg

Each run is a line, from where the one before it ended. The pictures that they validate
on may be of different sizes: then values are to be compared within a line alone.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

import matplotlib.figure


def read_curve(workdir: pathlib.Path, metric: str) -> list[tuple[int, float]]:
    """Returns pairs of a step and the metric that validation came to after it.

    Args:
      workdir: of the run.
      metric: such as ``psnr``.

    Raises:
      ValueError: if the run has never validated by that metric.
    """
    name = f"validation/{metric}"
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    curve = [(r["step"], r[name]) for r in map(json.loads, lines) if name in r]
    if not curve:
        raise ValueError(f"{workdir}: there is no {name} in its metrics.")
    return curve


def draw(workdirs: Sequence[pathlib.Path], metric: str) -> matplotlib.figure.Figure:
    """Returns the drawing."""
    figure = matplotlib.figure.Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot(
        xlabel="thousands of pictures seen", ylabel=f"validation {metric}"
    )
    seen = 0
    for workdir in workdirs:
        config = json.loads((workdir / "config.json").read_text())
        steps, values = zip(*read_curve(workdir, metric))
        pictures = [seen + step * config["batch_size"] for step in steps]
        seen = pictures[-1]
        size = config["image_size"]
        label = f"{workdir.name}, {size} x {size}"
        axes.plot([n / 1e3 for n in pictures], values, marker="o", label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    """Draws what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", metavar="WORKDIR", type=pathlib.Path, nargs="+")
    parser.add_argument("--metric", default="psnr")
    parser.add_argument("--out", type=pathlib.Path, default="curve.svg")
    arguments = parser.parse_args()
    try:
        draw(arguments.workdirs, arguments.metric).savefig(arguments.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
