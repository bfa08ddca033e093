"""The optimizer of both training phases.

Reference: Liu et al. 2018, section 4.1: Adam, first with a learning rate of 2e-4, then
with 5e-5 and the encoder's batch normalization frozen.
"""

import math
from collections.abc import Collection
from typing import Any

import jax
import optax


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    frozen: Collection[str] = (),
    clip_norm: float = 0.0,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Make Adam with some submodules frozen.

    Args:
      learning_rate: A number, or a function of the number of updates.
      frozen: Names of top-level submodules whose parameters do not change, such as
        `PConvUNet.encoder_norms`. By default none.
      clip_norm: Largest norm of the gradient, which is scaled down to it. The default,
        0, sets no limit.
      weight_decay: Decay of the kernels (Loshchilov and Hutter 2019, "Decoupled weight
        decay regularization"). Biases and normalization do not decay. The default is 0.

    Returns:
      The optimizer. The structure of its state does not depend on ``frozen``.

    Raises:
      ValueError: If ``frozen`` is one string; and from the optimizer, if parameters
        have no submodule of a name.
    """
    if isinstance(frozen, str):
        raise ValueError(f"frozen must be a collection of names, got {frozen!r}.")

    def is_frozen(params: Any) -> Any:
        if unknown := set(frozen) - set(params):
            raise ValueError(f"frozen: there is no submodule {sorted(unknown)[0]}.")
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[0].key in frozen, params
        )

    def is_kernel(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, params)

    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    adam = (
        optax.adamw(learning_rate, weight_decay=weight_decay, mask=is_kernel)
        if weight_decay
        else optax.adam(learning_rate)
    )
    freeze = optax.masked(optax.set_to_zero(), is_frozen)
    return optax.chain(*clip, adam, freeze)


def schedule_factor(
    step: int, *, steps: int, warmup_steps: int = 0, schedule: str = "constant"
) -> float:
    """Compute the factor of the learning rate at an update of a phase.

    Args:
      step: Number of updates of the phase before this one.
      steps: Number of updates of the phase.
      warmup_steps: Updates at the start over which the factor rises linearly to 1,
        which it has at the last of them. The default is 0.
      schedule: ``'constant'`` (the default), or ``'cosine'``: after the warm-up, the
        factor falls from 1 along half a period of a cosine (Loshchilov and Hutter 2017,
        "SGDR"), and would be 0 after the last update.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    part = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * part))
