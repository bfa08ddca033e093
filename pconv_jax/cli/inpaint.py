"""``pconv inpaint``: repairs an image, or a folder of images."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pconv_jax import _processes
from pconv_jax._errors import RunError, UserError
from pconv_jax._files import MAX_PIXELS, as_path
from pconv_jax.cli import _workers
from pconv_jax.cli._cache import add_cache, use_cache
from pconv_jax.cli._options import Subparsers, add_force, add_weights
from pconv_jax.cli._workers import Outcome
from pconv_jax.inpaint.formats import (
    SUFFIXES,
    check_suffix,
    find_images,
    variant_path,
)

if TYPE_CHECKING:
    from tqdm import tqdm

    from pconv_jax.inpaint.files import Journal, Repaired
    from pconv_jax.inpaint.inpainter import Inpainter
    from pconv_jax.inpaint.progress import Progress

_DESCRIPTION = """\
Fills the hole of an image. Only the hole changes. PNG, TIFF, WebP, BMP and JPEG 2000
files keep all other pixels exactly (16-bit channels only PNG and TIFF files, CMYK only
TIFF files). JPEG and AVIF files do not, and GIF files hold only 256 colors.

WHITE IS FILLED in a mask, as in other tools. Without --mask and --mask-color, the hole
is where the image is transparent, or NaN in a .npy file.
"""

_EXAMPLES = """\
examples:
  pconv inpaint --image photo.jpg --mask mask.png --output repaired.png
  pconv inpaint --image photo.png --mask-color '#ff00ff' --output repaired.png
  pconv inpaint --image photos/ --mask masks/ --output repaired/ --dilate 2
