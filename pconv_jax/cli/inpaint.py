"""``pconv inpaint``: repairs a picture, or a folder of pictures."""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pconv_jax.inpaint import image_io
from pconv_jax.inpaint.hole import hole_from_color
from pconv_jax.inpaint.inpainter import Inpainter

_DESCRIPTION = """\
Fills the hole of a picture. Only the hole changes: all other pixels come back as
they were, in PNG, TIFF, WebP and BMP files bit for bit (of 16 bits a channel in PNG
and TIFF files alone, of CMYK in TIFF files alone).

WHITE IS WHAT IS FILLED in a picture of a mask, as in other tools. Without --mask and
--mask-color, it is what is transparent in the picture, or NaN in a .npy file.
"""

_EXAMPLES = """\
examples:
  pconv inpaint --image photo.jpg --mask mask.png --output repaired.png
  pconv inpaint --image photo.png --mask-color '#ff00ff' --output repaired.png
  pconv inpaint --image photos/ --mask masks/ --output repaired/ --dilate 2
"""


def add(commands: Any) -> None:
    """Adds the command to those of ``pconv``."""
    command = commands.add_parser(
        "inpaint",
        help="repair a picture, or a folder of pictures",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = ", ".join(image_io.SUFFIXES)
    command.add_argument(
        "--image",
        metavar="PHOTO",
        type=Path,
        required=True,
        help=f"the picture, or a folder of pictures ({kinds})",
    )
    command.add_argument(
        "--output",
        metavar="OUT",
        type=Path,
        required=True,
        help="the file to write, of any of these kinds; or the folder, where files "
        "have the names of the pictures. A JPEG file cannot keep pixels bit for bit, "
        "but one of a JPEG file is compressed alike, and changes next to nothing",
    )
    add_network(command)
    hole = command.add_argument_group("what is filled")
    source = hole.add_mutually_exclusive_group()
    source.add_argument(
        "--mask",
        type=Path,
        help="picture that is white where to fill; or a folder, with a mask of the "
        "same name, whatever its suffix, for each picture. One mask does for all",
    )
    source.add_argument(
        "--mask-color",
        metavar="COLOR",
        help="fill what is of this colour in the picture, e.g. '#ff00ff' or magenta",
    )
    hole.add_argument(
        "--tolerance",
        metavar="N",
        type=int,
        help="by how much of 255 red, green and blue may differ from --mask-color; "
        "for pictures that were ever JPEG files some 30 (default: 0)",
    )
    hole.add_argument(
        "--invert-mask", action="store_true", help="fill where the mask is black"
    )
    hole.add_argument(
        "--resize-mask",
        action="store_true",
        help="make masks of another size fit, by nearest neighbours",
    )
    hole.add_argument(
        "--dilate",
        metavar="N",
        type=int,
        default=0,
        help="fill N pixels more all around, to be rid of a rim (default: 0)",
    )
    command.add_argument(
        "--force", action="store_true", help="replace files that are there already"
    )
    command.add_argument(
        "--max-pixels",
        metavar="N",
        type=int,
        default=image_io.MAX_PIXELS,
        help="refuse larger pictures (default: %(default)s)",
    )
    command.add_argument(
        "--value-range",
        metavar=("LOW", "HIGH"),
        nargs=2,
        type=float,
        default=(0.0, 1.0),
        help="of floats in .npy and .tif files that are pictures (default: 0 1)",
    )
    command.add_argument(
        "--raw",
        action="store_true",
        help="give the network floats as they are: for data that is no picture",
    )
    command.set_defaults(run=_inpaint)


def add_network(command: argparse.ArgumentParser) -> None:
    """Adds the option that says which network to use."""
    command.add_argument(
        "--network",
        metavar="FILE",
        help="a .safetensors file, as 'pconv convert' makes of published checkpoints "
        "and of runs; or a repository on the Hugging Face Hub, user/name. By default, "
        "the one that comes with this package",
    )


def _inpaint(arguments: argparse.Namespace) -> None:
    if arguments.tolerance is not None and arguments.mask_color is None:
        raise ValueError("--tolerance is of --mask-color: name one, or leave it out.")
    if arguments.resize_mask and arguments.mask_color is not None:
        raise ValueError("--resize-mask is of --mask, not of --mask-color.")
    pairs = _pair(arguments.image, arguments.output)
    inpainter = Inpainter.from_pretrained(
        arguments.network,
        value_range=None if arguments.raw else tuple(arguments.value_range),
        max_pixels=arguments.max_pixels,
    )
    if not arguments.image.is_dir():
        (pair,) = pairs
        return _repair(inpainter, *pair, arguments)
    failed = 0
    for image, out in tqdm(pairs, unit=" pictures", dynamic_ncols=True, disable=None):
        try:
            _repair(inpainter, image, out, arguments)
        except ValueError as error:
            failed += 1
            _say(f"{image.name}: {error}")
    if failed:
        raise ValueError(f"{failed} of {len(pairs)} pictures were not repaired.")


def _pair(image: Path, output: Path) -> list[tuple[Path, Path]]:
    """Returns the pictures, and for each the file to write."""
    if not image.is_dir():
        output = output / image.name if output.is_dir() else output
        image_io.check_suffix(output)
        return [(image, output)]
    if output.exists() and not output.is_dir():
        raise ValueError(
            f"--output must be a folder where --image is one, but {output} is a file."
        )
    found = _pictures_in(image)
    if not found:
        raise ValueError(f"--image: there is no picture in the folder {image}.")
    return [(path, output / path.name) for path in found]


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in image_io.SUFFIXES and not path.name.startswith(".")
    )


def _repair(
    inpainter: Inpainter, path: Path, out: Path, arguments: argparse.Namespace
) -> None:
    if out.exists() and not arguments.force:
        raise ValueError(f"there is a file {out} already; --force replaces it.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picture = image_io.read(path, max_pixels=arguments.max_pixels)
        image = inpainter(
            picture.image,
            _mask(path, picture.image, arguments),
            invert_mask=arguments.invert_mask,
            resize_mask=arguments.resize_mask,
            dilate=arguments.dilate,
        )
        image_io.write(out, picture._replace(image=image))
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        _say(f"{path.name}: {message}")


def _mask(
    path: Path, image: Image.Image | np.ndarray, arguments: argparse.Namespace
) -> Any:
    if arguments.mask_color is not None:
        color, tolerance = arguments.mask_color, arguments.tolerance or 0
        return hole_from_color(image, color, tolerance=tolerance)
    mask = arguments.mask
    if mask is None or not mask.is_dir():
        return mask
    masks = [m for m in _pictures_in(mask) if m.stem == path.stem]
    if len(masks) != 1:
        found = ", ".join(m.name for m in masks) or "none"
        raise ValueError(f"it takes one mask {path.stem}.* in {mask}; found: {found}.")
    return masks[0]


def _say(message: str) -> None:
    tqdm.write(f"pconv: {message}", file=sys.stderr)
