import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
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


def test_a_gradient_longer_than_the_limit_is_scaled_down_to_it():
    norm = float(optax.tree.norm(GRADS))
    for limit in (0.5 * norm, 2 * norm):
        clipped = optim.make_optimizer(1e-3, clip_norm=limit)
        plain = optim.make_optimizer(1e-3)
        factor = min(1, limit / norm)
        scaled = jax.tree.map(lambda g, factor=factor: g * factor, GRADS)
        _, state = clipped.update(GRADS, clipped.init(PARAMS), PARAMS)
        _, expected = plain.update(scaled, plain.init(PARAMS), PARAMS)
        moments = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
        for a, b in moments:
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_only_kernels_that_are_not_frozen_decay():
    params = {
        "pconv1": {"kernel": jnp.full((2, 3), 5.0), "bias": jnp.full((3,), 5.0)},
        "head": {"kernel": jnp.full((2, 3), 5.0)},
    }
    grads = jax.tree.map(jnp.zeros_like, params)
    optimizer = optim.make_optimizer(0.1, weight_decay=0.3, frozen=("head",))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["pconv1"]["kernel"], -0.1 * 0.3 * 5, rtol=1e-6)
    np.testing.assert_array_equal(updates["pconv1"]["bias"], 0)
    np.testing.assert_array_equal(updates["head"]["kernel"], 0)


def test_the_learning_rate_rises_and_then_falls_along_a_cosine():
    factor = functools.partial(
        optim.schedule_factor, steps=14, warmup_steps=4, schedule="cosine"
    )
    assert [factor(n) for n in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    # cos 36 degrees = (1 + sqrt 5) / 4, and half of the way the cosine is 0.
    assert factor(6) == pytest.approx(0.5 + (1 + 5**0.5) / 8)
    assert factor(9) == pytest.approx(0.5) and factor(14) == pytest.approx(0)
    assert 0 < factor(13) < 0.03
    after = optax.cosine_decay_schedule(1.0, 10)
    for n in range(4, 14):
        assert factor(n) == pytest.approx(float(after(n - 4)), abs=1e-6)
    assert optim.schedule_factor(9, steps=10) == 1.0
    assert optim.schedule_factor(0, steps=10, warmup_steps=2) == 0.5


def test_frozen_are_names_of_submodules():
    with pytest.raises(ValueError, match="frozen must be a collection of names, got"):
        optim.make_optimizer(1e-3, frozen="bn10")
    optimizer = optim.make_optimizer(1e-3, frozen=("bn99",))
    with pytest.raises(ValueError, match="frozen: there is no submodule bn99"):
        state = optimizer.init({"bn1": {"scale": jnp.ones(2)}})
        optimizer.update({"bn1": {"scale": jnp.ones(2)}}, state)
