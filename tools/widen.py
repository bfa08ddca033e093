"""Makes a trained network wider: the same output, with room to learn more.

    python tools/widen.py runs/release-ragged wide.safetensors --width=48

Adds features to every stage. What was there does not see them: their weights into it
are zero, where training can start from, while those into themselves are drawn as for a
new network. So training goes on where it was (`config.init_from`), instead of from the
beginning; cf. Chen et al. 2016, "Net2Net", which copies features instead.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pconv_jax import unet
from pconv_jax.runs import opening
from pconv_jax.unet import PConvUNet, paper_stages
from pconv_jax.weights import pretrained


def widen(
    model: PConvUNet, variables: Mapping[str, Any], *, width: int, key: jax.Array
) -> tuple[PConvUNet, dict[str, Any]]:
    """Returns a wider network that gives the same output, or nearly so.

    Of partial convolutions it is the same where nothing is missing. The last one counts
    valid values of the image and of the features below together, and as there are more
    features, the image counts less.

    Args:
      model: the network, of the paper's stages.
      variables: its ``params`` and ``batch_stats``.
      width: features of its first stage, then.
      key: of the weights that are drawn.

    Raises:
      ValueError: if the network has stages of its own, or is not narrower.
    """
    depth, before = len(model.encoder), model.encoder[0].features
    stages = paper_stages(depth=depth, width=before, out_features=model.out_features)
    if (tuple(model.encoder), tuple(model.decoder)) != stages or before >= width:
        raise ValueError(
            "model must have the paper's stages, and fewer features in the first than "
            f"width = {width}, got {unet.model_config(model)['stages']}."
        )
    wide = model.clone(stages=None, depth=depth, width=width)
    size = 2 * model.size_multiple
    images = jnp.zeros((1, size, size, model.out_features))
    drawn = jax.jit(wide.init)(key, images, jnp.ones((1, size, size, 1)))
    arrays = traverse_util.flatten_dict(jax.tree.map(np.array, drawn))
    old = traverse_util.flatten_dict(dict(variables))
    inputs = dict(zip(_names(model), zip(_inputs(model), _inputs(wide))))
    for path, array in old.items():
        kept = slice(array.shape[-1])
        if path[1] == "head":  # It is as wide as the output.
            arrays[path] = array
        elif path[-1] == "kernel":
            arrays[path][..., kept] = 0
            arrays[path][:, :, _places(*inputs[path[1]]), kept] = array
        else:
            arrays[path][kept] = array
    return wide, traverse_util.unflatten_dict(arrays)


def _names(model: PConvUNet) -> list[str]:
    return [f"pconv{i + 1}" for i in range(len(model.encoder) + len(model.decoder))]


def _inputs(model: PConvUNet) -> list[Sequence[int]]:
    """Returns the channels of each convolution's sources, in the order of `_names`."""
    first = model.out_features + (model.conv == "standard")  # The image, and the mask.
    encoder = [first, *(stage.features for stage in model.encoder)]
    below = [encoder[-1], *(stage.features for stage in model.decoder[:-1])]
    skips = reversed(encoder[:-1])
    return [(channels,) for channels in encoder[:-1]] + list(zip(below, skips))


def _places(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """Returns where the old channels are among the new ones, source by source."""
    starts = np.cumsum([0, *new[:-1]])
    return [start + i for start, channels in zip(starts, old) for i in range(channels)]


def main() -> None:
    """Writes what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="the workdir of a run, or a release")
    parser.add_argument("out", help="the release to write")
    parser.add_argument("--width", type=int, help="of the result; by default twice")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    arguments = parser.parse_args()
    try:
        trained = opening.load_network(arguments.source)
        model, variables = widen(
            trained.model,
            trained.variables,
            width=arguments.width or 2 * trained.model.encoder[0].features,
            key=jax.random.key(arguments.seed),
        )
        pretrained.save_pretrained(arguments.out, model, variables)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{arguments.out}: a network of width {model.width}.")


if __name__ == "__main__":
    main()
