"""Which pictures are paired with which masks: the same for every method.

The paper's (section 4.2): masks of six ranges of hole ratio, each with and without
holes at the border of the picture, and equally many examples of each of these twelve
classes. Example i of every class is of the same picture. The pairs depend on pictures,
masks and seed alone, not on methods or devices.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from pconv_jax import masks
from pconv_jax._images import central_square
from pconv_jax.data import pipeline
from pconv_jax.data.base import ImageSource
from pconv_jax.data.mask_folder import MaskFolder

# The hole bins, without and with holes at the border.
MASK_CLASSES = tuple(
    (hole_bin, border)
    for border in (False, True)
    for hole_bin in range(len(masks.HOLE_BINS))
)


_AT_ONCE = 4  # Masks that are drawn by one call.


class EvalSet:
    """Pairs of pictures and masks.

    Attributes:
      source: the pictures.
      image_size: side of the squares that pictures and masks are brought to, in pixels.
      examples: how many there are of each class.
      seed: of the masks that are drawn.
      classes: those of `MASK_CLASSES` that there are masks for.
      left_out: sentences about those that there are not.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        image_size: int,
        examples: int,
        seed: int = 0,
        mask_folder: MaskFolder | None = None,
    ):
        """Looks at the masks, if they are from a folder.

        Args:
          source: the pictures. Their central squares are taken, and further squares
            where there are fewer pictures than examples.
          image_size: see the class.
          examples: see the class.
          seed: see the class.
          mask_folder: of mask pictures, such as NVIDIA's test set. Each belongs to the
            class of its hole ratio and of whether there is hole within 50/512 of the
            border, which is how NVIDIA's are numbered. Where there are fewer than
            examples they are taken by turns. Without a folder, masks are drawn.

        Raises:
          ValueError: if an argument is out of range, or no mask of the folder belongs
            to any class.
        """
        for name, value in {"image_size": image_size, "examples": examples}.items():
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}.")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {seed}.")
        if image_size < 11:
            raise ValueError(
                "image_size must be at least 11 pixels, the size of SSIM's window, got "
                f"{image_size}."
            )
        self.source = source
        self.image_size = image_size
        self.examples = examples
        self.seed = seed
        self.classes = MASK_CLASSES
        self.left_out: list[str] = []
        self._folder = mask_folder
        self._mask_digest = None
        if mask_folder is not None:
            self._files, self._mask_digest = _classify(mask_folder)
            self.classes = tuple(c for c in MASK_CLASSES if self._files[c])
            self._check_classes()

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields numbers of examples, ``[N]``, and pictures, uint8 ``[N, S, S, 3]``.

        Args:
          size: the largest N.
        """
        for batch in pipeline.eval_batches(
            self.source,
            batch_size=size,
            image_size=self.image_size,
            num_examples=self.examples,
        ):
            count = int(batch["weight"].sum())  # Others fill it up.
            yield batch["index"][:count], batch["image"][:count]

    def masks(self, index: np.ndarray, hole_bin: int, border: bool) -> np.ndarray:
        """Returns the masks of some examples of a class, uint8 ``[N, S, S, 1]``."""
        if self._folder is None:
            return draw_masks(index, hole_bin, border, self.image_size, seed=self.seed)
        files = self._files[hole_bin, border]
        return np.stack(
            [self._read_mask(files[number % len(files)]) for number in index]
        )

    def picture(self, index: int) -> int:
        """Returns which picture of the source an example is of."""
        return int(index) % len(self.source)

    def describe(self) -> dict[str, Any]:
        """Returns all about the pairs, JSON-able."""
        used = min(len(self.source), self.examples)
        names = [self.source.name(i).rpartition("/")[2] for i in range(used)]
        if self._folder is None:
            kind = {
                "kind": "drawn by pconv_jax.masks.random_mask",
                "seed": self.seed,
            }
        else:
            kind = {
                "kind": "mask pictures, by turns, resized by nearest neighbours",
                "hole": self._folder.hole_color,
                "files": {class_name(*c): len(f) for c, f in self._files.items()},
            }
        return {
            "pictures": {
                "count": used,
                "crop": "central square, then others of the picture",
                "image_size": self.image_size,
                "names": names,
            },
            "masks": kind,
            "classes": [class_name(*c) for c in self.classes],
            "examples_per_class": self.examples,
            "comparison": "8 bit a channel, as pictures are saved; sRGB values / 255",
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of all that determines the pairs: pictures, masks, sizes, seed."""
        digest = hashlib.blake2b(digest_size=16)
        about = [self.image_size, self.examples, self.seed, self._mask_digest]
        digest.update(json.dumps(about).encode())
        if self._folder is None:  # How they are drawn may change.
            digest.update(self.masks(np.array([0]), 3, True).tobytes())
        for number in range(min(len(self.source), self.examples)):
            try:
                digest.update(hashlib.blake2b(self.source.read(number)).digest())
            except OSError:  # The picture is left out, with a warning.
                digest.update(b"unreadable")
        return digest.hexdigest()

    def _read_mask(self, file: int) -> np.ndarray:
        mask = central_square(self._folder[file])
        size = (self.image_size,) * 2
        return cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)[..., None]

    def _check_classes(self) -> None:
        empty = [class_name(*c) for c in MASK_CLASSES if not self._files[c]]
        place = os.fspath(self._folder.paths[0].parent)
        if not self.classes:
            raise ValueError(
                f"masks: none of the {len(self._folder)} masks in {place} has a hole "
                "ratio of over 1 % and up to 60 %; are their holes "
                f"{self._folder.hole_color}, as was said?"
            )
        if empty:
            self.left_out.append(
                f"{len(empty)} of 12 classes of masks, of which there is none in the "
                f"folder: {'; '.join(empty)}"
            )


