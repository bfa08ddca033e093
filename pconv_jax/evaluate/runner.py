"""Evaluations of one network, and of a training run or weights with a report."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from pconv_jax import _files
from pconv_jax._errors import UserError
from pconv_jax.data import sources
from pconv_jax.data.base import ImageSource
from pconv_jax.data.mask_folder import MaskFolder
from pconv_jax.evaluate import methods as methods_lib
from pconv_jax.evaluate.comparison import compare
from pconv_jax.evaluate.eval_set import (
    BIN_CLASSES,
    SHAPE_CLASSES,
    EvalSet,
    MaskClass,
)
from pconv_jax.evaluate.learned import LearnedMetrics
from pconv_jax.evaluate.methods import Network, network_name
from pconv_jax.evaluate.results import Evaluation
from pconv_jax.runs import opening
from pconv_jax.runs.config import read_settings
from pconv_jax.runs.settings import Settings
from pconv_jax.unet import PConvUNet

DEFAULT_METHODS = ("network", "mean", "telea", "navier_stokes")
"""The methods that `evaluate_run` compares by default, the fast ones."""


@dataclasses.dataclass(frozen=True)
class EvalData:
    """The data that `evaluate_run` evaluates on. By default, the run's own.

    Attributes:
      images: A folder or a tar file of images. None (the default) takes the validation
        split of the run's settings, or scikit-image's photos for weights without
        settings.
      masks: A folder of mask images. None (the default) draws masks.
      hole_color: Color of the holes in ``masks``. The default is ``'white'``.
      image_size: Side of the square images, in pixels. None (the default) takes the
        run's.
      examples: Number of examples of each class of masks. None (the default) takes the
        run's.
      seed: Seed of the drawn masks and of the intervals. The default is 0.
      classes: The classes of the drawn masks: ``'bins'`` for the twelve of the paper,
        ``'thin'`` and ``'wide'``. None (the default) is all of them. A folder of masks
        has its own.
    """

    images: str | None = None
    masks: str | None = None
    hole_color: Literal["white", "black"] = "white"
    image_size: int | None = None
    examples: int | None = None
    seed: int = 0
    classes: Sequence[str] | None = None


def evaluate_network(
    model: PConvUNet,
    variables: Mapping[str, Any],
    source: ImageSource,
    *,
    image_size: int,
    examples: int,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Evaluate one network on drawn masks of the paper's twelve classes.

    Args:
      model: The network.
      variables: Its ``params`` and ``batch_stats``.
      source: The images; see `EvalSet`.
      image_size: Side of the squares after resizing, in pixels.
      examples: Number of examples of each of `BIN_CLASSES`.
      seed: Seed of the masks and of the intervals. The default is 0.
      progress: Whether to show a progress bar (the default).

    Raises:
      UserError: If the network does not accept the image size, or too many images
        cannot be read.
    """
    eval_set = EvalSet(source, image_size=image_size, examples=examples, seed=seed)
    network = Network(network_name(model), model, variables)
    return compare([network], eval_set, progress=progress)


