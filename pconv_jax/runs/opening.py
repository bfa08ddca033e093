"""Opens what settings describe: networks, images and trained weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from pconv_jax import unet
from pconv_jax.data import sources
from pconv_jax.data.base import ImageSource
from pconv_jax.runs.checkpoint import restore_network
from pconv_jax.unet import IMAGENET, PConvUNet
from pconv_jax.weights import pretrained


def get_model(config: ConfigDict) -> PConvUNet:
    """Returns the network of an experiment."""
    dtype = None if config.model.dtype == "float32" else jnp.dtype(config.model.dtype)
    return PConvUNet(
        depth=config.model.depth,
        width=config.model.width,
        conv=config.model.conv,
        normalization=IMAGENET if config.model.normalization == "imagenet" else None,
        dtype=dtype,
    )


def get_source(config: ConfigDict, split: str) -> ImageSource:
    """Opens the pictures of an experiment, of the split 'train' or 'validation'."""
    fields = {n: None if value == "" else value for n, value in config.data.items()}
    kind = fields.pop("source")
    for name in ("workers", "scale"):  # Of the pipeline, not of the source.
        del fields[name]
    for name in ("path", "validation_path"):
        if kind == "tar" and fields[name]:
            fields[name] = fields[name].split(",")
    return sources.open_source(kind, split=split, **fields)


class Trained(NamedTuple):
    """A network from a file.

    Attributes:
      model: the network.
      variables: its ``params`` and ``batch_stats``.
      config: of the experiment that it is from, if that is known.
      about: where it is from, JSON-able.
    """

    model: PConvUNet
    variables: Mapping[str, Any]
    config: ConfigDict | None
    about: dict[str, Any]


def load_run(workdir: str | Path, *, step: int | None = None) -> Trained:
    """Reads the network of a run.

    Args:
      workdir: of the run.
      step: which checkpoint; None for the newest.

    Raises:
      ValueError: if there is no such run or checkpoint, or if its network is of another
        class than `PConvUNet`.
    """
    restored = restore_network(Path(workdir) / "checkpoints", step=step)
    if restored is None:
        raise ValueError(f"workdir: there is no checkpoint in {workdir}/checkpoints.")
    step, variables, meta = restored
    if (kind := meta.get("network", PConvUNet.__name__)) != PConvUNet.__name__:
        raise ValueError(
            f"workdir: {workdir} is of a {kind}, a network that its experiment does "
            "not tell of; build it, and use checkpoint.restore_network."
        )
    config = ConfigDict(meta["config"])
    model = get_model(config)
    if unet.model_differences(meta.get("model"), model):  # It was built by hand.
        model = unet.model_from_config(meta["model"], workdir).clone(dtype=model.dtype)
    about = {"step": step, "warnings": meta["warnings"]}
    return Trained(model, variables, config, about)


def load_release(source: str | Path) -> Trained:
    """Reads a network from a file, or wherever `pretrained.from_pretrained` finds it.

    Raises:
      ValueError: as `from_pretrained`; or if the network is not of pictures.
    """
    model, variables, info = pretrained.from_pretrained(source)
    channels = model.decoder[-1].features
    if channels != 3:
        raise ValueError(
            f"weights: {source} is a network of {channels} channel(s), and pictures "
            "have 3."
        )
    config = info.get("experiment")
    about = {"step": None, "warnings": list(info.get("warnings", ()))}
    return Trained(model, variables, config and ConfigDict(config), about)


def load_network(source: str | Path) -> Trained:
    """Reads the network of a run, by its workdir, or of a release.

    Raises:
      ValueError: as `load_run` and `load_release`.
    """
    return (load_run if Path(source).is_dir() else load_release)(source)
