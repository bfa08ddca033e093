"""Conventions for image values that several modules share."""

import numpy as np

# Mean and standard deviation of ImageNet's RGB values in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def central_square(image: np.ndarray) -> np.ndarray:
    """Crop the largest central square of an image ``[H, W, ...]``, as a view."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]
