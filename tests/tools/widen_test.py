import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pconv_jax.unet import PConvUNet, Stage
from pconv_jax.weights import pretrained
from tests.helpers.cases import mostly_slow
from tools import widen

pytestmark = pytest.mark.usefixtures("fast_compilation")


KEY = jax.random.key(0)


@functools.cache
def make_network(**fields):
    """A network with statistics and biases that are not those of a new one."""
    model = PConvUNet(depth=2, width=4, **fields)
    images, _ = make_batch()
    variables = jax.jit(model.init)(KEY, images, jnp.ones((*images.shape[:-1], 1)))
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(KEY, len(leaves))
    leaves = [
        x + jax.random.uniform(k, x.shape, minval=-0.1, maxval=0.1)
        for x, k in zip(leaves, keys)
    ]
    return model, jax.tree.map(np.asarray, jax.tree.unflatten(tree, leaves))


def make_batch():
    images = jax.random.uniform(KEY, (2, 32, 24, 3), minval=-1)
    return images, jnp.ones((2, 32, 24, 1)).at[:, 8:20, 6:18].set(0)


def apply(model, variables, mask, **options):
    function = functools.partial(model.apply, mutable=["batch_stats"], **options)
    (output, _), updates = jax.jit(function)(variables, make_batch()[0], mask)
    return output, updates.get("batch_stats")


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("width", mostly_slow([6, 8], every=2))
@pytest.mark.parametrize("conv", ["partial", "standard"])
def test_the_output_stays(conv, width, train):
    model, variables = make_network(conv=conv)
    wide, widened = widen.widen(model, variables, width=width, key=KEY)
    assert (wide.width, model.width) == (width, 4)
    hole = make_batch()[1]
    for mask in [hole, jnp.ones_like(hole)] if conv == "standard" else [hole * 0 + 1]:
        expected, stats = apply(model, variables, mask, train=train)
        output, wide_stats = apply(wide, widened, mask, train=train)
        chex.assert_trees_all_close(output, expected, atol=2e-5)
        kept = jax.tree.map(lambda x, y: y[: len(x)], stats, wide_stats)
        chex.assert_trees_all_close(kept, stats, atol=2e-5)


def test_partial_convolutions_differ_by_the_weight_of_the_image_in_the_last_one():
    model, variables = make_network()
    wide, widened = widen.widen(model, variables, width=8, key=KEY)
    mask = make_batch()[1]
    expected, _ = apply(model, variables, mask)
    output, _ = apply(wide, widened, mask)
    # Windows of the last convolution that lie in the hole have 4 or 8 features below,
    # all valid, and 3 channels of the image, which are not.
    inside = np.s_[:, 9:19, 7:17]
    bias = widened["params"]["pconv4"]["bias"]
    ratio = ((8 + 3) / 8) / ((4 + 3) / 4)
    chex.assert_trees_all_close(
        output[inside] - bias, ratio * (expected[inside] - bias), atol=2e-5
    )


def test_a_head_stays():
    model, variables = make_network(sigmoid_head=True)
    mask = jnp.ones_like(make_batch()[1])
    expected, _ = apply(model, variables, mask)
    output, _ = apply(*widen.widen(model, variables, width=6, key=KEY), mask)
    chex.assert_trees_all_close(output, expected, atol=2e-5)


def test_all_of_the_new_weights_can_learn():
    model, variables = make_network()
    wide, widened = widen.widen(model, variables, width=6, key=KEY)
    images, mask = make_batch()

    def loss(params, variables):
        output, _ = wide.apply(variables | {"params": params}, images, mask)
        return jnp.abs(output - images).mean()

    # The first step moves the zeros, and with them the second all the others.
    gradient = jax.jit(jax.grad(loss))
    params = widened["params"]
    for _ in range(2):
        gradients = gradient(params, widened)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    for (path, old), new, learned in zip(
        jax.tree.leaves_with_path(variables["params"]),
        jax.tree.leaves(widened["params"]),
        jax.tree.leaves(params),
    ):
        # Of features that were there, those that never were active do not change.
        drawn = np.s_[..., old.shape[-1] :]
        if np.size(new[drawn]):
            assert np.mean(learned[drawn] != new[drawn]) > 0.5, path


def test_networks_that_cannot_be_widened():
    model, variables = make_network()
    with pytest.raises(ValueError, match="fewer features in the first than width = 4"):
        widen.widen(model, variables, width=4, key=KEY)
    model = model.clone(stages=([Stage(4, 5)], [Stage(3, 3)]))
    with pytest.raises(ValueError, match="must have the paper's stages"):
        widen.widen(model, variables, width=8, key=KEY)


def test_the_command(tmp_path, capsys, monkeypatch):
    model, variables = make_network()
    source, out = str(tmp_path / "narrow.safetensors"), str(tmp_path / "w.safetensors")
    pretrained.save_pretrained(source, model, variables)
    monkeypatch.setattr("sys.argv", ["widen.py", source, out])
    widen.main()
    assert "a network of width 8" in capsys.readouterr().out
    wide, widened, _ = pretrained.from_pretrained(out)
    assert wide.encoder == model.clone(width=8).encoder
    chex.assert_trees_all_equal(
        widened, widen.widen(model, variables, width=8, key=KEY)[1]
    )
    monkeypatch.setattr("sys.argv", ["widen.py", str(tmp_path / "none"), out])
    with pytest.raises(SystemExit):
        widen.main()
    assert "none" in capsys.readouterr().err
