"""Widens a trained network: the same output, with more features to train.

    python tools/widen.py runs/release-ragged wide.safetensors --width=48

It adds features to every stage. At first, the new features do not affect the old ones:
the weights from new to old features are zero, and training can change them. The weights
into new features are drawn as for a new network. So training (with `config.init_from`)
continues from the trained network. Compare Chen et al. 2016, "Net2Net", which copies
features instead.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pconv_jax._errors import RunError, UserError
from pconv_jax.unet import PConvUNet, paper_stages
from pconv_jax.weights.network_config import model_config
from pconv_jax.weights.pretrained import from_pretrained, save_pretrained


def widen(
    model: PConvUNet, variables: Mapping[str, Any], *, width: int, key: jax.Array
) -> tuple[PConvUNet, dict[str, Any]]:
    """Widen a network, so that the output stays the same or nearly so.

    With partial convolutions, the output is the same where nothing is missing. The last
    layer counts the valid values of the image and of the features below together. If
    there are more features, the image has less weight.

    Args:
      model: The network, with the paper's stages.
      variables: Its ``params`` and ``batch_stats``.
      width: Features of the first stage of the wider network.
      key: Random key of the new weights.

    Returns:
      The wider network and its variables.

    Raises:
      UserError: If the network does not have the paper's stages, or is not narrower.
    """
    depth, before = len(model.encoder), model.encoder[0].features
    stages = paper_stages(depth=depth, width=before, out_features=model.out_features)
    if (tuple(model.encoder), tuple(model.decoder)) != stages or before >= width:
        raise UserError(
            "model must have the paper's stages, and fewer features in the first than "
            f"width = {width}, got {model_config(model)['stages']}."
        )
    wide = model.clone(stages=None, depth=depth, width=width)
    size = 2 * model.size_multiple
    images = jnp.zeros((1, size, size, model.out_features))
    drawn = jax.jit(wide.init)(key, images, jnp.ones((1, size, size, 1)))
    arrays = _flatten(jax.tree.map(np.array, drawn))
    old = _flatten(variables)
    inputs = dict(zip(_names(model), zip(_inputs(model), _inputs(wide))))
    for path, array in old.items():
        kept = slice(array.shape[-1])
        if path[1] == "head":  # It is only as wide as the output.
            arrays[path] = array
        elif path[-1] == "kernel":
            arrays[path][..., kept] = 0
            arrays[path][:, :, _places(*inputs[path[1]]), kept] = array
        else:
            arrays[path][kept] = array
    return wide, traverse_util.unflatten_dict(arrays)


def _flatten(variables: Mapping[str, Any]) -> dict[tuple[str, ...], np.ndarray]:
    # Flax's annotation of the result has the types of empty nodes as well.
    return dict(traverse_util.flatten_dict(variables))  # pyright: ignore[reportReturnType]


def _names(model: PConvUNet) -> list[str]:
    """Name the convolutions, in order."""
    return [f"pconv{i + 1}" for i in range(len(model.encoder) + len(model.decoder))]


def _inputs(model: PConvUNet) -> list[Sequence[int]]:
    """List the channels of each convolution's operands, in the order of `_names`."""
    first = model.out_features + (model.conv == "standard")  # The image, and the mask.
    encoder = [first, *(stage.features for stage in model.encoder)]
    below = [encoder[-1], *(stage.features for stage in model.decoder[:-1])]
    skips = reversed(encoder[:-1])
    return [*((channels,) for channels in encoder[:-1]), *zip(below, skips)]


def _places(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """List the positions of the old channels among the new ones, by operand."""
    starts = np.cumsum([0, *new[:-1]]).tolist()
    return [start + i for start, channels in zip(starts, old) for i in range(channels)]


def main() -> None:
    """Widen the network that the command line names."""
    parser = argparse.ArgumentParser(
        description="Widen a trained network: the same output, with more features."
    )
    parser.add_argument("source", help="workdir of a run, or a weights file")
    parser.add_argument("out", help="weights file to write (.safetensors)")
    parser.add_argument(
        "--width",
        type=int,
        help="features of the first stage (default: twice as many as now)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the new weights (default: 0)"
    )
    arguments = parser.parse_args()
    try:
        model, variables = _load(arguments.source)
        model, variables = widen(
            model,
            variables,
            width=arguments.width or 2 * model.encoder[0].features,
            key=jax.random.key(arguments.seed),
        )
        save_pretrained(arguments.out, model, variables)
    except (UserError, RunError) as error:
        parser.error(str(error))
    print(f"{arguments.out}: a network of width {model.width}.")


def _load(source: str) -> tuple[PConvUNet, Mapping[str, Any]]:
    if not Path(source).is_dir():
        model, variables, _ = from_pretrained(source)
        return model, variables
    # A checkpoint needs the packages of training; weights need only those of the core.
    from pconv_jax.runs.opening import load_run

    trained = load_run(source)
    return trained.model, trained.variables


if __name__ == "__main__":
    main()