def class_name(hole_bin: int, border: bool) -> str:
    """Returns e.g. '10%-20%, with border'."""
    return f"{bin_name(hole_bin)}, {'with' if border else 'without'} border"


def bin_name(hole_bin: int) -> str:
    """Returns e.g. '10%-20%'."""
    low, high = masks.HOLE_BINS[hole_bin]
    return f"{low:.0%}-{high:.0%}"


def draw_masks(
    index: np.ndarray,
    hole_bin: int | np.ndarray,
    border: bool,
    image_size: int,
    *,
    seed: int = 0,
) -> np.ndarray:
    """Returns the masks of some examples, uint8 ``[N, H, W, 1]``.

    Args:
      index: numbers of the examples, ``[N]``.
      hole_bin: index into `masks.HOLE_BINS`, of all or of each.
      border: whether holes touch the border.
      image_size: side of the masks, in pixels.
      seed: of the evaluation.
    """
    bins = np.broadcast_to(hole_bin, index.shape)
    low, high = np.asarray(masks.HOLE_BINS, np.float32)[bins].T
    key = jax.random.key(seed)
    # Always as many at once: compiled once, and bits are the same for any N.
    count = len(index)
    places = np.minimum(np.arange(count + -count % _AT_ONCE), count - 1)
    drawn = [
        _draw(key, index[i], bins[i], low[i], high[i], image_size, border)
        for i in places.reshape(-1, _AT_ONCE)
    ]
    return np.concatenate(drawn)[:count]


@functools.partial(jax.jit, static_argnames=("size", "border"))
def _draw(key, index, hole_bin, low, high, size, border):
    def draw(i, b, low, high):
        example = jax.random.fold_in(jax.random.fold_in(key, i), 2 * b + border)
        return masks.random_mask(
            example, (size, size), hole_ratio=(low, high), border=border
        )

    return jax.vmap(draw)(index, hole_bin, low, high).astype(jnp.uint8)


def _classify(folder: MaskFolder):
    """Returns the files of each class, and a digest of all of them."""
    files = {c: [] for c in MASK_CLASSES}
    digest = hashlib.blake2b(folder.hole_color.encode(), digest_size=16)
    for number in range(len(folder)):
        mask = central_square(folder[number])
        digest.update(hashlib.blake2b(np.packbits(mask).tobytes()).digest())
        hole_bin = int(masks.hole_bin(1 - mask.mean()))
        if hole_bin >= 0:
            files[hole_bin, bool(masks.near_border(mask))].append(number)
    return files, digest.hexdigest()
