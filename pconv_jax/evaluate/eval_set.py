"""The evaluation set: the pairs of images and masks that all methods get.

It follows section 4.2 of the paper: six ranges of hole ratio, each with and without
holes at the image border, and equally many examples of each of these twelve mask
classes. Two more classes show what the twelve do not: thin holes, such as scratches,
and wide ones. Example i of every class shows the same image. The pairs depend only on
the images, the masks and the seed, not on the methods or the devices.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from pconv_jax import masks
from pconv_jax._errors import UserError
from pconv_jax._images import central_square
from pconv_jax.data import pipeline, transforms
from pconv_jax.data.base import ImageSource
from pconv_jax.data.decode import UnreadableImageError
from pconv_jax.data.mask_folder import MaskFolder
from pconv_jax.metrics.image import SSIM_WINDOW


class MaskClass(NamedTuple):
    """A class of masks.

    Attributes:
      hole: One of `HOLES`.
      border: Whether holes touch the border. None if that does not matter.
    """

    hole: str
    border: bool | None

    def __str__(self) -> str:
        if self.border is None:
            return self.hole
        return f"{self.hole}, {'with' if self.border else 'without'} border"


BINS = tuple(f"{low:.0%}-{high:.0%}" for low, high in masks.HOLE_BINS)
"""Names of the hole bins, such as ``'1%-10%'``."""

SHAPES = tuple(masks.HOLE_RATIOS)
"""Names of the other holes, ``'thin'`` and ``'wide'``; see `masks.random_mask`."""

HOLES = BINS + SHAPES
"""Names of all holes."""

BIN_CLASSES = tuple(MaskClass(b, border) for border in (False, True) for b in BINS)
"""The classes of the paper, first the bins without holes at the border."""

SHAPE_CLASSES = tuple(MaskClass(shape, None) for shape in SHAPES)
"""The classes of thin and of wide holes."""

_MASKS_PER_CALL = 4


class EvalSet:
    """Pairs of images and masks.

    Attributes:
      source: The images.
      image_size: Side of the square images and masks, in pixels.
      examples: Number of examples of each class.
      seed: Seed of the drawn masks.
      classes: The classes that have masks.
      left_out: Sentences that say which classes have no masks, and why.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        image_size: int,
        examples: int,
        seed: int = 0,
        classes: Sequence[MaskClass] = BIN_CLASSES,
        mask_folder: MaskFolder | None = None,
    ):
        """Sort the masks of the folder into classes, if there is one.

        Args:
          source: The images. Their central squares are taken, and further squares if
            there are fewer images than examples.
          image_size: Side of the squares after resizing, in pixels; at least 11.
          examples: Number of examples of each class.
          seed: Seed of the drawn masks. The default is 0.
          classes: The classes of the drawn masks. `BIN_CLASSES` by default.
          mask_folder: Mask images, such as NVIDIA's test set. The class of a mask, one
            of `BIN_CLASSES`, follows from its hole ratio and from whether it has a hole
            within 50/512 of the border, as NVIDIA's are numbered. A class with fewer
            masks than examples reuses them cyclically. Masks are drawn by default
            (None).

        Raises:
          UserError: If an argument is out of range, or no mask of the folder belongs to
            any class.
        """
        for name, value in {"image_size": image_size, "examples": examples}.items():
            if value < 1:
                raise UserError(f"{name} must be positive, got {value}.")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed must be in [0, 2**32), got {seed}.")
        if image_size < SSIM_WINDOW:
            raise UserError(
                f"image_size must be at least {SSIM_WINDOW} pixels, the size of "
                f"SSIM's window, got {image_size}."
            )
        self.source = source
        self.image_size = image_size
        self.examples = examples
        self.seed = seed
        self.classes = tuple(classes)
        self.left_out: list[str] = []
        self._images = _TrackedSource(source)
        self._folder = mask_folder
        self._files: dict[MaskClass, list[int]] = {}
        self._mask_digest: str | None = None
        if mask_folder is not None:
            self._files, self._mask_digest = _classify(mask_folder)
            self.classes = tuple(c for c in BIN_CLASSES if self._files[c])
            self._report_empty_classes(mask_folder)

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterate over the images, in batches.

        Args:
          size: Largest batch size N.

        Yields:
          Example numbers ``[N]`` and images, uint8 ``[N, S, S, 3]``.
        """
        for batch in pipeline.eval_batches(
            self._images,
            batch_size=size,
            image_size=self.image_size,
            num_examples=self.examples,
        ):
            count = int(batch["weight"].sum())  # The rest is padding.
            yield batch["index"][:count], batch["image"][:count]

    def masks(self, index: np.ndarray, hole: str, border: bool | None) -> np.ndarray:
        """Get the masks of examples of one class.

        Args:
          index: Example numbers ``[N]``.
          hole: See `MaskClass`.
          border: See `MaskClass`.

        Returns:
          uint8 ``[N, S, S, 1]``, 1 = valid and 0 = hole.
        """
        if self._folder is None:
            return draw_masks(index, hole, border, self.image_size, seed=self.seed)
        files = self._files[MaskClass(hole, border)]
        return np.stack(
            [self._read_mask(self._folder, files[i % len(files)]) for i in index]
        )

    def image_index(self, index: int) -> int:
        """Get the index in ``source`` of the image that an example shows.

        It is that of the next readable image, if the example's own cannot be read.

        Raises:
          UserError: If too many images cannot be read.
        """
        found = transforms.candidates(self.source, int(index) % len(self.source))
        return next(filter(self._images.is_readable, found))

    def describe(self) -> dict[str, Any]:
        """Describe the pairs, as a JSON-able dict."""
        used = sorted({self.image_index(i) for i in self._first_round})
        names = [self.source.name(i).rpartition("/")[2] for i in used]
        if self._folder is None:
            kind = {
                "kind": "drawn by pconv_jax.masks.random_mask",
                "seed": self.seed,
            }
        else:
            kind = {
                "kind": "mask images, reused cyclically, resized by nearest neighbor",
                "hole_color": self._folder.hole_color,
                "files": {str(c): len(f) for c, f in self._files.items()},
            }
        return {
            "pictures": {
                "count": len(used),
                "crop": "central square, then further squares of the same image",
                "image_size": self.image_size,
                "names": names,
            },
            "masks": kind,
            "classes": [str(c) for c in self.classes],
            "examples_per_class": self.examples,
            "comparison": "8 bits per channel, as images are saved; sRGB values / 255",
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of images, masks, sizes and seed, which determine the pairs."""
        digest = hashlib.blake2b(digest_size=16)
        used = list(pipeline.read_ahead(self.image_index, self._first_round))
        about = [self.image_size, self.examples, self.seed, self._mask_digest]
        about += [self.classes, used]
        digest.update(json.dumps(about).encode())
        if self._folder is None:  # The code that draws them may change.
            for mask_class in self.classes:
                digest.update(self.masks(np.array([0]), *mask_class).tobytes())
        for number in used:
            digest.update(hashlib.blake2b(self.source.read(number)).digest())
        return digest.hexdigest()

    @property
    def _first_round(self) -> range:
        """The examples before images are shown again, in other squares."""
        return range(min(len(self.source), self.examples))

    def _read_mask(self, folder: MaskFolder, number: int) -> np.ndarray:
        mask = central_square(folder[number])
        size = (self.image_size, self.image_size)
        return cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)[..., None]

    def _report_empty_classes(self, folder: MaskFolder) -> None:
        if not self.classes:
            place = os.fspath(folder.paths[0].parent)
            raise UserError(
                f"masks: none of the {len(folder)} masks in {place} has a hole ratio "
                "above 1 % and up to 60 %; are their holes really "
                f"{folder.hole_color}?"
            )
        empty = [str(c) for c in BIN_CLASSES if not self._files[c]]
        if empty:
            self.left_out.append(
                f"{len(empty)} of 12 classes of masks are left out, because the folder "
                f"has no mask of theirs: {'; '.join(empty)}"
            )


