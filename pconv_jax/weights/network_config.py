"""The configuration of a network, which is stored with its weights as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pconv_jax._errors import UserError
from pconv_jax.unet import Normalization, PConvUNet, Stage, unet_from_stages


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


def model_from_config(config: Mapping[str, Any], source: str | Path) -> PConvUNet:
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
        fields = dict(config)
        encoder, decoder = (
            tuple(Stage(**stage) for stage in side) for side in fields.pop("stages")
        )
        if fields["normalization"]:
            fields["normalization"] = Normalization(**fields["normalization"])
        return unet_from_stages(encoder, decoder, **fields)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{source} has the configuration of no network that is known here: {error}."
        ) from error


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
