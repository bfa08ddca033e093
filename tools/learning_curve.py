"""Plots a validation metric over the training of consecutive runs.

    python tools/learning_curve.py runs/release-coarse runs/release-fine --out curve.svg

Each run is one line, which starts where the previous run ended. If the runs validate on
images of different sizes, only the values on one line are comparable.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib.figure

from pconv_jax._errors import UserError


def read_curve(workdir: pathlib.Path, metric: str) -> list[tuple[int, float]]:
    """Read the validation values of a run.

    Args:
      workdir: Directory of the run.
      metric: Name of the metric, such as ``psnr``.

    Returns:
      Pairs of a step and the metric after it.

    Raises:
      UserError: If there is no such run, or it never validated by that metric.
    """
    name = f"validation/{metric}"
    lines = _read(workdir / "metrics.jsonl").splitlines()
    curve = [(r["step"], r[name]) for r in map(json.loads, lines) if name in r]
    if not curve:
        raise UserError(f"metric: there is no {name} in the metrics of {workdir}.")
    return curve


def draw(workdirs: Sequence[pathlib.Path], metric: str) -> matplotlib.figure.Figure:
    """Draw the learning curve of consecutive runs.

    Args:
      workdirs: Directories of the runs, in order.
      metric: Name of the metric, such as ``psnr``.

    Raises:
      UserError: As `read_curve`.
    """
    figure = matplotlib.figure.Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="thousands of images seen", ylabel=f"validation {metric}")
    seen = 0
    for workdir in workdirs:
        config: dict[str, Any] = json.loads(_read(workdir / "config.json"))
        steps, values = zip(*read_curve(workdir, metric))
        images = [seen + step * config["batch_size"] for step in steps]
        seen = images[-1]
        size = config["image_size"]
        label = f"{workdir.name}, {size} x {size}"
        axes.plot([n / 1e3 for n in images], values, marker="o", label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def main() -> None:
    """Draw the runs that the command line names."""
    parser = argparse.ArgumentParser(
        description="Plot a validation metric over the training of consecutive runs."
    )
    parser.add_argument(
        "workdirs",
        metavar="WORKDIR",
        type=pathlib.Path,
        nargs="+",
        help="workdirs of the runs, in order",
    )
    parser.add_argument(
        "--metric", default="psnr", help="validation metric (default: psnr)"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default="curve.svg",
        help="file to write: .svg, .png or .pdf (default: curve.svg)",
    )
    arguments = parser.parse_args()
    try:
        figure = draw(arguments.workdirs, arguments.metric)
    except UserError as error:
        parser.error(str(error))
    try:
        figure.savefig(arguments.out)
    except (OSError, ValueError) as error:  # An unwritable folder; an unknown suffix.
        parser.error(f"--out: cannot write {arguments.out}: {error}")


if __name__ == "__main__":
    main()
