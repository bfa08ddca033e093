"""Times the filling of wide holes: by the search for patches, and with pieces.

    python -m benchmarks.pieces

The guide is OpenCV's Navier-Stokes inpainting, so that only the filling is timed. Both
ways fill the same holes in turns, after a first turn in which the search compiles. The
photo is one of ``docs/photos``; the large one is put together of it and its mirror
images.
"""

import os
import statistics
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from pconv_jax.inpaint.detail import add_detail

_PHOTO = Path(__file__).parents[1] / "docs" / "photos" / "house.webp"
_TURNS = 3  # Besides the first one.


def main() -> None:
    """Measure all cases, and print a table."""
    photo = np.asarray(Image.open(_PHOTO).convert("RGB"))
    height, width = photo.shape[:2]
    large = np.pad(photo, ((0, 2600), (0, 4100), (0, 0)), mode="symmetric")
    grid = [(y, x) for y in (1, 3, 5) for x in (1, 3, 5)]
    nine = [(height * y // 6, width * x // 6) for y, x in grid]
    cases = {
        "a disc of 60 pixels across": (photo, [(height // 2, width // 2)], 60),
        "nine discs of 60 pixels": (photo, nine, 60),
        "a disc of 200 pixels": (photo, [(height // 2, width // 2)], 200),
        "a disc of 800 pixels": (large, [(1500, 2250)], 800),
    }
    print(f"{os.cpu_count()} cores; the median and the range of {_TURNS} turns")
    print("| | image | search | pieces | ratio |\n|---|---|---:|---:|---:|")
    for name, (image, centers, size) in cases.items():
        search, pieces = _measure(image, _discs(image.shape[:2], centers, size))
        ratios = [p / s for p, s in zip(pieces, search)]
        shape = f"{image.shape[0]} x {image.shape[1]}"
        columns = _spread(search, " s"), _spread(pieces, " s"), _spread(ratios)
        print(f"| {name} | {shape} | {' | '.join(columns)} |", flush=True)


def _discs(
    shape: tuple[int, ...], centers: list[tuple[int, int]], size: int
) -> np.ndarray:
    hole = np.zeros(shape, np.uint8)
    for y, x in centers:
        cv2.circle(hole, (x, y), size // 2, 1, cv2.FILLED)
    return hole > 0


def _measure(image: np.ndarray, hole: np.ndarray) -> tuple[list[float], list[float]]:
    """Return the seconds of each turn, by the search and with pieces."""
    guide = cv2.inpaint(image, hole.astype(np.uint8), 3, cv2.INPAINT_NS)
    seconds = [], []
    for turn in range(1 + _TURNS):
        for sharp in (False, True):
            start = time.perf_counter()
            add_detail(image, hole, guide, seed=turn, sharp=sharp)
            seconds[sharp].append(time.perf_counter() - start)
    return seconds[False][1:], seconds[True][1:]


def _spread(values: list[float], unit: str = "") -> str:
    median = statistics.median(values)
    return f"{median:.2f}{unit} ({min(values):.2f} - {max(values):.2f})"


if __name__ == "__main__":
    main()
