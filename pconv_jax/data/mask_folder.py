"""Masks read from a folder of pictures."""

import os
import pathlib

import cv2
import numpy as np

from pconv_jax import _files


class MaskFolder:
    """Mask pictures of a folder and all folders below it, sorted by path.

    Item `i` is uint8 `[H, W, 1]`, 1 = valid, 0 = hole. In the masks of Liu et al.,
    holes are white in the test set and black in the training set.

    Attributes:
      paths: The files, PNG, JPEG and WebP, but for those that are hidden or in hidden
        folders.
      hole: Colour of the holes, 'white' or 'black'.
      threshold: Grey value as a fraction of 255 above which a pixel is white. The
        paper's is 0.6.
      hole_ratio: Range `(low, high]` of the fraction of pixels that are hole, in what
        `sample` returns.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        hole: str = "white",
        threshold: float = 0.6,
        hole_ratio: tuple[float, float] = (0.01, 0.6),
    ):
        if hole not in ("white", "black"):
            raise ValueError(f"hole must be 'white' or 'black', got {hole!r}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), got {threshold}")
        suffixes = (".png", ".jpg", ".jpeg", ".webp")
        root = pathlib.Path(path).expanduser()
        self.paths = sorted(
            file for file in _files.iter_files(root) if file.suffix.lower() in suffixes
        )
        if not self.paths:
            found = "it has none" if root.is_dir() else "there is no such folder"
            raise ValueError(
                f"path must be a folder with mask pictures ({', '.join(suffixes)}), "
                f"but {found}: {path}"
            )
        self.hole = hole
        low, high = hole_ratio
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"hole_ratio must be (low, high) with 0 <= low < high <= 1, "
                f"got {hole_ratio}"
            )
        self.threshold = threshold
        self.hole_ratio = low, high

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        path = self.paths[index]
        data = np.frombuffer(path.read_bytes(), np.uint8)
        grey = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) if data.size else None
        if grey is None:
            raise ValueError(f"not a picture that can be read: {path}")
        white = grey > self.threshold * 255
        return (white if self.hole == "black" else ~white).astype(np.uint8)[..., None]

    def sample(
        self,
        rng: np.random.Generator,
        size: int,
        *,
        tries: int = 20,
        **options: object,
    ) -> np.ndarray:
        """Draws a mask and augments it, again until its hole ratio is in range.

        Args:
          rng: Random generator.
          size: Height and width of the result in pixels.
          tries: How often to draw; after that, the mask closest to the range is taken.
          **options: Those of `augment`.

        Returns:
          uint8 `[size, size, 1]`, 1 = valid, 0 = hole.

        Raises:
          ValueError: If an argument is out of range or a file cannot be read.
        """
        low, high = self.hole_ratio
        if tries < 1:
            raise ValueError(f"tries must be at least 1, got {tries}")
        best, best_miss = None, np.inf
        for _ in range(tries):
            mask = augment(self[rng.integers(len(self))], size, rng, **options)
            ratio = 1 - mask.mean()
            if low < ratio <= high:
                return mask
            miss = max(low - ratio, ratio - high)
            if miss < best_miss:
                best, best_miss = mask, miss
        return best


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
    """Dilates the holes of a mask, then rotates, shifts and crops it, at random.

    As Liu et al. 2018, section 3.2, do; how far they shift and crop is not stated.
    The mask is first cut to its central square. What comes in from outside is valid.

    Args:
      mask: uint8 `[H, W, 1]`, 1 = valid, 0 = hole.
      size: Height and width of the result in pixels.
      rng: Random generator.
      dilate: Range of the diameter by which holes are dilated, in pixels of a result of
        512; it shrinks and grows with `size`. None = no dilation.
      rotate: Whether to rotate, by any angle.
      shift: Whether to shift, by up to a quarter of the result each way.
      crop: Whether to crop, to between half and all of the square's side.

    Returns:
      uint8 `[size, size, 1]`, 1 = valid, 0 = hole.

    Raises:
      ValueError: If an argument is out of range.
    """
    mask = np.asarray(mask, np.uint8)
    if mask.ndim != 3 or mask.shape[-1] != 1:
        raise ValueError(f"mask must be [H, W, 1], got shape {mask.shape}")
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if dilate is not None and not 0 <= dilate[0] <= dilate[1]:
        raise ValueError(
            f"dilate must be (low, high) with 0 <= low <= high, got {dilate}"
        )
    height, width, _ = mask.shape
    square = min(height, width)
    side = square * rng.uniform(0.5, 1) if crop else square
    angle = rng.uniform(0, 2 * np.pi) if rotate else 0.0
    centre = np.array([width, height]) / 2
    if crop:
        centre += rng.uniform(-0.5, 0.5, 2) * (square - side)
    if shift:
        centre += rng.uniform(-0.25, 0.25, 2) * side
    # Dilated before it is scaled: nearest neighbours would lose thin holes.
    if dilate is not None:
        radius = rng.uniform(*dilate) / 2 * side / 512
        mask = cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_5) > radius
    # Pixel centres lie at half-integers; this takes those of the result to the mask's.
    sin, cos = np.sin(angle), np.cos(angle)
    turn = np.array([[cos, -sin], [sin, cos]]) * side / size
    offset = centre - turn @ np.full(2, (size - 1) / 2) - 0.5
    mask = cv2.warpAffine(
        mask.astype(np.uint8),
        np.column_stack([turn, offset]),
        (size, size),
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=1,
    )
    return mask[..., None]
