"""``pconv masks``: writes example masks."""

import argparse
import re

from pconv_jax._errors import UserError
from pconv_jax._files import as_path, check_free
from pconv_jax.cli._options import Subparsers, add_force
from pconv_jax.runs.settings import FIELDS

# Those of `pconv_jax.masks.KINDS`, whose module takes long to import.
KINDS = FIELDS["masks.kind"].choices


def add(commands: Subparsers) -> None:
    """Add the command to those of ``pconv``."""
    command = commands.add_parser(
        "masks",
        help="write example masks",
        description=(
            "Draws irregular masks like those of the paper, and writes them as PNG "
            "files. White is filled. The same arguments draw the same masks."
        ),
    )
    _add_files(command)
    _add_shape(command)
    command.set_defaults(run=_run)


def _add_files(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--output",
        metavar="FOLDER",
        type=as_path,
        required=True,
        help="folder for mask_00000.png, mask_00001.png and so on",
    )
    command.add_argument(
        "--count",
        metavar="N",
        type=int,
        default=10,
        help="number of masks (default: %(default)s)",
    )
    command.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the random numbers (default: %(default)s)",
    )
    add_force(command)


def _add_shape(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--size",
        metavar="WIDTHxHEIGHT",
        type=_size,
        default=(512, 512),
        help="size in pixels, at least 8x8; one number is a square (default: 512)",
    )
    command.add_argument(
        "--ratio",
        metavar=("LOW", "HIGH"),
        nargs=2,
        type=float,
        default=(0.01, 0.6),
        help="fraction of the pixels that are hole, above LOW and up to HIGH; the "
        "paper's bins are 0.01 0.1, 0.1 0.2 and so on up to 0.5 0.6 (default: 0.01 "
        "0.6)",
    )
    command.add_argument(
        "--kind",
        choices=KINDS,
        default="mixed",
        help="what to draw (default: %(default)s)",
    )
    command.add_argument(
        "--border",
        action=argparse.BooleanOptionalAction,
        help="whether holes touch the border (default: some do)",
    )


def _size(text: str) -> tuple[int, int]:
    """Parse a size to height and width."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be like 512 or 640x480, got {text!r}")
    width, height = int(match[1]), int(match[2] or match[1])
    if min(height, width) < 8:
        raise argparse.ArgumentTypeError(f"must be at least 8x8, got {text!r}")
    return height, width


def _check(arguments: argparse.Namespace) -> None:
    if arguments.count < 1:
        raise UserError(f"--count must be 1 or more, got {arguments.count}.")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed must be in [0, 2**32), got {arguments.seed}.")
    low, high = arguments.ratio
    if not 0 < low <= high < 1:
        raise UserError(
            f"--ratio must be LOW HIGH with 0 < LOW <= HIGH < 1, got {low:g} {high:g}."
        )


def _run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    paths = [arguments.output / f"mask_{i:05d}.png" for i in range(arguments.count)]
    for path in paths:
        check_free(path, force=arguments.force)

    import jax
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from pconv_jax import masks
    from pconv_jax.inpaint import image_io

    key = jax.random.key(arguments.seed)
    for i, path in enumerate(tqdm(paths, unit=" masks", disable=None)):
        try:
            mask = masks.random_mask(
                jax.random.fold_in(key, i),
                arguments.size,
                hole_ratio=tuple(arguments.ratio),
                kind=arguments.kind,
                border=arguments.border,
            )
        except ValueError as error:  # --no-border leaves no room for so large holes.
            raise UserError(str(error)) from error
        hole = Image.fromarray(np.asarray(mask)[..., 0] == 0)
        image_io.write(path, image_io.ImageFile(hole, {}))
    print(f"Written to {arguments.output}: {arguments.count} masks.")