"""


def add(commands: Subparsers) -> None:
    """Add the command to those of ``pconv``."""
    command = commands.add_parser(
        "inpaint",
        help="repair an image, or a folder of images",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_files(command)
    _add_hole(command)
    _add_detail(command)
    command.add_argument(
        "--value-range",
        metavar=("LOW", "HIGH"),
        nargs=2,
        type=float,
        default=(0.0, 1.0),
        help="range of floats in .npy and .tif files that are images (default: 0 1)",
    )
    command.add_argument(
        "--raw",
        action="store_true",
        help="give the network floats as they are, for data that are not images",
    )
    command.set_defaults(run=_run)


def _add_files(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--image",
        metavar="PHOTO",
        type=as_path,
        required=True,
        help=f"the image, or a folder of images ({', '.join(SUFFIXES)})",
    )
    command.add_argument(
        "--output",
        metavar="OUT",
        type=as_path,
        required=True,
        help="the file to write, whose suffix may be any of those of --image; or a "
        "folder, in which each result gets the name of its image. An image from a JPEG "
        "file is compressed in the same way and changes very little",
    )
    add_weights(command)
    add_force(command)
    command.add_argument(
        "--max-pixels",
        metavar="N",
        type=int,
        default=MAX_PIXELS,
        help="refuse images with more pixels (default: %(default)s)",
    )
    add_cache(command)


def _add_hole(command: argparse.ArgumentParser) -> None:
    hole = command.add_argument_group("hole")
    source = hole.add_mutually_exclusive_group()
    source.add_argument(
        "--mask",
        type=as_path,
        help="an image that is white where to fill; or a folder, with a mask of the "
        "same name, with any suffix, for each image. One mask is used for all images",
    )
    source.add_argument(
        "--mask-color",
        metavar="COLOR",
        help="fill where the image has this color, such as '#ff00ff' or magenta",
    )
    hole.add_argument(
        "--mask-label",
        metavar="N",
        type=int,
        help="fill where a mask of labels (0, 1, 2, ...) has this label",
    )
    hole.add_argument(
        "--tolerance",
        metavar="N",
        type=int,
        help="largest difference of red, green and blue from --mask-color (0 to 255); "
        "use about 30 if the painted image was saved as a JPEG file (default: 0)",
    )
    hole.add_argument(
        "--invert-mask", action="store_true", help="fill where the mask is black"
    )
    hole.add_argument(
        "--resize-mask",
        action="store_true",
        help="resize masks of another size, by nearest neighbors",
    )
    hole.add_argument(
        "--dilate",
        metavar="N",
        type=int,
        default=0,
        help="enlarge the hole by N pixels, to remove a rim (default: %(default)s)",
    )


def _add_detail(command: argparse.ArgumentParser) -> None:
    detail = command.add_argument_group("detail")
    detail.add_argument(
        "--detail",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="copy detail from elsewhere in the image into the hole, guided by the "
        "network; --no-detail uses only the network's output (default: --detail)",
    )
    detail.add_argument(
        "--sharp",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fill wide holes with whole pieces of the image, which look more real; "
        "--no-sharp is more accurate, but soft (default: --sharp, which has no effect "
        "with --no-detail)",
    )
    detail.add_argument(
        "--exclude",
        metavar="MASK",
        type=as_path,
        help="an image that is white where no detail may be copied from, such as the "
        "rest of a removed object; or a folder of such images, as for --mask",
    )
    detail.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="seed of the search; in wide holes, different seeds give visibly "
        "different results (default: %(default)s)",
    )
    detail.add_argument(
        "--variants",
        metavar="K",
        type=int,
        default=1,
        help="write K results, with the seeds N, N + 1, ...; all but the first get a "
        "number before their suffix, as in repaired-2.png (default: %(default)s)",
    )


def _run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    pairs, skipped = _pair_files(arguments.image, arguments.output)
    _check_outputs(pairs, arguments.variants)

    many = arguments.image.is_dir()
    # Where JAX is loaded, as in a notebook, another process would load it once more.
    if many and "jax" not in sys.modules:
        outcome = _workers.run_all(_repair_all, arguments, pairs)
    else:
        *_, (_, outcome) = _repair_all(arguments, pairs)
    _report_skipped(skipped)
    if outcome.kept:
        print(f"Kept {outcome.kept} files of the same run, which was interrupted.")
    if outcome.failed:
        raise UserError(f"{outcome.failed} of {len(pairs)} images were not repaired.")
    if not outcome.filled:
        raise UserError(_nothing_filled(arguments))


def _repair_all(
    arguments: argparse.Namespace, pairs: Sequence[tuple[Path, Path]], first: int = 0
) -> Iterator[tuple[int, Outcome]]:
    """Repair images.

    Args:
      arguments: Those of the command.
      pairs: The images, and the files to write.
      first: Number of the first image to repair. The default is 0.

    Yields:
      Before each image, and at the end, how many were done, and what became of them.
    """
    from tqdm import tqdm

    from pconv_jax.inpaint.inpainter import Inpainter

    _processes.keep_memory_small()
    use_cache(arguments)
    inpainter = Inpainter.from_pretrained(
        arguments.weights,
        value_range=None if arguments.raw else tuple(arguments.value_range),
        max_pixels=arguments.max_pixels,
        detail=arguments.detail,
    )
    many = arguments.image.is_dir()
    # A run that replaces files has no use for what it wrote before.
    journal = _open_journal(arguments) if many and not arguments.force else None
    failed, filled = 0, False
    count = "{n:.1f}/{total_fmt} images " if many else ""
    progress_bar = tqdm(
        total=len(pairs),
        initial=first,
        bar_format=f"{{l_bar}}{{bar}}| {count}[{{elapsed}}<{{remaining}}]",
        leave=many,
        dynamic_ncols=True,
        disable=None,
    )
    with progress_bar as bar, journal or contextlib.nullcontext():
        for number, (image, output) in enumerate(pairs[first:], first):
            yield number, Outcome(failed, filled, journal.done if journal else 0)
            report = _report_to(bar, number)
            try:
                repaired = _repair(inpainter, image, output, arguments, journal, report)
                filled, messages = filled or repaired.filled, repaired.messages
            except (RunError, UserError) as error:
                if not many:
                    raise
                failed += 1
                messages = [str(error)]
            for message in dict.fromkeys(messages):
                message = message.removeprefix(f"{image.name} ")
                tqdm.write(f"pconv: {image.name}: {message}", file=sys.stderr)
            report(1)
        if journal:
            journal.finish()
    yield len(pairs), Outcome(failed, filled, journal.done if journal else 0)


def _repair(
    inpainter: "Inpainter",
    image: Path,
    output: Path,
    arguments: argparse.Namespace,
    journal: "Journal | None",
    progress: "Progress",
) -> "Repaired":
    """Repair an image, once for each variant."""
    from pconv_jax.inpaint.files import Repaired, repair_file
    from pconv_jax.inpaint.progress import share

    filled, messages = False, []
    for number in range(arguments.variants):
        path = variant_path(output, number)
        if journal:
            if journal.is_done(path):
                filled = True
                continue
            journal.start(path)
        repaired = repair_file(
            inpainter,
            image,
            path,
            seed=arguments.seed + number,
            # A folder of results is complete; a single image was to be repaired.
            write_unfilled=arguments.image.is_dir(),
            progress=share(progress, number, number + 1, total=arguments.variants),
            **_repair_options(arguments),
        )
        filled |= repaired.filled
        messages += repaired.messages
    return Repaired(filled, messages)


def _report_to(bar: "tqdm", number: int) -> "Progress":
    """Report the progress of an image, by its number, to a bar of images."""
    return lambda fraction: bar.update(number + fraction - bar.n)


def _open_journal(arguments: argparse.Namespace) -> "Journal":
    from pconv_jax.inpaint.files import Journal

    options = {name: str(value) for name, value in vars(arguments).items()}
    options |= {"run": "", "no_cache": "", "image": str(arguments.image.absolute())}
    return Journal(arguments.output, repr(sorted(options.items())))


def _nothing_filled(arguments: argparse.Namespace) -> str:
    if arguments.mask is not None:
        color = "black" if arguments.invert_mask else "white"
        return f"nothing was filled: no mask has a {color} pixel."
    if arguments.mask_color is None:
        return "nothing was filled: no pixel is transparent or missing."
    if arguments.invert_mask:
        return f"nothing was filled: all pixels have the color {arguments.mask_color}."
    hint = "" if arguments.tolerance else "; try --tolerance 30 if it was a JPEG file"
    return f"nothing was filled: no pixel has the color {arguments.mask_color}{hint}."


def _check(arguments: argparse.Namespace) -> None:
    if arguments.mask_color is None and arguments.tolerance is not None:
        raise UserError("--tolerance requires --mask-color.")
    if arguments.mask is None and arguments.mask_label is not None:
        raise UserError("--mask-label requires --mask.")
    needs_mask = arguments.resize_mask and arguments.exclude is None
    if arguments.mask_color is not None and needs_mask:
        raise UserError("--resize-mask requires --mask, and --mask-color is given.")
    if arguments.variants < 1:
        raise UserError(f"--variants must be at least 1, got {arguments.variants}.")
    if arguments.seed < 0:
        raise UserError(f"--seed must not be negative, got {arguments.seed}.")
    if not arguments.detail and (arguments.variants > 1 or arguments.exclude):
        raise UserError("--variants and --exclude require --detail.")


def _pair_files(
    image: Path, output: Path
) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """Find the images, and for each the file to write; and what is skipped."""
    if not os.path.exists(image):
        raise UserError(f"--image: there is no file or folder {image}.")
    if not image.is_dir():
        output = output / image.name if os.path.isdir(output) else output
        if not output.suffix:
            raise UserError(
                f"--output must be a file, such as {output}.png, or a folder that "
                f"exists, got {output}."
            )
        check_suffix(output)
        return [(image, output)], []
    if os.path.exists(output) and not os.path.isdir(output):
        raise UserError(
            f"--output must be a folder where --image is one, but {output} is a file."
        )
    found, skipped = find_images(image)
    if not found:
        _report_skipped(skipped)
        raise UserError(f"--image: there is no image in the folder {image}.")
    return [(path, output / path.name) for path in found], skipped


def _check_outputs(pairs: Sequence[tuple[Path, Path]], variants: int) -> None:
    """Check that no two results get the same name."""
    images: dict[Path, Path] = {}
    for image, output in pairs:
        for number in range(variants):
            path = variant_path(output, number)
            other = images.setdefault(path, image)
            if other != image:
                raise UserError(
                    f"--variants: results of {other.name} and {image.name} would have "
                    f"the same name, {path.name}; rename one of these images."
                )


def _report_skipped(paths: list[Path]) -> None:
    if paths:
        names = ", ".join(path.name + "/" * path.is_dir() for path in paths)
        print(
            f"pconv: {len(paths)} skipped, because they are not images of a known "
            f"kind: {names}.",
            file=sys.stderr,
        )


def _repair_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "mask": arguments.mask,
        "mask_color": arguments.mask_color,
        "mask_label": arguments.mask_label,
        "tolerance": arguments.tolerance or 0,
        "invert_mask": arguments.invert_mask,
        "resize_mask": arguments.resize_mask,
        "dilate": arguments.dilate,
        "exclude": arguments.exclude,
        "sharp": arguments.sharp,
        "max_pixels": arguments.max_pixels,
        "force": arguments.force,
    }
