"""Draws a validation metric over training, of one run after another.

    python tools/learning_curve.py runs/release-small runs/release-large --out curve.svg

Each run is a line, from where the one before it ended. The pictures that they validate
on may be of different sizes: then values are to be compared within a line alone.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

import matplotlib.figure


def read_curve(
    workdir: pathlib.Path, metric: str, start: int = 0
) -> list[tuple[int, float]]:
    """Returns pairs of how many pictures were seen, and the metric.

    Args:
      workdir: of the run.
      metric: such as ``psnr``.
      start: how many pictures were seen before the run.

    Raises:
      ValueError: if the run has never validated by that metric.
    """
    batch_size = json.loads((workdir / "config.json").read_text())["batch_size"]
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [r for line in lines if f"validation/{metric}" in (r := json.loads(line))]
    if not records:
        raise ValueError(f"{workdir}: there is no validation/{metric} in its metrics.")
    return [
        (start + r["step"] * batch_size, r[f"validation/{metric}"]) for r in records
    ]


def draw(workdirs: Sequence[pathlib.Path], metric: str) -> matplotlib.figure.Figure:
    """Returns the drawing."""
    figure = matplotlib.figure.Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot(
        xlabel="thousands of pictures seen", ylabel=f"validation {metric}"
    )
    seen = 0
    for workdir in workdirs:
        curve = read_curve(workdir, metric, seen)
        seen = curve[-1][0]
        size = json.loads((workdir / "config.json").read_text())["image_size"]
        label = f"{workdir.name}, {size} x {size}"
        pictures, values = zip(*curve)
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
