import dataclasses
import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pconv_jax import ops
from pconv_jax.layers import PartialConv, PartialConvTranspose, PartialPadConv
from tests.helpers.cases import mostly_slow

pytestmark = pytest.mark.usefixtures("fast_compilation")


def make_inputs(*shape, planes=1, seed=0):
    """Make random inputs and a mask."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    return x, rng.random((*shape[:-1], planes)) > 0.5


def init(layer, *arguments):
    """Initialize variables, with a nonzero bias."""
    variables = layer.init(jax.random.key(0), *arguments)
    if "bias" in variables["params"]:
        bias = variables["params"]["bias"]
        variables["params"]["bias"] = jnp.arange(1, 1 + bias.size, dtype=bias.dtype)
    return variables


def test_fields_are_those_of_conv_in_its_order():
    def fields(layer):
        return {f.name: f for f in dataclasses.fields(layer)}

    ours, theirs = fields(PartialConv), fields(nn.Conv)
    assert list(ours) == [name for name in theirs if name in ours]
    assert set(theirs) - set(ours) == {
        "mask",  # Masks weights. Our mask is an argument of the call.
        "promote_dtype",
        "conv_general_dilated",
        "conv_general_dilated_cls",
    }
    for name, field in ours.items():
        if name not in ("kernel_init", "bias_init"):  # Each call makes new functions.
            assert field.default == theirs[name].default, name
    assert fields(PartialPadConv).keys() == ours.keys()


@pytest.mark.parametrize(
    ("spatial", "fields"),
    [
        ((9, 8), dict(kernel_size=(3, 3))),
        ((9, 8), dict(kernel_size=(3, 2), strides=2, kernel_dilation=(1, 2))),
        ((9, 8), dict(kernel_size=(3, 3), feature_group_count=2, use_bias=False)),
        ((9, 8), dict(kernel_size=(3, 3), padding="CIRCULAR", strides=(2, 1))),
        ((9, 8), dict(kernel_size=(3, 3), padding="REFLECT")),
        ((9,), dict(kernel_size=3, strides=None, kernel_dilation=None)),
        ((5, 4, 6), dict(kernel_size=(3, 2, 1))),
        ((9,), dict(kernel_size=3, padding=((0, 0),), input_dilation=2)),
    ],
    ids=str,
)
def test_parameters_are_those_of_conv(spatial, fields):
    x, _ = make_inputs(2, *spatial, 4)
    # In the interior, i.e. without padding, or with padding that adds no holes.
    fields = dict(features=6) | fields
    fields.setdefault("padding", "VALID")
    layer, conv = PartialConv(**fields), nn.Conv(**fields)
    variables = conv.init(jax.random.key(0), x)
    chex.assert_trees_all_equal(layer.init(jax.random.key(0), x), variables)
    expected = conv.apply(variables, x)
    y, mask = layer.apply(variables, x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(mask, np.ones((*y.shape[:-1], 1)))
    np.testing.assert_array_equal(PartialPadConv(**fields).apply(variables, x), y)


@pytest.mark.parametrize(
    ("spatial", "fields"),
    [
        ((9,), dict(kernel_size=3, padding="CAUSAL", kernel_dilation=2)),
        ((9,), dict(kernel_size=4, padding=((3, 0),), input_dilation=2, strides=3)),
        ((5, 6), dict(kernel_size=(3, 2), padding=[2, (3, 1)], input_dilation=(2, 1))),
        ((5, 6), dict(kernel_size=(2, 3), padding=((-1, 2), (0, 0)), input_dilation=3)),
        ((5, 6), dict(kernel_size=(3, 3), padding=1, strides=2)),
    ],
    ids=str,
)
def test_shapes_and_unscaled_outputs_are_those_of_conv(spatial, fields):
    x, mask = make_inputs(2, *spatial, 4)
    layer, conv = (c(6, **fields, use_bias=False) for c in (PartialConv, nn.Conv))
    variables = conv.init(jax.random.key(0), x)
    y, new_mask, coverage = layer.apply(variables, x, mask, return_coverage=True)
    # Without the scale, a partial convolution is a convolution of the valid inputs.
    expected = conv.apply(variables, np.where(mask, x, 0))
    np.testing.assert_allclose(y * coverage, expected, atol=1e-5)
    np.testing.assert_array_equal(new_mask, coverage > 0)


def test_fields_of_the_transposed_layer_are_those_of_conv_transpose():
    ours, theirs = (
        {f.name: f for f in dataclasses.fields(layer)}
        for layer in (PartialConvTranspose, nn.ConvTranspose)
    )
    assert list(ours) == [name for name in theirs if name in ours]
    assert set(theirs) - set(ours) == {
        "mask",
        "promote_dtype",
        "preferred_element_type",
    }
    for name, field in ours.items():
        if name not in ("kernel_init", "bias_init"):
            assert field.default == theirs[name].default, name


@pytest.mark.parametrize("transpose_kernel", mostly_slow([False, True], every=2))
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", 2, ((1, 2), (3, 0))])
@pytest.mark.parametrize(
    ("size", "strides", "dilation"),
    [((3, 4), None, None), ((4, 5), (2, 3), None), ((2, 3), (3, 1), (1, 2))],
    ids=str,
)
def test_without_holes_the_transposed_layer_is_conv_transpose(
    size, strides, dilation, padding, transpose_kernel
):
    x, _ = make_inputs(2, 4, 5, 3)
    layer, conv = (
        layer(
            6,
            size,
            strides=strides,
            padding=padding,
            kernel_dilation=dilation,
            transpose_kernel=transpose_kernel,
        )
        for layer in (PartialConvTranspose, nn.ConvTranspose)
    )
    variables = conv.init(jax.random.key(0), x)
    chex.assert_trees_all_equal(layer.init(jax.random.key(0), x), variables)
    y, new_mask = layer.apply(variables, x, np.ones((2, 4, 5, 1)))
    expected = conv.apply(variables, x)
    # Circular padding wraps outputs around in Flax, and inputs here.
    np.testing.assert_allclose(y, expected, atol=1e-5)
    chex.assert_trees_all_equal(layer.apply(variables, x), (y, new_mask))


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
def test_the_transposed_layer_scales_by_what_reaches_an_output(padding):
    x, mask = make_inputs(2, 5, 6, 3, planes=3)
    fields = dict(strides=(2, 3), padding=padding, use_bias=False)
    layer = PartialConvTranspose(4, (3, 4), **fields)
    variables = layer.init(jax.random.key(0), x)
    y, new_mask, coverage = layer.apply(variables, x, mask, return_coverage=True)
    ones = nn.ConvTranspose(1, (3, 4), **fields, kernel_init=nn.initializers.ones)
    count = functools.partial(ones.apply, ones.init(jax.random.key(0), x))
    valid, reached = count(mask.astype(np.float32)), count(np.ones_like(x))
    np.testing.assert_allclose(coverage, valid / np.maximum(reached, 1), rtol=1e-6)
    np.testing.assert_array_equal(new_mask, valid > 0)
    conv = nn.ConvTranspose(4, (3, 4), **fields)
    expected = conv.apply(variables, np.where(mask, x, 0))
    np.testing.assert_allclose(y * coverage, expected, atol=1e-5)


def test_hole_contents_change_nothing_in_the_transposed_layer():
    x, mask = make_inputs(2, 5, 6, 3)
    layer = PartialConvTranspose(4, (3, 3), strides=(2, 2))
    variables = init(layer, x, mask)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def value_and_grad(variables, x):
        return jnp.sum(layer.apply(variables, x, mask)[0] ** 2)

    expected = value_and_grad(variables, np.where(mask, x, 0))
    actual = value_and_grad(variables, np.where(mask, x, np.nan))
    chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("layer", [PartialConv, PartialConvTranspose])
def test_an_input_of_several_may_be_all_valid(layer, batch):
    x, mask = make_inputs(*batch, 6, 5, 3)
    layer = layer(4, (3, 3))
    inputs, ones = (x[..., :2], x[..., 2:]), np.ones_like(mask)
    variables = init(layer, inputs)
    chex.assert_trees_all_equal(
        layer.apply(variables, inputs, [mask, None]),
        layer.apply(variables, inputs, [mask, ones]),
    )
    results = layer.apply(variables, inputs, [None, mask], return_coverage=True)
    chex.assert_equal_shape([results[1], results[2]])
    assert results[0].shape == (*batch, 6, 5, 4)


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
def test_any_number_of_batch_axes(batch, masked):
    x, mask = make_inputs(*batch, 6, 5, 2)
    arguments = (x, mask) if masked else (x,)
    layer = PartialConv(3, (3, 3), strides=(1, 2))
    variables = init(layer, *arguments)
    y, new_mask = layer.apply(variables, *arguments)
    chex.assert_shape(y, nn.Conv(3, (3, 3), strides=(1, 2)).apply(variables, x).shape)
    flat = [a.reshape(-1, *a.shape[len(batch) :]) for a in arguments]
    expected, expected_mask = ops.partial_conv(
        *(flat if masked else (*flat, None)), **variables["params"], strides=(1, 2)
    )
    np.testing.assert_allclose(y, expected.reshape(y.shape), atol=1e-5)
    np.testing.assert_array_equal(new_mask, expected_mask.reshape(*y.shape[:-1], 1))


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_sequences_equal_their_concatenation(batch):
    x, mask = make_inputs(*batch, 6, 5, 3, planes=3)
    layer = PartialConv(4, (3, 3), padding=1)
    sources, masks = (x[..., :2], x[..., 2:]), (mask[..., :2], mask[..., 2:])
    variables = init(layer, sources, masks)
    chex.assert_trees_all_equal(variables, init(layer, x, mask))
    for a, b in [((sources, masks), (x, mask)), ((sources,), (x,))]:
        y, new_mask = layer.apply(variables, *a)
        expected, expected_mask = layer.apply(variables, *b)
        np.testing.assert_allclose(y, expected, atol=1e-5)
        np.testing.assert_array_equal(new_mask, expected_mask)


def test_padding_layer_scales_the_border():
    layer = PartialPadConv(1, (3, 3), kernel_init=nn.initializers.ones)
    x = jnp.ones((1, 4, 4, 1))
    y, variables = layer.init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(y, np.full((1, 4, 4, 1), 9))
    assert jax.tree.map(jnp.shape, variables) == {
        "params": {"kernel": (3, 3, 1, 1), "bias": (1,)}
    }


def test_padding_layer_is_partial_conv_without_a_mask_and_drops_in_for_conv():
    class Net(nn.Module):
        conv: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            x = nn.relu(self.conv(4, (3, 3), strides=2, name="first")(x))
            return self.conv(2, (3, 3), padding=1, name="second")(x)

    x, _ = make_inputs(1, 32, 32, 3)
    variables = Net(nn.Conv).init(jax.random.key(0), x)
    chex.assert_trees_all_equal(
        Net(PartialPadConv).init(jax.random.key(0), x), variables
    )
    y = Net(PartialPadConv).apply(variables, x)
    expected = Net(nn.Conv).apply(variables, x)
    assert y.shape == expected.shape
    inside = np.s_[:, 2:-2, 2:-2]
    np.testing.assert_allclose(y[inside], expected[inside], atol=1e-6)
    assert np.abs(y - expected).max() > 1e-2  # Not at the border.
    first = {"params": variables["params"]["first"]}
    fields = dict(features=4, kernel_size=(3, 3), strides=2)
    np.testing.assert_array_equal(
        PartialPadConv(**fields).apply(first, x),
        PartialConv(**fields).apply(first, x)[0],
    )


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "x_dtype", "expected"),
    [
        (None, np.float32, np.float32, np.float32),
        (None, np.float32, jnp.bfloat16, np.float32),
        (None, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, np.float32, np.float32, jnp.bfloat16),
        (np.float32, jnp.bfloat16, jnp.bfloat16, np.float32),
        (None, np.float32, np.uint8, np.float32),
    ],
)
def test_dtypes_are_those_of_conv(dtype, param_dtype, x_dtype, expected):
    fields = dict(features=2, kernel_size=(3, 3), dtype=dtype, param_dtype=param_dtype)
    x = np.ones((1, 4, 4, 3), x_dtype)
    mask = np.ones((1, 4, 4, 1), np.uint8)
    (y, new_mask), variables = PartialConv(**fields).init_with_output(
        jax.random.key(0), x, mask
    )
    assert y.dtype == nn.Conv(**fields).apply(variables, x).dtype == expected
    assert new_mask.dtype == np.uint8
    for leaf in jax.tree.leaves(variables):
        assert leaf.dtype == param_dtype


def test_bfloat16_layer_counts_past_256():
    layer = PartialConv(1, (7, 7), dtype=jnp.bfloat16, padding="VALID")
    mask = np.ones((1, 7, 7, 1), np.float32)
    mask[0, 0, 0] = 0
    kernel = np.zeros((7, 7, 64, 1), np.float32)
    kernel[3, 3, 0] = 1024
    params = {"kernel": kernel, "bias": np.zeros(1, np.float32)}
    y, _ = layer.apply({"params": params}, np.ones((1, 7, 7, 64)), mask)
    # 1024 * 49 / 48 = 1045.3. Counts rounded to bfloat16 give 1040.
    assert y.item() == jnp.bfloat16(1024 * 49 / 48)


def test_hole_contents_change_nothing():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            h, m = PartialConv(4, (3, 3), strides=2, padding=1)(x, mask)
            h = nn.BatchNorm(use_running_average=False)(h)
            return PartialConv(2, (3, 3))((nn.relu(h), h), (m, m))[0]

    x, mask = make_inputs(2, 16, 16, 3)
    mask[:, :8, :8] = 0
    variables = Net().init(jax.random.key(0), x, mask)

    @jax.jit
    def value_and_grad(params, x):
        def loss(params, x):
            y, _ = Net().apply({"params": params}, x, mask, mutable="batch_stats")
            return jnp.sum(y**2)

        return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    params = variables["params"]
    expected = value_and_grad(params, np.where(mask, x, 0))
    chex.assert_tree_all_finite(expected)
    for content in (np.nan, np.inf, 1e30):
        actual = value_and_grad(params, np.where(mask, x, content))
        chex.assert_trees_all_equal(actual, expected)


def test_nnx_bridge():
    x, mask = make_inputs(1, 6, 6, 3)
    linen = PartialConv(4, (3, 3))
    layer = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(x, mask)
    params = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    chex.assert_tree_all_finite(params)
    chex.assert_trees_all_equal(
        layer(x, mask), linen.apply({"params": params}, x, mask)
    )
    gradient = nnx.grad(lambda layer: jnp.sum(layer(x, mask)[0] ** 2))(layer)
    expected = jax.grad(
        lambda params: jnp.sum(linen.apply({"params": params}, x, mask)[0] ** 2)
    )(params)
    for name in expected:
        np.testing.assert_allclose(gradient[name][...], expected[name], rtol=1e-5)


X, M = make_inputs(2, 8, 8, 4)


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        (dict(feature_group_count=3), (X, M), "feature_group_count = 3 must divide"),
        (dict(feature_group_count=0), (X, M), "feature_group_count"),
        ({}, (X[0, 0], M[0, 0]), "as many spatial axes as the kernel"),
        (
            dict(kernel_size=3),
            (X, M[..., 0]),
            "mask must have the batch axes of inputs",
        ),
        ({}, (X, M[:1]), "mask must be of shape"),
        ({}, (X, M[..., 0]), "mask must be of shape"),
        ({}, (X, [M]), "mask must be a sequence .* and an array otherwise"),
        ({}, (X, [M, M]), "mask must be a sequence .* and an array otherwise"),
        ({}, ([X, X], M), "mask must be a sequence as long as inputs"),
        ({}, ([X, X], [M]), "mask must be a sequence as long as inputs"),
        ({}, ([X, X[:1]], None), "differ in C only"),
        # These have the same number of examples but different batch axes.
        ({}, (X[:1], M[0]), "mask must be of shape"),
        ({}, (X[None], M[:, None]), "mask must have the batch axes of inputs"),
        ({}, ([X[None], X[:, None]], None), "differ in C only"),
    ],
)
def test_errors(fields, arguments, message):
    layer = PartialConv(**(dict(features=2, kernel_size=(3, 3)) | fields))
    with pytest.raises(ValueError, match=message):
        layer.init(jax.random.key(0), *arguments)


@pytest.mark.parametrize(
    ("inputs", "mask"), [((8, 8, 3), (1, 8, 8, 1)), ((2, 3, 8, 8, 3), (3, 8, 8, 1))]
)
def test_masks_with_other_batch_axes_are_named_as_given(inputs, mask):
    layer = PartialConv(features=4, kernel_size=(3, 3))
    with pytest.raises(ValueError, match=re.escape(f"got the shape {mask}")):
        layer.init(jax.random.key(0), jnp.ones(inputs), jnp.ones(mask))
    with pytest.raises(ValueError, match="or a non-empty sequence of arrays"):
        layer.init(jax.random.key(0), [], [])
