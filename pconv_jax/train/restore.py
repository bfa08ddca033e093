"""The state that a run starts from: a checkpoint, other weights, or new ones."""

import contextlib
import dataclasses
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np

from pconv_jax import _files
from pconv_jax._errors import UserError
from pconv_jax.runs import parallel
from pconv_jax.runs.checkpoint import Checkpoints, restore_network
from pconv_jax.runs.settings import Settings, differences
from pconv_jax.train.experiment import Experiment
from pconv_jax.train.step import TrainState
from pconv_jax.unet import model_config, model_differences
from pconv_jax.weights import pretrained

# The parts of a state that a checkpoint stores, each as an item of its own.
ITEMS = ("params", "batch_stats", "opt_state", "average")

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def lock_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """Keep other runs out of a workdir; each would resume the other's checkpoints.

    This happens if a command is given again before the run that it should resume has
    stopped. The lock of a process ends with the process, however that ends.

    Raises:
      UserError: If another process holds the lock.
    """
    if parallel.process_index() > 0:  # The first process holds it for all.
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(workdir / ".lock").acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(
            f"workdir {workdir} is in use by a process that trains there: wait until "
            "it has ended, or use another workdir."
        ) from error
    with lock:
        yield


def check_workdir(workdir: pathlib.Path, settings: Settings) -> None:
    """Check that a workdir is new, or belongs to this experiment.

    Raises:
      UserError: If its run has other settings, naming those that differ.
    """
    path = workdir / "config.json"
    if not path.exists() or not any((workdir / "checkpoints").glob("*")):
        return  # No step was saved yet, so the settings may still be corrected.
    old = Settings.from_json(json.loads(path.read_text()))
    if changed := differences(old, settings):
        changes = "; ".join(f"{k}: {a!r}, now {b!r}" for k, (a, b) in changed.items())
        raise UserError(
            f"workdir {workdir} belongs to another configuration ({changes}). Use "
            "another workdir, or start from this one's weights with init_from."
        )


def restore_or_create(
    experiment: Experiment, checkpoints: Checkpoints, workdir: pathlib.Path
) -> TrainState:
    """Read the state of the newest checkpoint, or make the first state.

    Args:
      experiment: The experiment.
      checkpoints: Checkpoints of the run.
      workdir: Directory of the run, for errors.

    Raises:
      UserError: If the checkpoint belongs to another network or loss, if processes read
        different checkpoints, or if there are no weights in ``init_from``.
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
        _check_network(experiment, meta, f"workdir {workdir}")
        _check_features(experiment, meta, workdir)
        _logger.info("Resuming from step %d.", step)
        return TrainState(step=jnp.asarray(step, jnp.int32), **items)
    state = experiment.create_state()
    if experiment.settings.init_from is None:
        return state
    variables = _read_initial(experiment, targets)
    average = dict(variables) if state.average else {}
    return dataclasses.replace(state, **variables, average=average)


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
    ours = experiment.identity["features"]
    if (theirs := meta.get("features", ours)) != ours:
        raise UserError(
            f"workdir {workdir} was trained with other VGG features: {theirs}, now "
            f"{ours}. What vgg = {experiment.settings.vgg!r} finds may have changed; "
            "name the file, or use another workdir."
        )
