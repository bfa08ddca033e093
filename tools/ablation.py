"""The paper's comparison of partial and ordinary convolutions, done again.

    python tools/ablation.py
    python tools/ablation.py --config configs/places2.py --seeds=0,1,2 --out=runs/full

Trains networks that differ in one thing, with the same pictures, masks, steps and
seeds, evaluates them on the same pairs of pictures and masks, and says how they differ:

  pconv      partial convolutions, scaled by sum(1) / sum(M): version 2 of the paper
  pconv_v1   the same, scaled by 1 / sum(M): version 1
  conv       ordinary convolutions; holes are 0, and the mask is a further channel
  conv_mean  the same; holes are the mean of the valid pixels

The default takes under an hour on two CPU cores. Stopped or killed, the same command
goes on. Written are ablation.md and ablation.json, besides all of the runs.
"""

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from pconv_jax import _files
from pconv_jax._errors import RunError, UserError
from pconv_jax.cli import config_options
from pconv_jax.evaluate import methods, results, runner
from pconv_jax.evaluate import protocol as protocol_lib
from pconv_jax.evaluate.protocol import MASK_CLASSES, EvalSet
from pconv_jax.runs import opening
from pconv_jax.runs.checkpoint import restore_network
from pconv_jax.runs.config import read_settings
from pconv_jax.runs.output import format_table, write_json
from pconv_jax.runs.settings import Settings, differences
from pconv_jax.train import loop
from pconv_jax.unet import PConvUNet

_RESAMPLES = 2000

_INTERVALS = (
    f"95 % percentile bootstrap, {_RESAMPLES} resamples of both seeds and pictures; "
    "all examples of a picture are drawn together"
)


class PConvV1(PConvUNet):
    """Scales by 1 / sum(M), which is to divide each kernel by its window's sum(1).

    As trained weights go, either network can be made the other. As training goes, they
    differ. Batch normalization undoes a constant factor but for its epsilon of 1e-5:
    and after He initialization, features 1 / sum(1) times as large have a variance of
    1e-6 and less. The first and the last layer have no normalization: there the bias is
    sum(1) times as large beside the rest, and a step of Adam that much smaller.
    """

    @nn.nowrap
    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """See base class."""
        params = jax.tree.map_with_path(_divide_kernel, variables["params"])
        return super().apply({**variables, "params": params}, *args, **kwargs)


