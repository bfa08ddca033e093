"""Examples to look at: choose them, fill them again, and lay them out in a grid."""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pconv_jax.data import pipeline
from pconv_jax.data.base import ImageSource
from pconv_jax.evaluate.eval_set import BINS, HOLES, EvalSet, draw_masks
from pconv_jax.evaluate.methods import Method, compile_fill_step
from pconv_jax.evaluate.results import Evaluation
from pconv_jax.evaluate.store import Record, key_of
from pconv_jax.runs.pictures import image_grid
from pconv_jax.unet import PConvUNet

_BATCH = 4
_DRAWN = 6  # Examples of a grid during training.
_LARGEST = 256  # Side of shown images, in pixels; larger ones are scaled down.

Columns = dict[str, np.ndarray | None]
"""Images of an example by caption, uint8 ``[H, W, 3]``; None for a failed method."""


class ChosenExample(NamedTuple):
    """An example to show.

    Attributes:
      rank: ``'best'``, ``'median'`` or ``'worst'``.
      record: The record of the example.
    """

    rank: str
    record: Record


def choose_examples(evaluation: Evaluation) -> list[ChosenExample]:
    """Choose the best, the median and the worst example of each of `HOLES`.

    They are ranked by the PSNR of the first method. If it failed on all examples of a
    hole, the next method ranks them.
    """
    chosen = []
    for hole in HOLES:
        by_method = (
            evaluation.select(method=method, hole=hole) for method in evaluation.methods
        )
        examples = next(filter(None, by_method), None)
        if examples is None:
            continue
        ranked = sorted(examples, key=lambda e: -(e["psnr"] or math.inf))
        places = {0: "best", len(ranked) - 1: "worst", len(ranked) // 2: "median"}
        chosen += [ChosenExample(places[i], ranked[i]) for i in sorted(places)]
    return chosen


def fill_examples(
    methods: Sequence[Method],
    eval_set: EvalSet,
    examples: Sequence[Record],
    *,
    failures: Sequence[Record] = (),
) -> list[Columns]:
    """Fill examples again, to show them.

    Args:
      methods: The methods that fill them.
      eval_set: The pairs that the examples belong to.
      examples: Records of the examples.
      failures: Records of failures, which are not tried again; none by default.

    Returns:
      For each example ``input`` (with a white hole), the composite of each method
      and ``truth``.
    """
    failed = {(f["method"], key_of(f)) for f in failures}
    wanted: dict[int, list[int]] = {}
    for number, example in enumerate(examples):
        wanted.setdefault(example["index"], []).append(number)
    shown: list[Columns] = [{} for _ in examples]
    for index, images in eval_set.batches(_BATCH) if wanted else ():
        for i, image in zip(index.tolist(), images):
            for number in wanted.get(i, ()):
                key = key_of(examples[number])
                capable = {m.name for m in methods if (m.name, key) not in failed}
                mask = eval_set.masks(np.array([i]), *key[:2])
                shown[number] = _fill_example(methods, capable, image, mask)
    return shown


def draw_examples(
    model: PConvUNet,
    variables: Mapping[str, Any],
    source: ImageSource,
    *,
    image_size: int,
) -> np.ndarray:
    """Draw six examples of a network: hole, output, composite and truth side by side.

    They are the first examples of `evaluate_network`, one from each hole bin in turn,
    alternately without and with holes at the border.

    Args:
      model: The network.
      variables: Its ``params`` and ``batch_stats``.
      source: The images.
      image_size: Side of the squares, in pixels.

    Returns:
      uint8 ``[H, W, 3]``.
    """
    (batch,) = pipeline.eval_batches(
        source, batch_size=_DRAWN, image_size=image_size, num_examples=_DRAWN
    )
    index, truth = batch["index"], batch["image"]
    holes = [BINS[i % len(BINS)] for i in index]
    inside, at_border = (
        draw_masks(index, holes, border, image_size) for border in (False, True)
    )
    mask = np.where(index[:, None, None, None] % 2, at_border, inside)
    step = compile_fill_step(model)
    output = step(variables, {"image": truth, "mask": mask})["output"]
    columns = {
        "input": np.where(mask == 0, np.uint8(255), truth),
        "output": output,
        "composite": np.where(mask == 0, output, truth),
        "truth": truth,
    }
    return image_grid(columns)


def lay_out(rows: Sequence[Columns]) -> np.ndarray:
    """Lay examples out in a grid, with images of at most 256 pixels a side.

    Args:
      rows: Examples of `fill_examples`, at least one. Failed methods become white.

    Returns:
      uint8 ``[H, W, 3]``.
    """
    first = next(image for image in rows[0].values() if image is not None)
    blank = np.full_like(first, 255)
    columns = {}
    for name in rows[0]:
        images = (row[name] for row in rows)
        shrunk = [shrink(blank if image is None else image) for image in images]
        columns[name] = np.stack(shrunk)
    return image_grid(columns)


def shrink(image: np.ndarray) -> np.ndarray:
    """Scale an image, uint8 ``[H, W, 3]``, down to at most 256 pixels a side."""
    thumbnail = Image.fromarray(image)
    thumbnail.thumbnail((_LARGEST, _LARGEST))
    return np.asarray(thumbnail)


def _fill_example(
    methods: Sequence[Method], capable: Set[str], image: np.ndarray, mask: np.ndarray
) -> Columns:
    """Fill one example with the methods that do not fail on it."""
    columns: Columns = {"input": np.where(mask[0] == 0, np.uint8(255), image)}
    for method in methods:
        columns[method.name] = None
        if method.name in capable:
            filled = method.fill(image[None], mask)
            if not filled.errors[0]:
                columns[method.name] = np.where(mask == 0, filled.images, image)[0]
    return columns | {"truth": image}
