"""Networks and images that settings describe, and networks of runs and files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from pconv_jax import __version__, _files
from pconv_jax._errors import UserError
from pconv_jax.data import sources
from pconv_jax.data.base import ImageSource
from pconv_jax.runs.checkpoint import restore_network
from pconv_jax.runs.settings import DataSettings, ModelSettings, Settings
from pconv_jax.unet import IMAGENET, PConvUNet
from pconv_jax.weights import pretrained
from pconv_jax.weights.network_config import model_differences, model_from_config


class Trained(NamedTuple):
    """A trained network, from a run or a weights file.

    Attributes:
      model: The network.
      variables: Its ``params`` and ``batch_stats``.
      settings: Settings of its experiment, or None if they are unknown.
      step: Step of the checkpoint, or None for a weights file.
      warnings: Warnings of the training.
      info: Facts of the weights file; empty for a run.
    """

    model: PConvUNet
    variables: Mapping[str, Any]
    settings: Settings | None
    step: int | None
    warnings: list[str]
    info: Mapping[str, Any]


def get_model(settings: ModelSettings) -> PConvUNet:
    """Build the network of an experiment."""
    return PConvUNet(
        depth=settings.depth,
        width=settings.width,
        conv=settings.conv,
        normalization=IMAGENET if settings.normalization == "imagenet" else None,
        dtype=None if settings.dtype == "float32" else jnp.dtype(settings.dtype),
    )


def get_source(settings: DataSettings, split: str) -> ImageSource:
    """Open the images of an experiment.

    Args:
      settings: Where they are.
      split: ``'train'`` or ``'validation'``.

    Raises:
      UserError: If they need a path and there is none, and as `open_source`.
    """
    path, validation_path = settings.path, settings.validation_path
    if settings.source in ("folder", "tar") and not path:
        raise UserError(
            f"config: data.path is needed for data.source={settings.source}."
        )
    if settings.source == "folder":
        path = _one("path", path)
        validation_path = _one("validation_path", validation_path)
    return sources.open_source(
        settings.source,
        split=split,
        path=path,
        validation_path=validation_path,
        name=settings.name,
        data_dir=settings.data_dir,
        feature=settings.feature,
        train_split=settings.train_split,
        validation_split=settings.validation_split,
        validation_fraction=settings.validation_fraction,
    )


def load_run(workdir: str | Path, *, step: int | None = None) -> Trained:
    """Read the network of a run.

    Args:
      workdir: Directory of the run.
      step: Step of the checkpoint. None reads the newest.

    Raises:
      UserError: If there is no such run or checkpoint, or if its network is not a
        `PConvUNet`.
    """
    restored = restore_network(_files.as_path(workdir) / "checkpoints", step=step)
    if restored is None:
        raise UserError(f"workdir: there is no checkpoint in {workdir}/checkpoints.")
    step, variables, meta = restored
    if (kind := meta.get("network", PConvUNet.__name__)) != PConvUNet.__name__:
        raise UserError(
            f"workdir: {workdir} holds a {kind}, a class that the settings do not "
            "describe. Build the network, and use checkpoint.restore_network."
        )
    settings = Settings.from_json(meta["config"])
    model = get_model(settings.model)
    if model_differences(meta.get("model"), model):  # The run was given a network.
        model = model_from_config(meta["model"], workdir).clone(dtype=model.dtype)
    return Trained(model, variables, settings, step, meta["warnings"], {})


def load_weights(name_or_path: str | Path) -> Trained:
    """Read a network from a weights file; see `pretrained.from_pretrained`.

    Raises:
      UserError: As `pretrained.from_pretrained`, or if the network does not output RGB
        images.
    """
    model, variables, info = pretrained.from_pretrained(name_or_path)
    channels = model.decoder[-1].features
    if channels != 3:
        raise UserError(
            f"weights: {name_or_path} is a network of {channels} channel(s), and "
            "images have 3."
        )
    experiment = info.get("experiment")
    settings = Settings.from_json(experiment) if experiment else None
    warnings = list(info.get("warnings", ()))
    return Trained(model, variables, settings, None, warnings, info)


def load_network(place: str | Path) -> Trained:
    """Read a network from the workdir of a run, or from a weights file.

    Raises:
      UserError: As `load_run` and `load_weights`.
    """
    is_run = _files.as_path(place).is_dir()
    return load_run(place) if is_run else load_weights(place)


def describe_run(experiment: Mapping[str, Any], step: int | None) -> dict[str, Any]:
    """Describe where a network comes from, for its weights file.

    Args:
      experiment: Settings of the run, from `Settings.to_dict`.
      step: Step of the checkpoint.
    """
    return {
        "origin": f"pconv_jax {__version__}, step {step}",
        "training_data": experiment["data"],
        "experiment": experiment,
    }


def _one(name: str, paths: tuple[str, ...] | None) -> str | None:
    if paths and len(paths) > 1:
        raise UserError(f"config: data.{name} must be one folder, got {list(paths)}.")
    return paths[0] if paths else None