class MeanFilledUNet(PConvUNet):
    """Sees the mean of the valid pixels in a hole, each picture its own.

    The network itself is told that all is valid, and so has one more channel, of ones.
    """

    def __call__(
        self, images: jax.Array, mask: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """See base class."""
        valid = mask > 0.5
        count = jnp.maximum(valid.sum((1, 2), keepdims=True), 1)
        mean = jnp.where(valid, images, 0).sum((1, 2), keepdims=True) / count
        filled = jnp.where(valid, images, mean)
        inputs = jnp.concatenate([filled, mask.astype(filled.dtype)], axis=-1)
        return super().__call__(inputs, jnp.ones_like(mask), **options)


# Convolutions and class of each variant.
VARIANTS = {
    "pconv": ("partial", PConvUNet),
    "pconv_v1": ("partial", PConvV1),
    "conv": ("standard", PConvUNet),
    "conv_mean": ("standard", MeanFilledUNet),
}


def run(
    config: ConfigDict,
    out: pathlib.Path,
    *,
    seeds: Sequence[int],
    variants: Sequence[str] = tuple(VARIANTS),
) -> dict[str, Any] | None:
    """Trains and evaluates all variants with all seeds, or goes on doing so.

    Args:
      config: the experiment.
      out: directory to write to.
      seeds: of the runs.
      variants: some of `VARIANTS`; differences are from the first one.

    Returns:
      What is written to ``ablation.json``; None if a run was asked to stop.
    """
    source = opening.get_images(read_settings(config).data, "validation")
    protocol = EvalSet(
        source, image_size=config.image_size, examples=config.evaluation_examples
    )
    records: dict[str, list[results.Evaluation]] = {v: [] for v in variants}
    for seed in seeds:
        for variant in variants:
            name = f"{variant}-seed{seed}"
            own, model = get_experiment(config, variant, seed)
            variables = train(own, out / name, model)
            if variables is None:
                return None
            network = methods.Network(name, model, variables)
            records[variant].append(
                runner.compare([network], protocol, directory=out / "records")
            )
    found = {
        "config": config.to_dict(),
        "seeds": list(seeds),
        "protocol": protocol.describe(),
        "intervals": _INTERVALS,
        "results": summarize(records),
    }
    write_json(out / "ablation.json", found)
    markdown = f"# Ablation\n\n{describe(found, markdown=True)}\n"
    _files.write_bytes(out / "ablation.md", markdown.encode())
    return found


def get_experiment(
    config: ConfigDict, variant: str, seed: int
) -> tuple[ConfigDict, PConvUNet]:
    """Returns the experiment of a run, and its network."""
    conv, network = VARIANTS[variant]
    own = config.copy_and_resolve_references()
    own.seed, own.model.conv = seed, conv
    model = opening.get_model(read_settings(own).model)
    fields = {name: getattr(model, name) for name in model.__dataclass_fields__}
    fields = {k: v for k, v in fields.items() if k not in ("parent", "name")}
    return own, network(**fields)


def train(
    config: ConfigDict, workdir: pathlib.Path, model: PConvUNet
) -> dict[str, Any] | None:
    """Trains a network, unless that is done; returns its variables, None if stopped."""
    if not _is_finished(config, workdir):
        summary = loop.train_and_evaluate(config, workdir, model=model)
        if not summary["finished"]:
            return None
    _, variables, _ = restore_network(workdir / "checkpoints")
    return variables


def summarize(
    records: Mapping[str, Sequence[results.Evaluation]],
) -> list[dict[str, Any]]:
    """Returns a row for each variant, range of hole ratios and metric.

    Args:
      records: evaluations of each variant, one a seed.

    Returns:
      Rows with ``mean``, ``low`` and ``high``; and for all variants but the first one,
      ``difference`` from it with the same seed: these and one number a ``seed``.
    """
    first, rows = next(iter(records)), []
    found = {
        variant: [{_place(e): e for e in of_seed.examples} for of_seed in evaluations]
        for variant, evaluations in records.items()
    }
    every = (e for of_seeds in found.values() for x in of_seeds for e in x.values())
    picture = {_place(e): e["picture"] for e in every}
    for variant in records:
        for hole_bin in (None, *range(len(MASK_CLASSES) // 2)):
            places = [p for p in sorted(picture) if hole_bin in (None, p[0])]
            pictures = [picture[place] for place in places]
            for metric in records[first][0].metrics:
                values = _values(found[variant], metric, places)
                if not np.isfinite(values).any():
                    continue
                row = {"variant": variant, "metric": metric, "hole_bin": hole_bin}
                row |= _bootstrap(values, pictures)
                difference = values - _values(found[first], metric, places)
                if variant != first and np.isfinite(difference).any(axis=1).all():
                    means = np.nanmean(difference, axis=1)
                    row["difference"] = _bootstrap(difference, pictures)
                    row["difference"]["seeds"] = [round(float(x), 6) for x in means]
                rows.append(row)
    return rows


def describe(found: Mapping[str, Any], *, markdown: bool = False) -> str:
    """Returns what was found as text, or as Markdown."""
    config, rows = found["config"], found["results"]
    steps = config["phase1"]["steps"], config["phase2"]["steps"]
    pictures = found["protocol"]["pictures"]["count"]
    parts = [
        f"{steps[0]} + {steps[1]} steps of {config['batch_size']} pictures of "
        f"{config['image_size']} pixels, seeds {found['seeds']}; evaluated on "
        f"{config['evaluation_examples']} examples of each of 12 classes of masks, of "
        f"{pictures} pictures. Intervals: {found['intervals']}."
    ]
    everything = [row for row in rows if row["hole_bin"] is None]
    for metric in dict.fromkeys(row["metric"] for row in rows):
        about = results.METRICS[metric]
        table = [
            {"variant": row["variant"], "mean [95 %]": _format(row)}
            | {"difference [95 %]": _format(row.get("difference"))}
            | {"of each seed": _format_seeds(row.get("difference"))}
            for row in everything
            if row["metric"] == metric
        ]
        unit = f" {about.unit}" if about.unit else ""
        title = f"{metric}{unit} ({about.better} is better)"
        text = format_table(table, markdown=markdown)
        parts.append(f"## {title}\n\n{text}" if markdown else f"{title}\n{text}")
    table = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        bins = [r for r in rows if r["variant"] == variant and r["metric"] == "psnr"]
        bins = [r for r in bins if r["hole_bin"] is not None and r.get("difference")]
        if bins:
            cells = {_bin_name(r["hole_bin"]): _format(r["difference"]) for r in bins}
            table.append({"variant": variant} | cells)
    if table:
        title = "psnr dB, difference by hole ratio"
        text = format_table(table, markdown=markdown)
        parts.append(f"## {title}\n\n{text}" if markdown else f"{title}\n{text}")
    return "\n\n".join(parts)


def _divide_kernel(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    if path[-1].key != "kernel":
        return leaf
    return leaf / math.prod(leaf.shape[:-1])  # sum(1): all inputs of a window.


def _is_finished(config: ConfigDict, workdir: pathlib.Path) -> bool:
    summary = workdir / "summary.json"
    if not summary.exists() or not json.loads(summary.read_text())["finished"]:
        return False
    done = json.loads((workdir / "config.json").read_text())
    same_end = done["phase2"]["steps"] == config.phase2.steps
    return same_end and not differences(Settings.from_json(done), read_settings(config))


def _place(example: Mapping[str, Any]) -> tuple[int, bool, int]:
    return example["hole_bin"], example["border"], example["index"]


def _values(of_seeds, metric, places):
    """Returns a metric's values ``[seeds, examples]``.

    What a network failed on, and the PSNR of equal pictures, is NaN.
    """
    values = [[x.get(place, {}).get(metric) for place in places] for x in of_seeds]
    return np.array(values, np.float64)


def _bootstrap(values: np.ndarray, pictures: Sequence[int]) -> dict[str, float]:
    numbers, place = np.unique(pictures, return_inverse=True)
    belongs = (place[:, None] == np.arange(len(numbers))).astype(float)
    known = np.isfinite(values)
    sums, counts = np.where(known, values, 0) @ belongs, known @ belongs
    rng = np.random.default_rng(0)
    seeds, drawn = (
        rng.multinomial(n, np.full(n, 1 / n), _RESAMPLES).astype(float)
        for n in sums.shape
    )
    totals = [np.einsum("rs,sp,rp->r", seeds, x, drawn) for x in (sums, counts)]
    usable = totals[1] > 0
    low, high = np.percentile(totals[0][usable] / totals[1][usable], [2.5, 97.5])
    found = {"mean": sums.sum() / counts.sum(), "low": low, "high": high}
    return {name: round(float(x), 6) for name, x in found.items()}


def _format(row: Mapping[str, float] | None) -> str:
    if row is None:
        return ""
    return f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _format_seeds(difference: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{x:.3f}" for x in difference["seeds"]) if difference else ""


def _bin_name(hole_bin: int) -> str:
    return protocol_lib.bin_name(hole_bin)


def _configure(config: ConfigDict, *, steps: int | None, examples: int | None) -> None:
    """Changes the experiment as the options say, and leaves out validation."""
    if steps is not None:
        both = config.phase1.steps + config.phase2.steps
        config.phase2.steps = round(steps * config.phase2.steps / both)
        config.phase1.steps = steps - config.phase2.steps
    if examples is not None:
        config.evaluation_examples = examples
    last_step = config.phase1.steps + config.phase2.steps
    config.validate_every = config.picture_every = max(last_step, 1)
    config.validation_examples = 1
    read_settings(config)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, help="steps of both phases (default: the config's)"
    )
    parser.add_argument(
        "--seeds", default="0,1,2", help="seeds of weights and data (default: 0,1,2)"
    )
    parser.add_argument(
        "--variants", help="some of the variants, the first one first (default: all)"
    )
    parser.add_argument(
        "--examples", type=int, help="evaluation examples of each class of masks"
    )
    parser.add_argument(
        "--out", default="runs/ablation", help="directory of the results"
    )
    config_options.add_config_options(parser, required=False)
    parser.set_defaults(config="pconv:quickstart")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison and prints its tables."""
    arguments = _parse(argv)
    try:
        variants = arguments.variants.split(",") if arguments.variants else [*VARIANTS]
        if unknown := set(variants) - set(VARIANTS):
            raise UserError(f"--variants: {', '.join(unknown)} is unknown.")
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        config = config_options.read_config(arguments)
        _configure(config, steps=arguments.steps, examples=arguments.examples)
        out = pathlib.Path(arguments.out)
        # Runs that differ by their seed alone are the same program.
        jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
        found = run(config, out, seeds=seeds, variants=variants)
    except (UserError, RunError) as error:
        sys.exit(f"ablation.py: {error}")
    if found is None:
        print("Stopped, to go on by the same command.")
    else:
        print(describe(found))


if __name__ == "__main__":
    main()
