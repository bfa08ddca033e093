"""``pconv masks``: writes example masks."""

import argparse
import io
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from pconv_jax import _files, masks


def add(commands: Any) -> None:
    """Adds the command to those of ``pconv``."""
    bins = ", ".join(f"{low:g} {high:g}" for low, high in masks.HOLE_BINS)
    command = commands.add_parser(
        "masks",
        help="write example masks",
        description=(
            "Draws irregular masks like those of the paper, and writes them as PNG "
            "files: white is what is filled. The same arguments draw the same masks."
        ),
    )
    command.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="for mask_00000.png, mask_00001.png and so on",
    )
    command.add_argument(
        "--count", metavar="N", type=int, default=10, help="how many (default: 10)"
    )
    command.add_argument(
        "--size",
        metavar="WIDTHxHEIGHT",
        type=_size,
        default=(512, 512),
        help="in pixels; one number is a square (default: 512)",
    )
    command.add_argument(
        "--ratio",
        metavar=("LOW", "HIGH"),
        nargs=2,
        type=float,
        default=(0.01, 0.6),
        help="fraction of the pixels that are hole, above LOW, up to HIGH; the paper's "
        f"bins are {bins} (default: 0.01 0.6)",
    )
    command.add_argument(
        "--kind", choices=masks.KINDS, default="mixed", help="default: %(default)s"
    )
    command.add_argument(
        "--border",
        action=argparse.BooleanOptionalAction,
        help="whether holes touch the border; by default some do",
    )
    command.add_argument(
        "--seed", type=int, default=0, help="of the random numbers (default: 0)"
    )
    command.add_argument(
        "--force", action="store_true", help="replace files that are there already"
    )
    command.set_defaults(run=_masks)


def _size(text: str) -> tuple[int, int]:
    """Returns height and width."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be like 512 or 640x480, got {text!r}")
    width, height = match[1], match[2] or match[1]
    return int(height), int(width)


def _masks(arguments: argparse.Namespace) -> None:
    if arguments.count < 1:
        raise ValueError(f"--count must be 1 or more, got {arguments.count}.")
    paths = [arguments.output / f"mask_{i:05d}.png" for i in range(arguments.count)]
    existing = [path for path in paths if path.exists()]
    if existing and not arguments.force:
        raise ValueError(f"there is a file {existing[0]} already; --force replaces it.")
    if not 0 <= arguments.seed < 2**32:
        raise ValueError(f"--seed must be in [0, 2**32), got {arguments.seed}.")
    key = jax.random.key(arguments.seed)
    for i, path in enumerate(tqdm(paths, unit=" masks", disable=None)):
        mask = masks.random_mask(
            jax.random.fold_in(key, i),
            arguments.size,
            hole_ratio=tuple(arguments.ratio),
            kind=arguments.kind,
            border=arguments.border,
        )
        file = io.BytesIO()
        Image.fromarray(np.asarray(mask)[..., 0] == 0).save(file, "PNG")
        _files.write_bytes(path, file.getvalue())
    print(f"Written to {arguments.output}: {arguments.count} masks.")