class _TrackedSource(ImageSource):
    """The images of a source, with a memory of which can be read."""

    def __init__(self, source: ImageSource):
        self._source = source
        self._known: dict[int, bool] = {}

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> bytes:
        return self._source.read(index)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            image = self._source[index]
        except UnreadableImageError:
            self._known[index] = False
            raise
        self._known[index] = True
        return image

    def is_readable(self, index: int) -> bool:
        """Return whether an image can be read; try it, if that is unknown."""
        if index not in self._known:
            with contextlib.suppress(UnreadableImageError):
                self[index]
        return self._known[index]


def draw_masks(
    index: np.ndarray,
    hole: str | Sequence[str],
    border: bool | None,
    image_size: int,
    *,
    seed: int = 0,
) -> np.ndarray:
    """Draw the masks of examples.

    Args:
      index: Example numbers ``[N]``.
      hole: One of `HOLES` for all examples, or one of `BINS` for each.
      border: Whether holes touch the border. None if that does not matter.
      image_size: Side of the masks, in pixels.
      seed: Seed of the evaluation. The default is 0.

    Returns:
      uint8 ``[N, H, W, 1]``, 1 = valid and 0 = hole.
    """
    kind = hole if isinstance(hole, str) and hole in SHAPES else "mixed"
    holes = np.broadcast_to([HOLES.index(h) for h in np.ravel(hole)], index.shape)
    ratios = (*masks.HOLE_BINS, *masks.HOLE_RATIOS.values())
    low, high = np.asarray(ratios, np.float32)[holes].T
    key = jax.random.key(seed)
    # Every call draws equally many: it compiles once, and the bits do not depend on N.
    count = len(index)
    places = np.minimum(np.arange(count + -count % _MASKS_PER_CALL), count - 1)
    drawn = []
    for i in places.reshape(-1, _MASKS_PER_CALL):
        examples = (jnp.asarray(x[i]) for x in (index, holes, low, high))
        drawn.append(_draw(key, *examples, size=image_size, kind=kind, border=border))
    return np.concatenate(drawn)[:count]


