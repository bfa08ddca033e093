"""A small evaluation set, a method that tests control, and mask folders."""

import cv2
import numpy as np

from pconv_jax.data import sources
from pconv_jax.evaluate import methods
from pconv_jax.evaluate.eval_set import BINS, EvalSet

SIZE = 32


def bundled():
    return sources.open_source("bundled", split="validation")


def make_eval_set(**options):
    return EvalSet(bundled(), **(dict(image_size=SIZE, examples=5) | options))


class FakeMethod:
    """A method that does as it is told, and keeps what it was given."""

    model = None
    description = "A method for tests."

    def __init__(self, name, fill=lambda image, mask: image * mask, fails=lambda i: ""):
        self.name, self.fingerprint = name, name
        self.given, self._fill, self._fails = [], fill, fails

    def fill(self, images, mask):
        start = len(self.given)
        self.given += list(zip(images, mask))
        errors = [self._fails(start + i) for i in range(len(images))]
        filled = np.stack([self._fill(*pair) for pair in zip(images, mask)])
        return methods.InpaintResult(filled, np.full(len(images), 0.5), errors)

    def close(self):
        pass


def write_mask_folder(folder, classes, size=128, per_class=2):
    """Mask images, white = hole, numbered like NVIDIA's; returned as masks."""
    folder.mkdir()
    written = {}
    for hole, border in classes:
        number = BINS.index(hole)
        for i in range(per_class):
            mask = np.ones((size, size, 1), np.uint8)
            # A square in the middle or in a corner.
            side = round(size * (0.1 * number + 0.06 + 0.02 * i) ** 0.5)
            top = 0 if border else (size - side) // 2
            mask[top : top + side, top : top + side] = 0
            name = f"{2000 * number + 1000 * border + i:05d}.png"
            cv2.imwrite(str(folder / name), 255 * (1 - mask))
            written[hole, border, i] = mask
    return written
