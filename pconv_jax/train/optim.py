"""The optimizer of both training phases.

Reference: Liu et al. 2018, section 4.1: Adam, first with a learning rate of 2e-4, then
with 5e-5 and the encoder's batch normalization frozen.
"""

from collections.abc import Collection
from typing import Any

import jax
import optax


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule, *, frozen: Collection[str] = ()
) -> optax.GradientTransformation:
    """Make Adam with some submodules frozen.

    Args:
      learning_rate: A number, or a function of the number of updates.
      frozen: Names of top-level submodules whose parameters do not change, such as
        `PConvUNet.encoder_norms`. By default none.

    Returns:
      The optimizer. The structure of its state does not depend on ``frozen``.
    """

    def is_frozen(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[0].key in frozen, params
        )

    return optax.chain(
        optax.adam(learning_rate), optax.masked(optax.set_to_zero(), is_frozen)
    )