@functools.partial(jax.jit, static_argnames=("size", "kind", "border"))
def _draw(
    key: jax.Array,
    index: jax.Array,
    hole: jax.Array,
    low: jax.Array,
    high: jax.Array,
    size: int,
    kind: str,
    border: bool | None,
) -> jax.Array:
    def draw(i: jax.Array, h: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        class_number = 2 * h + bool(border)
        example = jax.random.fold_in(jax.random.fold_in(key, i), class_number)
        # random_mask also accepts traced ratios.
        hole_ratio = cast(tuple[float, float], (low, high))
        return masks.random_mask(
            example, (size, size), hole_ratio=hole_ratio, kind=kind, border=border
        )

    return jax.vmap(draw)(index, hole, low, high).astype(jnp.uint8)


def _classify(folder: MaskFolder) -> tuple[dict[MaskClass, list[int]], str]:
    """Sort masks into classes; return their numbers and a digest of all masks."""
    files: dict[MaskClass, list[int]] = {c: [] for c in BIN_CLASSES}
    digest = hashlib.blake2b(folder.hole_color.encode(), digest_size=16)
    for number in range(len(folder)):
        mask = central_square(folder[number])
        digest.update(hashlib.blake2b(np.packbits(mask).tobytes()).digest())
        hole_bin = int(masks.hole_bin(1 - mask.mean()))
        if hole_bin >= 0:
            border = bool(masks.near_border(mask))
            files[MaskClass(BINS[hole_bin], border)].append(number)
    return files, digest.hexdigest()
