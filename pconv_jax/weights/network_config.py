"""The configuration of a network, which is stored with its weights as JSON.

A configuration says nothing about the images that a network takes. Their channels are
known from the kernel of its first layer.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np

from pconv_jax._errors import UserError
from pconv_jax._files import FileContentError
from pconv_jax.unet import Normalization, PConvUNet, Stage, unet_from_stages

_FIELDS = ("conv", "stages", "normalization", "sigmoid_head")
_MAX_STAGES = 100  # Of the encoder, and of the decoder.

# What JAX and Flax raise for a network of impossible sizes or wrong types.
_IMPOSSIBLE = (ArithmeticError, LookupError, TypeError, ValueError)
_IMPOSSIBLE += (flax.errors.FlaxError,)


def model_config(model: PConvUNet) -> dict[str, Any]:
    """Describe the function a network computes, as values that JSON can hold.

    Fields that affect only how it is computed, such as the dtype, are left out.
    """
    return {
        "conv": model.conv,
        "stages": [
            [stage._asdict() for stage in side]
            for side in (model.encoder, model.decoder)
        ],
        "normalization": model.normalization and model.normalization._asdict(),
        "sigmoid_head": model.sigmoid_head,
    }


def model_from_config(config: Any, source: str | Path) -> PConvUNet:
    """Make a network from its configuration.

    Args:
      config: Configuration from `model_config`, also after a round trip through JSON.
      source: The file it was read from, for the error message.

    Returns:
      The network.

    Raises:
      UserError: If it is not the configuration of a network.
    """
    try:
        fields = _check_names(config, _FIELDS, needed={"stages", "normalization"})
        encoder, decoder = map(_read_stages, _check_list(fields.pop("stages"), 2))
        if fields["normalization"] is not None:
            names = Normalization._fields
            values = _check_names(fields["normalization"], names, needed=names)
            fields["normalization"] = Normalization(**values)
        return unet_from_stages(encoder, decoder, **fields)
    except FileContentError as error:
        raise UserError(
            f"{source} has the configuration of no network that is known here: {error}."
        ) from error


def _read_stages(values: Any) -> tuple[Stage, ...]:
    stages = _check_list(values)
    if not 0 < len(stages) <= _MAX_STAGES:
        raise FileContentError(
            f"it has {len(stages)} stages, and must have 1 to {_MAX_STAGES}"
        )
    needed = {"features", "kernel_size"}
    return tuple(Stage(**_check_names(s, Stage._fields, needed=needed)) for s in stages)


def _check_names(
    values: Any, known: Collection[str], *, needed: Collection[str]
) -> dict[str, Any]:
    """Check that values are a dict whose names are known and complete."""
    if not isinstance(values, Mapping) or not set(needed) <= set(values) <= set(known):
        raise FileContentError(
            f"expected values named {', '.join(known)}, got {values!r:.100}"
        )
    return dict(values)


def _check_list(values: Any, length: int | None = None) -> list[Any] | tuple[Any, ...]:
    if not isinstance(values, list | tuple) or length not in (None, len(values)):
        raise FileContentError(f"expected a list, got {values!r:.100}")
    return values


def input_channels(model: PConvUNet, first_kernel: np.ndarray | jax.Array) -> int:
    """Count the channels of the images that a network takes.

    Args:
      model: The network.
      first_kernel: Kernel of its first layer, ``[H, W, C_in, features]``.
    """
    channels = first_kernel.shape[2]
    # The first standard convolution also takes the mask.
    return channels - 1 if model.conv == "standard" else channels


def variable_shapes(
    model: PConvUNet, first_kernel: np.ndarray | None, source: str | Path
) -> dict[str, Any]:
    """Compute the shapes of a network's variables.

    Args:
      model: The network.
      first_kernel: Kernel of its first layer, ``[H, W, C_in, features]``. If it is
        missing or of another rank, the network takes three channels.
      source: The file that describes the network, for the error message.

    Returns:
      A tree of `jax.ShapeDtypeStruct` like the variables that ``model.init`` makes.

    Raises:
      UserError: If there can be no such network.
    """
    channels = 3
    if first_kernel is not None and first_kernel.ndim == 4:
        channels = input_channels(model, first_kernel)
    size = model.size_multiple
    try:
        images, mask = (
            jax.ShapeDtypeStruct((1, size, size, n), jnp.float32) for n in (channels, 1)
        )
        return jax.eval_shape(model.init, jax.random.key(0), images, mask)
    except _IMPOSSIBLE as error:
        raise UserError(f"{source} describes an impossible network: {error}") from error


def model_differences(config: Mapping[str, Any] | None, model: PConvUNet) -> list[str]:
    """List the fields of a configuration in which a network differs from it.

    Args:
      config: Configuration from `model_config`, also after a round trip through JSON.
        None is equal to that of any network.
      model: The network.

    Returns:
      Names of fields; empty if there is no difference.
    """
    ours = json.loads(json.dumps(model_config(model)))
    theirs = ours if config is None else json.loads(json.dumps(config))
    return [name for name in ours if theirs.get(name) != ours[name]]
