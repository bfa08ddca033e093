"""Masks from a folder of mask images."""

import os
from typing import Literal, TypedDict, Unpack

import cv2
import numpy as np

from pconv_jax import _files
from pconv_jax._errors import UserError
from pconv_jax.data.decode import UnreadableImageError, decode_gray

# Dilation takes more memory for a pixel than an image does.
_MAX_PIXELS = 25_000_000
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class AugmentOptions(TypedDict, total=False):
    """The options of `augment`."""

    dilate: tuple[float, float] | None
    rotate: bool
    shift: bool
    crop: bool


class MaskFolder:
    """The mask images of a folder and of all folders below it, sorted by path.

    Item i is uint8 ``[H, W, 1]``, 1 = valid, 0 = hole. In the masks of Liu et al.,
    holes are white in the test set and black in the training set.

    Args:
      path: The folder.
      hole_color: Color of the holes, ``'white'`` (the default) or ``'black'``.
      threshold: Gray value, as a fraction of 255, above which a pixel is white. The
        default, 0.6, is the paper's.
      hole_ratio: Range ``(low, high]`` of the hole ratio of the masks that `sample`
        returns. The default is (0.01, 0.6).

    Attributes:
      paths: The PNG, JPEG and WebP files, except hidden ones and those in hidden
        folders.
      hole_color: See the argument.
      threshold: See the argument.
      hole_ratio: See the argument.

    Raises:
      UserError: If there is no such folder, no mask in it, or an argument is out of
        range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        hole_color: Literal["white", "black"] = "white",
        threshold: float = 0.6,
        hole_ratio: tuple[float, float] = (0.01, 0.6),
    ):
        if hole_color not in ("white", "black"):
            raise UserError(
                f"hole_color must be 'white' or 'black', got {hole_color!r}."
            )
        if not 0 < threshold < 1:
            raise UserError(f"threshold must be in (0, 1), got {threshold}.")
        root = _files.as_path(path)
        self.paths = sorted(
            file for file in _files.iter_files(root) if file.suffix.lower() in _SUFFIXES
        )
        if not self.paths:
            found = "it has none" if os.path.isdir(root) else "there is no such folder"
            raise UserError(
                f"path must be a folder of mask images ({', '.join(_SUFFIXES)}), "
                f"but {found}: {path}."
            )
        low, high = hole_ratio
        if not 0 <= low < high <= 1:
            raise UserError(
                f"hole_ratio must be (low, high) with 0 <= low < high <= 1, "
                f"got {hole_ratio}."
            )
        self.hole_color = hole_color
        self.threshold = threshold
        self.hole_ratio = low, high

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        path = self.paths[index]
        try:
            data = _files.read_regular(path)
        except OSError as error:
            message = f"cannot read {path}: {_files.describe_error(error)}."
            raise UnreadableImageError(message) from error
        gray = decode_gray(data, str(path), max_pixels=_MAX_PIXELS)
        white = gray > self.threshold * 255
        valid = white if self.hole_color == "black" else ~white
        return valid.astype(np.uint8)[..., None]

    def sample(
        self,
        rng: np.random.Generator,
        size: int,
        *,
        tries: int = 20,
        **options: Unpack[AugmentOptions],
    ) -> np.ndarray:
        """Draw and augment masks until the hole ratio of one is in range.

        Args:
          rng: Random generator.
          size: Height and width of the result in pixels.
          tries: Maximum number of masks to draw. The default is 20. If no hole ratio is
            in range, the mask closest to the range is returned.
          **options: Options of `augment`.

        Returns:
          uint8 ``[size, size, 1]``, 1 = valid, 0 = hole.

        Raises:
          UserError: If an argument is out of range or a file cannot be read.
        """
        low, high = self.hole_ratio
        if tries < 1:
            raise UserError(f"tries must be at least 1, got {tries}.")
        best: tuple[float, np.ndarray] | None = None
        for _ in range(tries):
            mask = augment(self[int(rng.integers(len(self)))], size, rng, **options)
            ratio = 1 - mask.mean()
            if low < ratio <= high:
                return mask
            miss = max(low - ratio, ratio - high)
            if best is None or miss < best[0]:
                best = miss, mask
        assert best is not None
        return best[1]


def augment(
    mask: np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    dilate: tuple[float, float] | None = (9, 49),
    rotate: bool = True,
    shift: bool = True,
    crop: bool = True,
) -> np.ndarray:
    """Dilate the holes of a mask, then rotate, shift and crop it, at random.

    Liu et al. 2018, section 3.2, do the same, but do not state how far they shift and
    crop. The central square of the mask is used. Pixels from outside of it are valid.

    Args:
      mask: uint8 ``[H, W, 1]``, 1 = valid, 0 = hole.
      size: Height and width of the result in pixels.
      rng: Random generator.
      dilate: Range of the diameter by which holes are dilated, in pixels of a result of
        512 pixels; it scales with ``size``. The default is (9, 49). None does not
        dilate.
      rotate: Whether to rotate by a random angle. The default is True.
      shift: Whether to shift by up to a quarter of the result in each direction. The
        default is True.
      crop: Whether to crop to between half the side of the square and the whole side.
        The default is True.

    Returns:
      uint8 ``[size, size, 1]``, 1 = valid, 0 = hole.

    Raises:
      UserError: If an argument is out of range.
    """
    mask = np.asarray(mask, np.uint8)
    if mask.ndim != 3 or mask.shape[-1] != 1:
        raise UserError(f"mask must be [H, W, 1], got shape {mask.shape}.")
    if size < 1:
        raise UserError(f"size must be at least 1 pixel, got {size}.")
    if dilate is not None and not 0 <= dilate[0] <= dilate[1]:
        raise UserError(
            f"dilate must be (low, high) with 0 <= low <= high, got {dilate}."
        )
    mask = _near_center(mask)
    height, width, _ = mask.shape
    square = min(height, width)
    side = square * rng.uniform(0.5, 1) if crop else square
    angle = rng.uniform(0, 2 * np.pi) if rotate else 0.0
    center = np.array([width, height]) / 2
    if crop:
        center += rng.uniform(-0.5, 0.5, 2) * (square - side)
    if shift:
        center += rng.uniform(-0.25, 0.25, 2) * side
    # Dilated before it is scaled, since nearest neighbors would lose thin holes.
    if dilate is not None:
        radius = rng.uniform(*dilate) / 2 * side / 512
        mask = cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_5) > radius
    # Maps pixel centers of the result to those of the mask. Centers are half-integers.
    sin, cos = np.sin(angle), np.cos(angle)
    turn = np.array([[cos, -sin], [sin, cos]]) * side / size
    offset = center - turn @ np.full(2, (size - 1) / 2) - 0.5
    mask = cv2.warpAffine(
        mask.astype(np.uint8),
        np.column_stack([turn, offset]),
        (size, size),
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=1,
    )
    return mask[..., None]


def _near_center(mask: np.ndarray) -> np.ndarray:
    """Cut off the ends of a long mask, which `augment` never reaches.

    The result is within 1.5 squares of the center. OpenCV takes up to 32,767 pixels.
    """
    height, width, _ = mask.shape
    square = min(height, width)
    # Of the same parity, so that the center stays where it is.
    tall, wide = (n - 2 * max((n - 4 * square) // 2, 0) for n in (height, width))
    top, left = (height - tall) // 2, (width - wide) // 2
    return mask[top : top + tall, left : left + wide]