def evaluate_run(
    workdir: str | Path | None = None,
    *,
    weights: str | None = None,
    step: int | None = None,
    config: ConfigDict | Settings | None = None,
    data: EvalData = EvalData(),
    methods: Sequence[str] = DEFAULT_METHODS,
    time_budget: float = 60.0,
    learned: bool = True,
    vgg: str | None = None,
    device_batch: int = 1,
    out: str | Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Compare the network of a run, or other weights, with baselines; write a report.

    It writes these files:

    * ``report.html``: a page with all results;
    * ``results.json``: all results. It is the same for the same arguments on any number
      of devices, unless a baseline exceeds its time budget;
    * ``timing.json``, ``results.md`` and ``examples.csv``;
    * ``pictures.png`` and ``worst.png``: the median and the worst example of each hole
      bin, and of thin and wide holes;
    * ``records/``: the records, from which the same call resumes after an interruption.

    Args:
      workdir: Directory of the run.
      weights: Name or path of weights to evaluate instead; see
        `pretrained.from_pretrained`.
      step: Step of the checkpoint. None (the default) takes the newest.
      config: Settings that select the evaluation data, or a config with them. None
        (the default) takes those of the network, or the paper's if it has none.
      data: Changes of the evaluation data. By default there are none.
      methods: Methods to compare; see `methods.get_methods`. `DEFAULT_METHODS` by
        default.
      time_budget: Seconds that a baseline may take for an image. The default is 60.
      learned: Whether to compute LPIPS, FID, Inception Score and the perceptual
        distance by ImageNet's VGG16 (the default), if the weights of their networks are
        available or can be downloaded.
      vgg: Weights of another VGG for the perceptual distance, see `load_vgg_params`.
        They do not depend on ``learned``. There are none by default.
      device_batch: Number of images that a device computes at a time, for networks and
        learned metrics. With 1, the default, results are the same on any number of
        devices. Accelerators are faster with more.
      out: Output directory. By default ``evaluation`` in the workdir, or for weights
        ``runs/NAME-evaluation``, where NAME is the file's name without its suffix.
      progress: Whether to show a progress bar (the default).

    Raises:
      UserError: If the run, the checkpoint or the weights do not exist, an argument is
        invalid, the default output directory has results of other weights, or as
        `compare`.
      RunError: If a file cannot be written.
    """
    if device_batch < 1:
        raise UserError(f"device_batch must be positive, got {device_batch}.")
    # It needs matplotlib and Jinja2, which validation during training does not. A
    # missing one should be noticed before hours of work.
    from pconv_jax.evaluate import output

    trained, default_out = _load(workdir, weights, step)
    # The settings of other people's weights name image folders that exist only there.
    bundled = weights is not None and config is None
    settings = trained.settings or Settings()
    if config is not None:
        settings = read_settings(config)
    eval_set = _open_eval_set(settings, data, bundled=bundled)
    network = Network(
        network_name(trained.model),
        trained.model,
        trained.variables,
        info=trained.info,
        device_batch=device_batch,
    )
    digest = network.digest
    if weights is not None and not out:
        _check_same_weights(default_out, digest, weights)
    chosen = methods_lib.get_methods(methods, network, time_budget=time_budget)
    networks = None
    if learned or vgg:
        networks = LearnedMetrics(
            image_size=eval_set.image_size,
            published=learned,
            vgg_weights=vgg,
            device_batch=device_batch,
        )
    out = _files.as_path(out or default_out)
    try:
        evaluation = compare(
            chosen,
            eval_set,
            learned=networks,
            directory=out / "records",
            progress=progress,
        )
        about = {"step": trained.step, "weights_digest": digest}
        about |= {"config": settings.to_dict(), "warnings": trained.warnings}
        about |= {"vgg": Path(vgg).name} if vgg else {}
        output.write_results(out, evaluation, eval_set, chosen, about=about)
    finally:
        for method in chosen:
            method.close()
    return evaluation


def _load(
    workdir: str | Path | None, weights: str | None, step: int | None
) -> tuple[opening.Trained, Path]:
    """Load the network to evaluate; also return the default output directory."""
    if workdir is not None and weights is None:
        out = _files.as_path(workdir) / "evaluation"
        return opening.load_run(workdir, step=step), out
    if weights is None or workdir is not None:
        raise UserError("give either workdir or weights: the network to evaluate.")
    if step is not None:
        raise UserError("step selects a checkpoint of workdir, but weights have none.")
    out = Path("runs") / f"{Path(weights).stem}-evaluation"
    return opening.load_weights(weights), out


def _check_same_weights(folder: Path, digest: str, weights: str) -> None:
    """Check that a folder has no results of other weights, which would be replaced."""
    try:
        found = json.loads((folder / "results.json").read_bytes()).get("weights_digest")
    except (OSError, ValueError, AttributeError):
        return  # There are no results that anybody could read.
    if found is not None and found != digest:  # Older results do not tell.
        raise UserError(
            f"out: {folder} has the results of other weights than {weights}; give "
            "another folder (--out)."
        )


def _open_eval_set(settings: Settings, data: EvalData, *, bundled: bool) -> EvalSet:
    """Open the evaluation data: what ``data`` says, else what the settings say."""
    classes = _read_classes(data)
    if data.images:
        source = sources.open_images(data.images)
    elif bundled:
        source = sources.open_source("bundled", split="validation")
    else:
        source = opening.get_source(settings.data, "validation")
    size, examples = settings.image_size, settings.evaluation_examples
    mask_folder = None
    if data.masks:
        mask_folder = MaskFolder(data.masks, hole_color=data.hole_color)
    return EvalSet(
        source,
        image_size=size if data.image_size is None else data.image_size,
        examples=examples if data.examples is None else data.examples,
        seed=data.seed,
        classes=classes,
        mask_folder=mask_folder,
    )


def _read_classes(data: EvalData) -> tuple[MaskClass, ...]:
    """Find the classes of the drawn masks by their names."""
    groups = {"bins": BIN_CLASSES} | {c.hole: (c,) for c in SHAPE_CLASSES}
    if data.classes is None:
        return BIN_CLASSES + SHAPE_CLASSES
    if data.masks:
        raise UserError("classes are of drawn masks, but masks names a folder.")
    unknown = [name for name in data.classes if name not in groups]
    if unknown or not data.classes:
        raise UserError(
            f"classes must be some of {', '.join(groups)}, got "
            f"{', '.join(unknown) or 'none'}."
        )
    chosen = (group for name, group in groups.items() if name in data.classes)
    return tuple(itertools.chain(*chosen))
