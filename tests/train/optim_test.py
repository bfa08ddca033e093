import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pconv_jax.train import optim

PARAMS = {
    "pconv1": {"kernel": jnp.ones((3,)), "bias": jnp.zeros((2,))},
    "bn2": {"scale": jnp.ones((4,)), "bias": jnp.zeros((4,))},
}

GRADS = jax.tree.map(lambda x: jnp.arange(1.0, 1 + x.size) * (-1) ** x.size, PARAMS)


@pytest.mark.parametrize("frozen", [(), ("bn2",), ("pconv1", "bn2")])
def test_first_step_of_adam_is_the_learning_rate_and_frozen_stays(frozen):
    optimizer = optim.make_optimizer(1e-3, frozen=frozen)
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS)
    for name, leaves in updates.items():
        for leaf, update in leaves.items():
            # Bias-corrected moments of one gradient g: g / (|g| + 1e-8).
            expected = -1e-3 * np.sign(GRADS[name][leaf]) * (name not in frozen)
            np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_state_does_not_depend_on_what_is_frozen():
    states = [
        optim.make_optimizer(rate, frozen=frozen).init(PARAMS)
        for rate, frozen in ((2e-4, ()), (5e-5, ("bn2",)))
    ]
    chex.assert_trees_all_equal(*states)


def test_frozen_parameters_do_not_move_by_old_momentum():
    first = optim.make_optimizer(1e-3)
    _, state = first.update(GRADS, first.init(PARAMS), PARAMS)
    second = optim.make_optimizer(1e-3, frozen=("bn2",))
    updates, _ = second.update(GRADS, state, PARAMS)
    chex.assert_trees_all_equal(
        updates["bn2"], jax.tree.map(jnp.zeros_like, PARAMS["bn2"])
    )
    assert all(jnp.all(u != 0) for u in updates["pconv1"].values())
