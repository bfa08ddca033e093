"""Repeats the paper's comparison of partial and standard convolutions.

    python tools/ablation.py
    python tools/ablation.py --config configs/places2.py --seeds=0,1,2 --out=runs/full

It trains four variants of one network with the same images, masks, steps and seeds. It
evaluates them on the same pairs of images and masks, and reports the differences:

  pconv      partial convolutions, scaled by sum(1) / sum(M): version 2 of the paper
  pconv_v1   partial convolutions, scaled by 1 / sum(M): version 1 of the paper
  conv       standard convolutions; holes are 0, and the mask is an extra channel
  conv_mean  standard convolutions; holes are the mean of the valid pixels

The default takes under an hour on two CPU cores. After an interruption, the same
command resumes. It writes ablation.md and ablation.json into the output directory, next
to the runs.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pconv_jax import _files
from pconv_jax._errors import RunError, UserError
from pconv_jax.cli import config_options
from pconv_jax.evaluate import comparison, methods, results
from pconv_jax.evaluate.bootstrap import Interval, cluster_bootstrap
from pconv_jax.evaluate.eval_set import BINS, EvalSet
from pconv_jax.evaluate.metric_definitions import METRICS
from pconv_jax.evaluate.store import Key, key_of
from pconv_jax.runs import opening
from pconv_jax.runs.checkpoint import restore_network
from pconv_jax.runs.config import read_settings
from pconv_jax.runs.settings import Settings, differences
from pconv_jax.runs.tables import format_table
from pconv_jax.train import experiment, loop, restore
from pconv_jax.unet import PConvUNet

_RESAMPLES = 2000

_INTERVALS = (
    f"95 % percentile bootstrap, {_RESAMPLES} resamples of both seeds and images; "
    "all examples of an image are drawn together"
)


class PConvV1(PConvUNet):
    """Scales by 1 / sum(M): divides each kernel by the sum(1) of its window.

    The trained weights of either network can be converted to the other, but the two
    train differently. Batch normalization undoes a constant factor, except for its
    epsilon of 1e-5: after He initialization, features that are 1 / sum(1) times as
    large have a variance of 1e-6 and less. The first and the last layer have no
    normalization. There, the bias is sum(1) times as large relative to the rest, and a
    step of Adam is smaller by the same factor.
    """

    @nn.nowrap
    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """See base class."""
        params = jax.tree.map_with_path(_divide_kernel, variables["params"])
        return super().apply({**variables, "params": params}, *args, **kwargs)


class MeanFilledUNet(PConvUNet):
    """Fills the hole of each image with the mean of its valid pixels.

    The network itself gets a mask of ones, and so has one extra channel of ones.
    """

    def __call__(
        self,
        images: ArrayLike,
        mask: ArrayLike,
        *,
        train: bool = False,
        freeze_encoder_norm: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """See base class."""
        images, mask = jnp.asarray(images), jnp.asarray(mask)
        valid = mask > 0.5
        count = jnp.maximum(valid.sum((1, 2), keepdims=True), 1)
        mean = jnp.where(valid, images, 0).sum((1, 2), keepdims=True) / count
        filled = jnp.where(valid, images, mean)
        inputs = jnp.concatenate([filled, mask.astype(filled.dtype)], axis=-1)
        return super().__call__(
            inputs,
            jnp.ones_like(mask),
            train=train,
            freeze_encoder_norm=freeze_encoder_norm,
        )


# The convolutions and the class of each variant.
VARIANTS: Mapping[str, tuple[Literal["partial", "standard"], type[PConvUNet]]] = {
    "pconv": ("partial", PConvUNet),
    "pconv_v1": ("partial", PConvV1),
    "conv": ("standard", PConvUNet),
    "conv_mean": ("standard", MeanFilledUNet),
}


def run(
    settings: Settings,
    out: Path,
    *,
    seeds: Sequence[int],
    variants: Sequence[str] = tuple(VARIANTS),
) -> dict[str, Any] | None:
    """Train and evaluate all variants with all seeds, or resume an earlier call.

    Args:
      settings: Settings of the runs.
      out: Output directory.
      seeds: Seeds of the runs.
      variants: Names in `VARIANTS`, all by default. Differences are taken from the
        first one.

    Returns:
      The content of ``ablation.json``; None if a run was asked to stop.
    """
    eval_set = EvalSet(
        opening.get_source(settings.data, "validation"),
        image_size=settings.image_size,
        examples=settings.evaluation_examples,
    )
    evaluations: dict[str, list[results.Evaluation]] = {v: [] for v in variants}
    for seed in seeds:
        for variant in variants:
            name = f"{variant}-seed{seed}"
            own, model = get_experiment(settings, variant, seed)
            variables = train(own, out / name, model)
            if variables is None:
                return None
            network = methods.Network(name, model, variables)
            evaluations[variant].append(
                comparison.compare([network], eval_set, directory=out / "records")
            )
    found = {
        "config": settings.to_dict(),
        "seeds": list(seeds),
        "protocol": eval_set.describe(),
        "intervals": _INTERVALS,
        "results": summarize(evaluations),
    }
    _files.write_json(out / "ablation.json", found)
    markdown = f"# Ablation\n\n{describe(found, markdown=True)}\n"
    _files.write_bytes(out / "ablation.md", markdown.encode())
    return found


def get_experiment(
    settings: Settings, variant: str, seed: int
) -> tuple[Settings, PConvUNet]:
    """Build the settings and the network of one run."""
    conv, network = VARIANTS[variant]
    model_settings = dataclasses.replace(settings.model, conv=conv)
    model = opening.get_model(model_settings)
    names = [field.name for field in dataclasses.fields(model)]
    fields = {n: getattr(model, n) for n in names if n not in ("parent", "name")}
    own = dataclasses.replace(settings, seed=seed, model=model_settings)
    return own, network(**fields)


def train(
    settings: Settings, workdir: Path, model: PConvUNet
) -> Mapping[str, Any] | None:
    """Train a network, unless its run has finished.

    Returns:
      Its variables; None if the run was asked to stop.
    """
    restored = None
    if _is_finished(settings, workdir):
        restored = restore_network(workdir / "checkpoints")
    if not restored or not _has_same_images(settings, restored[2]):
        summary = loop.train_and_evaluate(settings, workdir, model=model)
        if not summary["finished"]:
            return None
        restored = restore_network(workdir / "checkpoints")
    assert restored is not None  # A finished run has a checkpoint.
    return restored[1]


def summarize(
    evaluations: Mapping[str, Sequence[results.Evaluation]],
) -> list[dict[str, Any]]:
    """Summarize the evaluations in one row per variant, hole bin and metric.

    Args:
      evaluations: Evaluations of each variant, one per seed.

    Returns:
      Rows with ``mean``, ``low`` and ``high``. Rows of all variants except the first
      also have the ``difference`` from the first one with the same seed, and ``seeds``,
      the difference for each seed.
    """
    first, rows = next(iter(evaluations)), []
    found = {
        variant: [{key_of(e): e for e in of_seed.examples} for of_seed in of_variant]
        for variant, of_variant in evaluations.items()
    }
    every = (e for of_seeds in found.values() for x in of_seeds for e in x.values())
    image = {key_of(e): e["picture"] for e in every}
    for variant in evaluations:
        for hole in (None, *BINS):
            keys = [key for key in sorted(image) if hole in (None, key[0])]
            images = [image[key] for key in keys]
            for metric in evaluations[first][0].metrics:
                values = _values(found[variant], metric, keys)
                if not np.isfinite(values).any():
                    continue
                row = {"variant": variant, "metric": metric, "hole": hole}
                row |= _interval(values, images)
                difference = values - _values(found[first], metric, keys)
                if variant != first and np.isfinite(difference).any(axis=1).all():
                    means = np.nanmean(difference, axis=1)
                    row["difference"] = _interval(difference, images)
                    row["difference"]["seeds"] = [round(float(x), 6) for x in means]
                rows.append(row)
    return rows


def describe(found: Mapping[str, Any], *, markdown: bool = False) -> str:
    """Format the results as plain text (the default) or as Markdown.

    Args:
      found: The result of `run`.
      markdown: Whether to format Markdown.
    """
    config, rows = found["config"], found["results"]
    steps = config["phase1"]["steps"], config["phase2"]["steps"]
    images = found["protocol"]["pictures"]["count"]
    parts = [
        f"{steps[0]} + {steps[1]} steps of {config['batch_size']} images of "
        f"{config['image_size']} pixels, seeds {found['seeds']}; evaluated on "
        f"{config['evaluation_examples']} examples of each of 12 classes of masks, "
        f"from {images} images. Intervals: {found['intervals']}."
    ]
    everything = [row for row in rows if row["hole"] is None]
    for metric in dict.fromkeys(row["metric"] for row in rows):
        about = METRICS[metric]
        table = [
            {"variant": row["variant"], "mean [95 %]": _format(row)}
            | {"difference [95 %]": _format(row.get("difference"))}
            | {"of each seed": _format_seeds(row.get("difference"))}
            for row in everything
            if row["metric"] == metric
        ]
        unit = f" {about.unit}" if about.unit else ""
        title = f"{metric}{unit} ({about.better} is better)"
        parts.append(_format_section(title, table, markdown=markdown))
    table = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        bins = [r for r in rows if r["variant"] == variant and r["metric"] == "psnr"]
        bins = [r for r in bins if r["hole"] is not None and r.get("difference")]
        if bins:
            cells = {r["hole"]: _format(r["difference"]) for r in bins}
            table.append({"variant": variant} | cells)
    if table:
        title = "psnr dB, difference by hole ratio"
        parts.append(_format_section(title, table, markdown=markdown))
    return "\n\n".join(parts)


def _format_section(
    title: str, table: Sequence[Mapping[str, Any]], *, markdown: bool
) -> str:
    text = format_table(table, markdown=markdown)
    return f"## {title}\n\n{text}" if markdown else f"{title}\n{text}"


def _divide_kernel(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    if path[-1].key != "kernel":
        return leaf
    return leaf / math.prod(leaf.shape[:-1])  # sum(1), over all inputs of a window.


def _is_finished(settings: Settings, workdir: Path) -> bool:
    summary = workdir / "summary.json"
    if not summary.exists() or not json.loads(summary.read_text())["finished"]:
        return False
    done = Settings.from_json(json.loads((workdir / "config.json").read_text()))
    same_end = done.phase2.steps == settings.phase2.steps
    return same_end and not differences(done, settings)


def _has_same_images(settings: Settings, meta: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint was trained on the images that settings name."""
    images = experiment.identify_images(
        opening.get_source(settings.data, "train"),
        opening.get_source(settings.data, "validation"),
        experiment.open_mask_folder(settings.masks),
    )
    return not restore.changed_images(images, meta)


