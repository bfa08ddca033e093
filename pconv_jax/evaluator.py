"""Evaluation by hole bin, on pictures that the network has not seen.

The protocol of the paper (section 4.2): masks of six ranges of hole ratio, each with
and without holes at the border of the image, and metrics of the composite. The pairs
of pictures and masks depend on the seed alone, so that any two networks see the same,
on any number of devices.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from pconv_jax import config as experiment
from pconv_jax import data, masks, parallel, steps, writers
from pconv_jax.checkpoint import Checkpoints
from pconv_jax.unet import PConvUNet

# The hole bins, without and with holes at the border.
MASK_CLASSES = tuple(
    (hole_bin, border)
    for border in (False, True)
    for hole_bin in range(len(masks.HOLE_BINS))
)
_UNITS = {"l1": "%", "l1_hole": "%", "psnr": "dB", "ssim": ""}


class Evaluation(NamedTuple):
    """What an evaluation found.

    Attributes:
      examples: one record an example: ``hole_bin``, ``border``, ``index``,
        ``hole_ratio``, and of the composite ``l1`` over all pixels and ``l1_hole`` over
        those of the hole, in percent of the range of values, ``psnr`` in dB and
        ``ssim``.
    """

    examples: list[dict[str, Any]]

    def mean(self, **where: Any) -> dict[str, float]:
        """Returns mean metrics, e.g. ``mean(hole_bin=3, border=True)``; or of all.

        The PSNR of a perfect composite is infinite, and is left out of its mean.
        """
        chosen = [e for e in self.examples if where.items() <= e.items()]
        means = {}
        for name in _UNITS:
            values = np.array([example[name] for example in chosen])
            means[name] = float(values[np.isfinite(values)].mean())
        return means

    def table(self) -> list[dict[str, Any]]:
        """Returns a row for each class of masks, and one for all."""
        rows = []
        for hole_bin, border in MASK_CLASSES:
            low, high = masks.HOLE_BINS[hole_bin]
            mean = self.mean(hole_bin=hole_bin, border=border)
            name = f"{low:.0%}-{high:.0%}"
            rows.append({"hole": name, "border": "yes" if border else "no"} | mean)
        rows.append({"hole": "all", "border": ""} | self.mean())
        return [{_heading(name): cell for name, cell in row.items()} for row in rows]

    def __str__(self) -> str:
        """Returns the table as text."""
        return writers.format_table(self.table(), decimals=3)


def evaluate(
    model: PConvUNet,
    variables: Mapping[str, Any],
    source: data.Source,
    *,
    image_size: int,
    batch_size: int,
    examples: int,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Evaluates a network.

    Args:
      model: the network.
      variables: its ``params`` and ``batch_stats``.
      source: the pictures. Their central squares are taken, and further squares where
        there are fewer pictures than examples.
      image_size: side of the squares after resizing, in pixels.
      batch_size: of all devices together.
      examples: how many for each of `MASK_CLASSES`.
      seed: of the masks.
      progress: whether to show a progress bar.

    Raises:
      ValueError: if the batch cannot be divided among the devices, the size does not
        suit the network, or too many pictures cannot be read.
    """
    parallel.check_batch_size(batch_size)
    step = _compile(model)
    records = []
    total = len(MASK_CLASSES) * -(-examples // batch_size)
    # None: no bar where the standard error is not a terminal.
    disable = None if progress else True
    with tqdm(total=total, desc="evaluate", leave=False, disable=disable) as bar:
        for batch in data.eval_batches(
            source, batch_size=batch_size, image_size=image_size, num_examples=examples
        ):
            share = jax.tree.map(parallel.own_share, batch)
            for hole_bin, border in MASK_CLASSES:
                mask = draw_masks(
                    share["index"], hole_bin, border, image_size, seed=seed
                )
                _, scores = step(variables, share | {"mask": mask})
                records += _records(parallel.gather(scores), batch, hole_bin, border)
                bar.update()
    return Evaluation(records)


def evaluate_run(
    workdir: str | pathlib.Path,
    *,
    config: ConfigDict | None = None,
    step: int | None = None,
) -> Evaluation:
    """Evaluates a run's network on the validation split, and writes what was found.

    Args:
      workdir: of the run; ``evaluation/results.json`` and ``evaluation/pictures.png``
        are written there.
      config: the experiment that says on what to evaluate; None for the run's own.
      step: which checkpoint; None for the newest.

    Raises:
      ValueError: if there is no such run or checkpoint, or as `evaluate`.
    """
    workdir = pathlib.Path(workdir)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        restored = checkpoints.restore(("params", "batch_stats"), step=step)
    if restored is None:
        raise ValueError(f"workdir: there is no checkpoint in {workdir}/checkpoints.")
    step, variables, meta = restored
    trained = ConfigDict(meta["config"])
    config = config or trained
    model = experiment.get_model(trained)
    source = experiment.get_source(config, "validation")
    variables = parallel.replicate(variables)
    evaluation = evaluate(
        model,
        variables,
        source,
        image_size=config.image_size,
        batch_size=config.batch_size,
        examples=config.evaluation_examples,
    )
    if parallel.process_index() == 0:
        results = {
            "step": step,
            "config": config.to_dict(),
            "warnings": meta["warnings"],
            "table": evaluation.table(),
            "examples": evaluation.examples,
        }
        pictures = draw_pictures(
            model, variables, source, image_size=config.image_size, count=12
        )
        directory = workdir / "evaluation"
        writers.write_json(directory / "results.json", results)
        writers.write_png(directory / "pictures.png", pictures)
    return evaluation


def draw_pictures(
    model: PConvUNet,
    variables: Mapping[str, Any],
    source: data.Source,
    *,
    image_size: int,
    count: int = 6,
    seed: int = 0,
) -> np.ndarray:
    """Returns examples to look at: hole, output, composite and truth side by side.

    They are the first of `evaluate`, of one hole bin after the other, by turns without
    and with holes at the border.

    Args:
      model: the network.
      variables: its ``params`` and ``batch_stats``.
      source: the pictures.
      image_size: side of the squares, in pixels.
      count: how many examples.
      seed: of the masks.

    Returns:
      uint8 ``[H, W, 3]``.
    """
    batch_size = -(-count // jax.local_device_count()) * jax.local_device_count()
    (batch,) = data.eval_batches(
        source, batch_size=batch_size, image_size=image_size, num_examples=batch_size
    )
    index = batch["index"]
    hole_bin = index % len(masks.HOLE_BINS)
    without, with_ = (
        draw_masks(index, hole_bin, border, image_size, seed=seed)
        for border in (False, True)
    )
    mask = np.where(index[:, None, None, None] % 2, with_, without)
    batch["mask"] = mask
    pictures, _ = _compile(model)(variables, batch)
    truth, _ = steps.prepare_batch(batch)
    columns = {
        "input": writers.show_hole(truth, mask),
        "output": pictures["output"],
        "composite": pictures["composite"],
        "truth": truth,
    }
    return writers.picture_grid(columns, max_rows=count)


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
    return np.asarray(_draw(key, index, bins, low, high, image_size, border))


@functools.lru_cache(maxsize=4)
def _compile(model: PConvUNet):
    return parallel.compile_eval_step(functools.partial(steps.eval_step, model=model))


@functools.partial(jax.jit, static_argnames=("size", "border"))
def _draw(key, index, hole_bin, low, high, size, border):
    def draw(i, b, low, high):
        example = jax.random.fold_in(jax.random.fold_in(key, i), 2 * b + border)
        return masks.random_mask(
            example, (size, size), hole_ratio=(low, high), border=border
        )

    return jax.vmap(draw)(index, hole_bin, low, high).astype(jnp.uint8)


def _records(scores, batch, hole_bin, border) -> list[dict[str, Any]]:
    """Returns the examples of a batch, but those that fill it up."""
    factors = {name: 100 if _UNITS.get(name) == "%" else 1 for name in scores}
    return [
        {"hole_bin": hole_bin, "border": border, "index": int(batch["index"][i])}
        | {name: float(x[i]) * factors[name] for name, x in scores.items()}
        for i in np.flatnonzero(batch["weight"])
    ]


def _heading(name: str) -> str:
    unit = _UNITS.get(name)
    return f"{name} {unit}" if unit else name
