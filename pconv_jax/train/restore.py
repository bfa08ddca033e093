"""The state that a run starts from: a checkpoint, other weights, or new ones."""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pconv_jax import _files
from pconv_jax._errors import UserError
from pconv_jax.runs import parallel
from pconv_jax.runs.checkpoint import Checkpoints, restore_network
from pconv_jax.runs.settings import Settings
from pconv_jax.train.experiment import Experiment
from pconv_jax.train.step import TrainState
from pconv_jax.train.workdir import refuse_differences
from pconv_jax.weights import pretrained
from pconv_jax.weights.network_config import model_config, model_differences

# The parts of a state that a checkpoint stores, each as an item of its own.
ITEMS = ("params", "batch_stats", "opt_state", "average")

_logger = logging.getLogger(__name__)


def restore_or_create(
    experiment: Experiment,
    checkpoints: Checkpoints,
    workdir: pathlib.Path,
    *,
    allow_other_images: bool = False,
) -> tuple[TrainState, list[dict[str, float]]]:
    """Read the state of the newest checkpoint, or make the first state.

    Args:
      experiment: The experiment.
      checkpoints: Checkpoints of the run.
      workdir: Directory of the run, for errors.
      allow_other_images: Whether the images may be others than those of the checkpoint,
        which is then a warning of the experiment. The default is False.

    Returns:
      The state, and the scalars of the steps that no line of the log has yet.

    Raises:
      UserError: If the checkpoint belongs to other settings, another network or loss,
        or other images, if processes read different checkpoints, or if there are no
        weights in ``init_from``.
    """
    shapes = jax.eval_shape(experiment.create_state)
    targets = {name: getattr(shapes, name) for name in ITEMS}
    restored = checkpoints.restore(targets)
    step = restored[0] if restored else -1
    if any(parallel.gather(np.array([step])) != step):
        raise UserError(
            "the processes of this run cannot read the same checkpoint in "
            f"{workdir / 'checkpoints'}; is it on a common file system?"
        )
    if restored:
        step, items, meta = restored
        if "config" in meta:
            old = Settings.from_json(meta["config"])
            refuse_differences(old, experiment.settings, workdir)
        _check_network(experiment, meta, f"workdir {workdir}")
        _check_features(experiment, meta, workdir)
        _check_images(experiment, meta, workdir, allow=allow_other_images)
        _keep_warnings(experiment, meta)
        _logger.info("Resuming from step %d.", step)
        state = TrainState(step=jnp.asarray(step, jnp.int32), **items)
        return state, meta.get("pending", [])
    state = experiment.create_state()
    if experiment.settings.init_from is None:
        return state, []
    variables = _read_initial(experiment, targets)
    average = dict(variables) if state.average else {}
    return dataclasses.replace(state, **variables, average=average), []


def _read_initial(experiment: Experiment, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Read ``params`` and ``batch_stats`` from ``init_from``."""
    source = _files.as_path(str(experiment.settings.init_from))
    if source.suffix == ".safetensors" or source.is_file():
        return _read_weights(experiment)
    directory = source / "checkpoints"
    targets = {name: targets[name] for name in ("params", "batch_stats")}
    restored = restore_network(directory, targets=targets)
    if not restored:
        raise UserError(f"init_from: there is no checkpoint in {directory}.")
    _, variables, meta = restored
    _check_network(experiment, meta, f"init_from: {source}")
    return variables


def _read_weights(experiment: Experiment) -> dict[str, Any]:
    path = experiment.settings.init_from
    weights = pretrained.from_pretrained(path)
    found = model_config(weights.model)
    if different := model_differences(found, experiment.model):
        raise UserError(
            f"init_from: the network of {path} has other {', '.join(different)} than "
            "the experiment's, which config.model sets; it has "
            f"{len(weights.model.encoder)} encoder stages of "
            f"{[stage.features for stage in weights.model.encoder]} features and the "
            f"normalization {weights.model.normalization}."
        )
    return weights.variables


def _check_network(experiment: Experiment, meta: Mapping[str, Any], what: str) -> None:
    ours = experiment.identity["network"]
    if (theirs := meta.get("network", ours)) != ours:
        raise UserError(f"{what} holds a {theirs}, not a {ours}.")
    if different := model_differences(meta.get("model"), experiment.model):
        raise UserError(
            f"{what} holds a network with other {', '.join(different)}. Give that "
            "network as model, or name another run."
        )


def _check_features(
    experiment: Experiment, meta: Mapping[str, Any], workdir: pathlib.Path
) -> None:
    ours, theirs = experiment.identity["features"], meta.get("features")
    # None where no phase has these terms, and in older checkpoints.
    if ours is not None and theirs is not None and theirs != ours:
        raise UserError(
            f"workdir {workdir} was trained with other VGG features: {theirs}, now "
            f"{ours}. What vgg = {experiment.settings.vgg!r} finds may have changed; "
            "name the file, or use another workdir."
        )


def _check_images(
    experiment: Experiment,
    meta: Mapping[str, Any],
    workdir: pathlib.Path,
    *,
    allow: bool,
) -> None:
    ours, theirs = experiment.identity["images"], meta.get("images", {})
    changed = changed_images(ours, meta)
    if not changed:
        return
    changes = []
    for split in changed:
        before, now = (images[split]["count"] for images in (theirs, ours))
        other = f", now {now}" if before != now else ", now with other names"
        changes.append(f"{split}: {before} images{other}")
    counts = "; ".join(changes)
    message = f"workdir {workdir} was trained on other images ({counts}). "
    if not allow:
        raise UserError(
            message + "Bring them back, use another workdir, or go on with "
            "--allow-other-images."
        )
    experiment.warnings.append(message + "The run went on with these.")
    _logger.warning(experiment.warnings[-1])


def changed_images(images: Mapping[str, Any], meta: Mapping[str, Any]) -> list[str]:
    """List the kinds of images that are others than those of a checkpoint.

    Args:
      images: From `experiment.identify_images`.
      meta: What the checkpoint says. Older ones do not say all.
    """
    theirs = meta.get("images", {})
    return [kind for kind in images if theirs.get(kind, images[kind]) != images[kind]]


def _keep_warnings(experiment: Experiment, meta: Mapping[str, Any]) -> None:
    """Put the warnings of a checkpoint before those of this process, each once."""
    # In place, since the checkpoints to come hold the same list.
    warnings = experiment.warnings
    warnings[:] = dict.fromkeys([*meta.get("warnings", ()), *warnings])