def _values(
    of_seeds: Sequence[Mapping[Key, Mapping[str, Any]]],
    metric: str,
    keys: Sequence[Key],
) -> np.ndarray:
    """Collect a metric's values ``[seeds, examples]``.

    NaN stands for the examples that a network failed on, and for the PSNR of equal
    images.
    """
    values = [[x.get(key, {}).get(metric) for key in keys] for x in of_seeds]
    return np.array(values, np.float64)


def _interval(values: np.ndarray, images: Sequence[int]) -> dict[str, Any]:
    interval = cluster_bootstrap(values, images, resamples=_RESAMPLES)
    return {name: round(x, 6) for name, x in interval._asdict().items()}


def _format(row: Mapping[str, float] | None) -> str:
    if row is None:
        return ""
    return results.format_interval(Interval(row["mean"], row["low"], row["high"]))


def _format_seeds(difference: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{x:.3f}" for x in difference["seeds"]) if difference else ""


def _configure(
    settings: Settings, *, steps: int | None, examples: int | None
) -> Settings:
    """Apply the options to the settings, and turn off validation during training."""
    phases = settings.phase1.steps, settings.phase2.steps
    if steps is not None:
        second = round(steps * phases[1] / sum(phases))
        phases = steps - second, second
    if examples is None:
        examples = settings.evaluation_examples
    changed = dataclasses.replace(
        settings,
        phase1=dataclasses.replace(settings.phase1, steps=phases[0]),
        phase2=dataclasses.replace(settings.phase2, steps=phases[1]),
        evaluation_examples=examples,
        validate_every=max(sum(phases), 1),
        picture_every=max(sum(phases), 1),
        validation_examples=1,
    )
    return Settings.from_dict(changed.to_dict())  # This checks them.


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="steps of both phases together (default: the config's)",
    )
    parser.add_argument(
        "--seeds", default="0,1,2", help="seeds of the runs (default: 0,1,2)"
    )
    parser.add_argument(
        "--variants",
        help="variants to train, comma-separated, the reference first (default: all)",
    )
    parser.add_argument(
        "--examples",
        type=int,
        help="evaluation examples of each class of masks (default: the config's)",
    )
    parser.add_argument(
        "--out",
        default="runs/ablation",
        help="output directory (default: runs/ablation)",
    )
    config_options.add_config_options(parser, required=False)
    parser.set_defaults(config="pconv:quickstart")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison and print its tables."""
    arguments = _parse(argv)
    try:
        variants = arguments.variants.split(",") if arguments.variants else [*VARIANTS]
        if unknown := set(variants) - set(VARIANTS):
            raise UserError(
                f"--variants must be among {', '.join(VARIANTS)}, got "
                f"{', '.join(sorted(unknown))}."
            )
        seeds = _parse_seeds(arguments.seeds)
        config = config_options.read_config(arguments)
        settings = _configure(
            read_settings(config), steps=arguments.steps, examples=arguments.examples
        )
        out = Path(arguments.out)
        # Runs that differ only in their seed compile to the same program.
        jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
        found = run(settings, out, seeds=seeds, variants=variants)
    except (UserError, RunError) as error:
        sys.exit(f"ablation.py: {error}")
    if found is None:
        print("Stopped. The same command resumes.")
    else:
        print(describe(found))


def _parse_seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds must be integers, got {text!r}.") from None


if __name__ == "__main__":
    main()
