import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import pconv_jax.nnx
from pconv_jax import layers, ops
from pconv_jax.nnx import PartialConv, PartialConvTranspose, PartialPadConv
from tests.helpers.cases import mostly_slow

pytestmark = pytest.mark.usefixtures("fast_compilation")


def make_inputs(*shape, planes=1, seed=0):
    """Make random inputs and a mask."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    return x, rng.random((*shape[:-1], planes)) > 0.5


def make_layer(layer, *arguments, **options):
    """Make a layer with a bias that is not zero."""
    bias_init = nnx.initializers.normal()
    return layer(*arguments, bias_init=bias_init, rngs=nnx.Rngs(3), **options)


def params_of(layer):
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


@pytest.mark.parametrize("layer", [PartialConv, PartialPadConv])
def test_arguments_are_those_of_conv_in_its_order(layer):
    ours, theirs = (inspect.signature(c.__init__).parameters for c in (layer, nnx.Conv))
    assert list(ours) == [name for name in theirs if name in ours]
    assert set(theirs) - set(ours) - {"conv_general_dilated"} == {
        "mask",  # Masks weights. Our mask is an argument of the call.
        "promote_dtype",
        "preferred_element_type",
    }
    for name, parameter in ours.items():
        assert parameter.kind == theirs[name].kind, name
        if name not in ("kernel_init", "bias_init"):  # Each call makes new functions.
            assert parameter.default == theirs[name].default, name


CASES = [
    ((9, 8), dict(kernel_size=(3, 3))),
    ((9, 8), dict(kernel_size=(3, 2), strides=2, kernel_dilation=(1, 2))),
    ((9, 8), dict(kernel_size=(3, 3), feature_group_count=2, use_bias=False)),
    ((9, 8), dict(kernel_size=(5, 5), padding="CIRCULAR", strides=(2, 1))),
    ((9,), dict(kernel_size=3, strides=None, kernel_dilation=None)),
    ((9,), dict(kernel_size=3, padding="CAUSAL")),
    ((5, 4, 6), dict(kernel_size=(3, 2, 1), padding="REFLECT")),
    ((9, 8), dict(kernel_size=(3, 3), dtype=jnp.bfloat16)),
    ((9, 8), dict(kernel_size=(3, 3), param_dtype=jnp.bfloat16)),
]


@pytest.mark.parametrize(
    ("spatial", "options", "batch"),
    mostly_slow(
        [*((*case, (2,)) for case in CASES), (*CASES[0], ()), (*CASES[0], (2, 1))],
        every=5,
    ),
    ids=str,
)
def test_it_computes_what_the_linen_layer_does_from_the_same_arrays(
    spatial, options, batch
):
    x, mask = make_inputs(*batch, *spatial, 4)
    layer = make_layer(PartialConv, 4, 6, **options)
    variables = {"params": params_of(layer)}
    linen = layers.PartialConv(6, **options)
    chex.assert_trees_all_equal(
        layer(x, mask, return_coverage=True),
        linen.apply(variables, x, mask, return_coverage=True),
    )
    chex.assert_trees_all_equal(layer(x), linen.apply(variables, x))
    padded = make_layer(PartialPadConv, 4, 6, **options)
    chex.assert_trees_all_equal(
        padded(x), layers.PartialPadConv(6, **options).apply(variables, x)
    )


@pytest.mark.parametrize(("spatial", "options"), CASES[:5], ids=str)
def test_parameters_and_numbers_are_those_of_conv(spatial, options):
    x, _ = make_inputs(2, *spatial, 4)
    options = dict(padding="VALID") | options  # Adds no holes.
    layer = make_layer(PartialConv, 4, 6, **options)
    conv = make_layer(nnx.Conv, 4, 6, **options)
    chex.assert_trees_all_equal(params_of(layer), params_of(conv))
    assert layer.kernel_shape == conv.kernel_shape
    np.testing.assert_array_equal(layer(x)[0], conv(x))


@pytest.mark.parametrize(
    "options",
    mostly_slow(
        [
            {},
            dict(
                strides=(2, 3), padding="VALID", transpose_kernel=True, use_bias=False
            ),
            dict(strides=2, kernel_dilation=3, padding="CIRCULAR"),
            dict(padding=1, dtype=jnp.bfloat16),
        ],
        every=4,
    ),
    ids=str,
)
def test_the_transposed_layer_computes_what_that_of_linen_does(options):
    x, mask = make_inputs(2, 5, 6, 4)
    layer = make_layer(PartialConvTranspose, 4, 3, (3, 2), **options)
    conv = make_layer(nnx.ConvTranspose, 4, 3, (3, 2), **options)
    chex.assert_trees_all_equal(params_of(layer), params_of(conv))
    assert layer.kernel_shape == conv.kernel_shape
    linen = layers.PartialConvTranspose(3, (3, 2), **options)
    variables = {"params": params_of(layer)}
    chex.assert_trees_all_equal(
        layer(x, mask, return_coverage=True),
        linen.apply(variables, x, mask, return_coverage=True),
    )
    np.testing.assert_allclose(layer(x)[0], conv(x), atol=1e-5)


def test_sequences_equal_their_concatenation():
    x, mask = make_inputs(2, 6, 5, 3, planes=3)
    layer = make_layer(PartialConv, 3, 4, (3, 3))
    y, new_mask = layer((x[..., :2], x[..., 2:]), (mask[..., :2], mask[..., 2:]))
    expected, expected_mask = layer(x, mask)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(new_mask, expected_mask)


def test_gradients_of_a_network_equal_those_of_the_operation():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = PartialConv(3, 8, (3, 3), strides=2, rngs=rngs)
            self.second = PartialConv(8, 2, (3, 3), rngs=rngs)

        def __call__(self, x, mask):
            x, mask = self.first(x, mask)
            return self.second(nnx.relu(x), mask)[0]

    x, mask = make_inputs(1, 12, 12, 3)
    net = Net(nnx.Rngs(0))
    gradient = nnx.jit(nnx.grad(lambda net: jnp.sum(net(x, mask) ** 2)))(net)

    @jax.jit
    @jax.grad
    def expected(params):
        y, m = ops.partial_conv(x, mask, **params["first"], strides=2)
        y, _ = ops.partial_conv(nnx.relu(y), m, **params["second"])
        return jnp.sum(y**2)

    chex.assert_trees_all_close(
        nnx.to_pure_dict(gradient), expected(params_of(net)), rtol=1e-5
    )


def test_metadata_and_sharding_are_those_of_conv():
    def make(layer):
        return layer(
            4,
            8,
            (3, 3),
            kernel_init=nnx.with_partitioning(
                nnx.initializers.lecun_normal(), (None, None, None, "model")
            ),
            kernel_metadata={"tag": "kernel"},
            bias_metadata={"out_sharding": ("model",), "tag": "bias"},
            rngs=nnx.Rngs(0),
        )

    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        ours, theirs = make(PartialConv), make(nnx.Conv)
        for name in ("kernel", "bias"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert a.get_metadata() == b.get_metadata()
            assert a[...].sharding == b[...].sharding
        assert ours.kernel[...].sharding.spec == P(None, None, None, "model")
        x, mask = make_inputs(2, 8, 8, 4)
        y, _ = nnx.jit(lambda layer, x, mask: layer(x, mask))(ours, x, mask)
    expected, _ = ops.partial_conv(
        x, mask, *map(np.asarray, jax.tree.leaves((ours.kernel[...], ours.bias[...])))
    )
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_split_and_merge():
    x, mask = make_inputs(1, 6, 6, 3)
    layer = make_layer(PartialConv, 3, 4, (3, 3), use_bias=False)
    graphdef, state = nnx.split(layer)
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(state)) == {"kernel": (3, 3, 3, 4)}
    chex.assert_trees_all_equal(nnx.merge(graphdef, state)(x, mask), layer(x, mask))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(feature_group_count=3), "feature_group_count = 3 must divide"),
        (dict(in_features=2), "kernel must be .* C_in = 4"),
    ],
)
def test_errors(options, message):
    x, mask = make_inputs(2, 8, 8, 4)
    options = dict(in_features=4, out_features=4, kernel_size=(3, 3)) | options
    with pytest.raises(ValueError, match=message):
        PartialConv(**options, rngs=nnx.Rngs(0))(x, mask)


def test_it_is_an_attribute_of_the_package():
    assert pconv_jax.nnx.PartialConv is PartialConv
