import functools
import json
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify
from jax.test_util import check_grads

from pconv_jax import ops
from tests.helpers import TESTDATA, reference
from tests.helpers.cases import mostly_slow

GOLDEN = np.load(TESTDATA / "nvidia_partialconv.npz")

CASES = json.loads(str(GOLDEN["meta"]))


ONE_PLANE, EACH_CHANNEL, NO_MASK = "one plane", "a plane for each channel", "no mask"


def make_case(
    spatial=(8, 7),
    size=(3, 3),
    *,
    planes=ONE_PLANE,
    channels=4,
    features=6,
    groups=1,
    seed=0,
):
    """Make random inputs, a mask (with all-hole windows), a kernel and a bias."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, *spatial, channels))
    mask = rng.random((2, *spatial, channels if planes == EACH_CHANNEL else 1)) > 0.5
    mask[:, : size[0] + 1] = 0
    kernel = rng.standard_normal((*size, channels // groups, features))
    bias = rng.standard_normal(features)
    x, kernel, bias = (a.astype(np.float32) for a in (x, kernel, bias))
    return x, None if planes == NO_MASK else mask, kernel, bias


def gradients(x, mask, kernel, bias, **options):
    """Compute outputs and the gradients of all floating-point arguments."""

    def loss(x, kernel, bias):
        y, _ = ops.partial_conv(x, mask, kernel, bias, **options)
        return jnp.sum(jnp.sin(y)), y

    grads, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, kernel, bias)
    return y, *grads


def assert_close(actual, expected, tolerance=1e-5):
    """Compare trees, each array relative to its largest value."""
    chex.assert_trees_all_equal_shapes(actual, expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


# Other implementations.


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("number", mostly_slow(range(len(CASES)), every=4))
def test_equals_nvidia_partialconv(number, x64):
    case, dtype = CASES[number], np.float64 if x64 else np.float32
    golden = {
        key.split("/")[1]: GOLDEN[key]
        for key in GOLDEN.files
        if key.startswith(f"{number:03d}/")
    }
    names = [name for name in ("x", "kernel", "bias") if name in golden]

    # The mask is an argument: XLA would compute with a constant while it compiles.
    @jax.jit
    def differentiate(mask, dy, *arguments):
        def apply(x, kernel, bias=None):
            return ops.partial_conv(
                x,
                mask,
                kernel,
                bias,
                strides=case["strides"],
                padding=case["padding"],
                kernel_dilation=case["dilation"],
                feature_group_count=case["groups"],
            )

        y, pull_back, new_mask = jax.vjp(apply, *arguments, has_aux=True)
        return y, new_mask, pull_back(dy)

    with jax.enable_x64(x64):
        dy, *arguments = (golden[name].astype(dtype) for name in ("dy", *names))
        y, new_mask, cotangents = differentiate(golden.get("mask"), dy, *arguments)
    assert y.dtype == dtype
    actual = dict(zip(("y", *("d" + name for name in names)), (y, *cotangents)))
    expected = {name: golden[name] for name in actual}
    assert_close(actual, expected, 1e-6 if x64 else 1e-5)
    # NVIDIA's has a mask for each feature, or one for all examples.
    chex.assert_shape(new_mask, (*y.shape[:-1], 1))
    np.testing.assert_array_equal(
        np.broadcast_to(new_mask, y.shape), np.broadcast_to(golden["new_mask"], y.shape)
    )


# An independent reference.


def check_reference(*shape, groups=1, options, **case):
    x, mask, kernel, bias = make_case(*shape, groups=groups, **case)
    options = dict(options, feature_group_count=groups)
    y, new_mask = jax.jit(functools.partial(ops.partial_conv, **options))(
        x, mask, kernel, bias
    )
    expected, expected_mask = reference.partial_conv(
        x, True if mask is None else mask, kernel, bias, **options
    )
    assert_close(y, expected, 1e-6)
    planes = expected.shape[-1] if groups > 1 and case["planes"] == EACH_CHANNEL else 1
    chex.assert_shape(new_mask, (*expected.shape[:-1], planes))
    np.testing.assert_array_equal(
        np.broadcast_to(new_mask, expected.shape), expected_mask
    )


@pytest.mark.parametrize("planes", [ONE_PLANE, EACH_CHANNEL, NO_MASK])
@pytest.mark.parametrize("strides", [1, (2, 3)], ids=str)
@pytest.mark.parametrize(
    "padding",
    [
        "SAME",
        "VALID",
        "CIRCULAR",
        "REFLECT",
        2,
        ((0, 3), (2, 1)),
        ("CIRCULAR", 1),
        ((2, 1), "REFLECT"),
    ],
    ids=str,
)
def test_equals_reference(padding, strides, planes):
    options = dict(padding=padding, strides=strides)
    check_reference((8, 7), (3, 4), planes=planes, options=options)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", "REFLECT", 3])
@pytest.mark.parametrize("planes", [ONE_PLANE, EACH_CHANNEL])
def test_equals_reference_with_dilation(padding, planes):
    options = dict(padding=padding, kernel_dilation=(2, 3), strides=(1, 2))
    check_reference((9, 8), (3, 2), planes=planes, options=options)


@pytest.mark.parametrize("planes", [ONE_PLANE, EACH_CHANNEL, NO_MASK])
@pytest.mark.parametrize("groups", [2, 4])  # 4 is depthwise.
def test_equals_reference_with_groups(groups, planes):
    options = dict(strides=2, padding=1)
    check_reference(planes=planes, groups=groups, features=8, options=options)


@pytest.mark.parametrize("planes", [ONE_PLANE, EACH_CHANNEL, NO_MASK])
@pytest.mark.parametrize(
    ("spatial", "size"), [((11,), (4,)), ((5, 4, 6), (3, 2, 3))], ids=["1-D", "3-D"]
)
@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR", "VALID"])
def test_equals_reference_in_1d_and_3d(spatial, size, padding, planes):
    options = dict(padding=padding, strides=2)
    check_reference(spatial, size, planes=planes, options=options)


@pytest.mark.parametrize("planes", [ONE_PLANE, EACH_CHANNEL, NO_MASK])
@pytest.mark.parametrize(
    "padding",
    ["SAME", "VALID", "CIRCULAR", "REFLECT", ("CAUSAL", 2), ((0, 3), (-1, 1))],
)
def test_equals_reference_with_input_dilation(padding, planes):
    options = dict(padding=padding, input_dilation=(2, 3), strides=(1, 2))
    check_reference((6, 7), (3, 2), planes=planes, options=options)


@pytest.mark.parametrize("planes", [ONE_PLANE, EACH_CHANNEL, NO_MASK])
@pytest.mark.parametrize(
    ("spatial", "size", "options"),
    [
        ((9,), (3,), dict(padding="CAUSAL")),
        ((9,), (3,), dict(padding="CAUSAL", kernel_dilation=2, strides=2)),
        ((8, 7), (3, 3), dict(padding=("CAUSAL", "REFLECT"))),
        ((5, 4, 6), (2, 3, 3), dict(padding=("CAUSAL", 1, (0, 2)))),
    ],
    ids=str,
)
def test_equals_reference_with_causal_padding(spatial, size, options, planes):
    check_reference(spatial, size, planes=planes, options=options)


def test_causal_outputs_see_no_later_inputs():
    x, mask, kernel, bias = make_case((9,), (3,))
    y, m = ops.partial_conv(x, mask, kernel, bias, padding="CAUSAL")
    later = np.arange(9)[:, None] > 4
    y_cut, m_cut = ops.partial_conv(
        np.where(later, np.nan, x), mask & ~later, kernel, bias, padding="CAUSAL"
    )
    chex.assert_trees_all_equal((y[:, :5], m[:, :5]), (y_cut[:, :5], m_cut[:, :5]))


TRANSPOSED = [
    ((5, 4), dict(kernel_size=(3, 4), strides=(2, 1), padding=[(2, 1), (3, 3)])),
    ((5, 4), dict(kernel_size=(2, 2), strides=(3, 2), padding=[(1, 2), (1, 1)])),
    (
        (4, 5),
        dict(kernel_size=(3, 2), kernel_dilation=(2, 3), padding=[(3, 4), (1, 0)]),
    ),
    ((6,), dict(kernel_size=(5,), strides=(2,), padding=[(2, 2)])),
    ((3, 4, 2), dict(kernel_size=(2, 3, 2), strides=(2, 1, 2), padding=[(1, 1)] * 3)),
]


@pytest.mark.parametrize("planes", [ONE_PLANE, EACH_CHANNEL, NO_MASK])
@pytest.mark.parametrize(("spatial", "geometry"), TRANSPOSED, ids=str)
def test_transposed_equals_reference(spatial, geometry, planes):
    geometry = dict(geometry)
    size = geometry.pop("kernel_size")
    x, mask, kernel, bias = make_case(spatial, size, planes=planes)
    ones = dict(strides=(1,) * len(size), kernel_dilation=(1,) * len(size))
    y, new_mask, coverage = ops.partial_conv_transpose(
        x, mask, kernel, bias, **geometry, return_coverage=True
    )
    expected, expected_mask, expected_coverage = reference.partial_conv_transpose(
        x, True if mask is None else mask, kernel, bias, **(ones | geometry)
    )
    assert_close(y, expected, 1e-6)
    np.testing.assert_array_equal(new_mask, expected_mask)
    np.testing.assert_allclose(coverage, expected_coverage, rtol=1e-6)
    assert coverage.dtype == np.float32


def test_transposed_arithmetic():
    # Outputs of two windows of 3, with a step of 2: 1, 1, 1 + 1, 1, 1. The third is
    # reached by both inputs; if one is a hole, the other counts twice.
    x, kernel = np.ones((1, 2, 1)), np.ones((3, 1, 1))
    for mask, expected, coverage in [
        ([1, 1], [1, 1, 2, 1, 1], [1, 1, 1, 1, 1]),
        ([1, 0], [1, 1, 2, 0, 0], [1, 1, 0.5, 0, 0]),
        ([0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
    ]:
        y, new_mask, c = ops.partial_conv_transpose(
            x,
            np.reshape(mask, (1, 2, 1)),
            kernel,
            strides=2,
            padding="VALID",
            return_coverage=True,
        )
        np.testing.assert_array_equal(y[0, :, 0], expected)
        np.testing.assert_array_equal(c[0, :, 0], np.float32(coverage))
        np.testing.assert_array_equal(new_mask, c > 0)


def test_transposed_inputs_that_reach_nothing_leave_holes():
    # With a step of 3 and two taps, every third output is reached by no input.
    x = np.ones((1, 3, 1))
    y, m = ops.partial_conv_transpose(
        x, None, np.ones((2, 1, 1)), np.full(1, 5.0), strides=3
    )
    np.testing.assert_array_equal(m[0, :, 0], [1, 1, 0] * 3)
    np.testing.assert_array_equal(y[0, :, 0], [6, 6, 0] * 3)


@st.composite
def geometries(draw):
    ndim = draw(st.integers(1, 2))

    def each(elements):
        return draw(st.tuples(*[elements] * ndim))

    pair = st.tuples(st.integers(0, 4), st.integers(0, 4))
    pads = st.one_of(pair, st.sampled_from(["CIRCULAR", "REFLECT", "CAUSAL"]))
    pads = st.tuples(*[pads] * ndim)
    return dict(
        spatial=each(st.integers(7, 10)),
        size=each(st.integers(1, 4)),
        groups=draw(st.sampled_from([1, 2])),
        planes=draw(st.sampled_from([ONE_PLANE, EACH_CHANNEL, NO_MASK])),
        seed=draw(st.integers(0, 999)),
        options=dict(
            strides=each(st.integers(1, 3)),
            input_dilation=each(st.sampled_from([1, 1, 2, 3])),
            kernel_dilation=each(st.integers(1, 2)),
            padding=draw(st.one_of(st.sampled_from(["SAME", "VALID"]), pads)),
        ),
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(geometries())
def test_equals_reference_for_any_geometry(geometry):
    check_reference(**geometry)


def test_large_kernels_on_small_maps_are_left_to_xla():
    x, kernel = np.ones((1, 2, 2, 1)), jax.ShapeDtypeStruct((2**20, 3, 1, 1), "f4")
    lowered = jax.jit(functools.partial(ops.partial_conv, x, None)).lower(kernel)
    assert lowered.out_info[0].shape == (1, 2, 2, 1)
    assert "stablehlo.convolution" in lowered.as_text()


@pytest.mark.parametrize(("size", "stride"), [(4, 1), (4, 2), (7, 1), (7, 2)])
def test_where_no_window_fits_there_is_no_output(size, stride):
    x, mask, kernel, bias = make_case((3, 3), (size, size))

    def apply(x, kernel):
        return ops.partial_conv(x, mask, kernel, bias, strides=stride, padding="VALID")

    (y, new_mask), pull_back = jax.vjp(apply, x, kernel)
    chex.assert_shape(y, (len(x), 0, 0, kernel.shape[-1]))
    chex.assert_shape(new_mask, (len(x), 0, 0, 1))
    chex.assert_trees_all_equal(
        pull_back((y, new_mask)), (jnp.zeros_like(x), jnp.zeros_like(kernel))
    )


# Arithmetic.


def test_zero_padding_does_not_darken_the_border():
    # 9 in the interior, 6 * 9 / 6 at an edge, 4 * 9 / 4 in a corner.
    y, _ = ops.partial_conv(np.ones((1, 5, 6, 1)), None, np.ones((3, 3, 1, 1)))
    np.testing.assert_array_equal(y, np.full((1, 5, 6, 1), 9))


def test_coverage_of_a_window_at_the_border():
    coverage = ops.mask_coverage(np.ones((1, 3, 4, 2)), (3, 3))
    assert coverage.dtype == np.float32
    expected = np.outer([2, 3, 2], [2, 3, 3, 2]) / 9
    np.testing.assert_array_equal(coverage[0, ..., 0], expected.astype(np.float32))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("planes", [ONE_PLANE, EACH_CHANNEL, NO_MASK])
def test_coverage_is_returned_on_request(planes, groups):
    x, mask, kernel, bias = make_case(planes=planes, groups=groups)
    options = dict(strides=2, input_dilation=3, feature_group_count=groups)
    y, new_mask, coverage = ops.partial_conv(
        x, mask, kernel, bias, **options, return_coverage=True
    )
    expected = ops.partial_conv(x, mask, kernel, bias, **options)
    chex.assert_trees_all_equal((y, new_mask), expected)
    assert coverage.dtype == np.float32
    chex.assert_equal_shape([coverage, new_mask])
    np.testing.assert_array_equal(coverage > 0, new_mask > 0)
    masks = np.broadcast_to(True if mask is None else mask, x.shape)
    per_group = [
        ops.mask_coverage(m, (3, 3), strides=2, input_dilation=3)
        for m in np.split(masks, groups, axis=-1)
    ]
    per_group = np.repeat(np.concatenate(per_group, -1), 6 // groups, axis=-1)
    np.testing.assert_array_equal(np.broadcast_to(coverage, y.shape), per_group)


def test_update_mask_and_coverage_take_input_dilation():
    x, mask, kernel, _ = make_case()
    options = dict(input_dilation=(2, 3), padding=1)
    _, new_mask, coverage = ops.partial_conv(
        x, mask, kernel, **options, return_coverage=True
    )
    np.testing.assert_array_equal(ops.update_mask(mask, (3, 3), **options), new_mask)
    np.testing.assert_array_equal(ops.mask_coverage(mask, (3, 3), **options), coverage)


def test_coverage_is_the_inverse_of_the_scale():
    x, mask, kernel, _ = make_case(planes=EACH_CHANNEL)
    options = dict(strides=2, padding=((1, 2), "CIRCULAR"), kernel_dilation=2)
    y, new_mask = ops.partial_conv(x, mask, kernel, **options)
    coverage = ops.mask_coverage(mask, (3, 3), **options)
    unscaled, _ = ops.partial_conv(np.where(mask, x, 0), None, kernel, **options)
    unscaled *= ops.mask_coverage(np.ones_like(mask), (3, 3), **options)
    np.testing.assert_allclose(y * coverage, unscaled, atol=1e-5)
    np.testing.assert_array_equal(new_mask, coverage > 0)


def test_bias_is_added_to_valid_outputs_only():
    mask = np.zeros((1, 1, 8, 1))
    mask[..., 0, :] = 1
    bias = np.array([5.0, -7.0])
    y, new_mask = ops.partial_conv(mask, mask, np.zeros((1, 3, 1, 2)), bias)
    np.testing.assert_array_equal(new_mask[0, 0, :, 0], [1, 1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(y, new_mask * bias)


# Invariants.


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("padding", ["VALID", "CIRCULAR"])
@pytest.mark.parametrize("given_mask", [True, False], ids=["mask of ones", "no mask"])
def test_without_holes_it_is_a_convolution_bit_for_bit(given_mask, padding, dtype):
    x, mask, kernel, bias = make_case((9, 8))
    x, kernel, bias = (a.astype(dtype) for a in (x, kernel, bias))
    mask = np.ones_like(mask) if given_mask else None
    y, new_mask = ops.partial_conv(x, mask, kernel, bias, strides=2, padding=padding)
    conv = nn.Conv(6, (3, 3), strides=2, padding=padding)
    expected = conv.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(new_mask, np.ones((*expected.shape[:-1], 1)))


def test_without_holes_it_is_a_convolution_of_a_small_map_to_rounding():
    x, mask, kernel, bias = make_case((5, 4), (3, 3))  # 6 windows of 9 taps.
    y, _ = ops.partial_conv(x, np.ones_like(mask), kernel, bias, padding="VALID")
    conv = nn.Conv(6, (3, 3), padding="VALID")
    expected = conv.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("content", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("planes", [ONE_PLANE, EACH_CHANNEL])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "REFLECT"])
def test_hole_contents_change_nothing(padding, groups, planes, content):
    x, mask, kernel, bias = make_case(planes=planes, groups=groups)
    options = dict(padding=padding, feature_group_count=groups)
    expected = gradients(np.where(mask, x, 0), mask, kernel, bias, **options)
    actual = gradients(np.where(mask, x, content), mask, kernel, bias, **options)
    chex.assert_tree_all_finite(actual)
    chex.assert_trees_all_equal(actual, expected)
    assert not np.any(np.where(mask, 0, actual[1]))


@pytest.mark.parametrize("content", [0.0, np.nan])
def test_all_holes_give_zeros_and_zero_gradients(content):
    x, mask, kernel, bias = make_case()
    results = gradients(np.full_like(x, content), np.zeros_like(mask), kernel, bias)
    _, new_mask = ops.partial_conv(x, np.zeros_like(mask), kernel, bias)
    for result in (*results, new_mask):
        np.testing.assert_array_equal(result, np.zeros_like(result))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), size=st.sampled_from([1, 3, 5]), one=st.booleans())
def test_masks_only_grow(seed, size, one):
    rng = np.random.default_rng(seed)
    mask = rng.random((1, 12, 12, 1)) > rng.random()
    larger = mask | (rng.random(mask.shape) > 0.9)
    new = ops.update_mask(mask, (1 if one else size, size))
    assert np.all(new >= mask)
    assert np.all(ops.update_mask(larger, (1 if one else size, size)) >= new)


@pytest.mark.parametrize("groups", [1, 2])
def test_one_plane_equals_repeated_planes_bit_for_bit(groups):
    x, mask, kernel, bias = make_case(groups=groups)
    options = dict(strides=2, padding=1, feature_group_count=groups)
    repeated = np.repeat(mask, x.shape[-1], axis=-1)
    chex.assert_trees_all_equal(
        gradients(x, mask, kernel, bias, **options),
        gradients(x, repeated, kernel, bias, **options),
    )
    _, new_mask = ops.partial_conv(x, mask, kernel, **options)
    _, new_masks = ops.partial_conv(x, repeated, kernel, **options)
    np.testing.assert_array_equal(np.broadcast_to(new_mask, new_masks.shape), new_masks)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("planes", [(1, 1, 1), (1, 2, 1), (3, 2, 1)], ids=str)
def test_sequences_equal_their_concatenation(planes, groups):
    channels = 3, 2, 1
    x, mask, kernel, bias = make_case(channels=6, planes=EACH_CHANNEL, groups=groups)
    options = dict(strides=(1, 2), feature_group_count=groups)
    sources, masks, dense = [], [], []
    for c, p in zip(channels, planes):
        start = sum(s.shape[-1] for s in sources)
        sources.append(x[..., start : start + c])
        masks.append(mask[..., start : start + p])
        dense.append(np.broadcast_to(masks[-1], sources[-1].shape))
    dense = np.concatenate(dense, axis=-1)
    y, *expected = gradients(x, dense, kernel, bias, **options)
    y_sources, dxs, *actual = gradients(sources, masks, kernel, bias, **options)
    actual.insert(0, np.concatenate(dxs, axis=-1))
    assert_close([y_sources, *actual], [y, *expected])
    _, new_mask = ops.partial_conv(sources, masks, kernel, bias, **options)
    _, new_dense = ops.partial_conv(x, dense, kernel, bias, **options)
    np.testing.assert_array_equal(new_mask, new_dense)


def test_sequences_without_a_mask_equal_their_concatenation():
    x, _, kernel, _ = make_case()
    y, new_mask = ops.partial_conv((x[..., :1], x[..., 1:]), None, kernel)
    expected, expected_mask = ops.partial_conv(x, None, kernel)
    assert_close(y, expected)
    np.testing.assert_array_equal(new_mask, expected_mask)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("source", [jnp.asarray, ops.Upsampled])
def test_an_input_of_several_may_be_all_valid(source, groups):
    x, mask, kernel, bias = make_case((8, 8), groups=groups)
    half = x[:, ::2, ::2, :2] if source is ops.Upsampled else x[..., :2]
    inputs = [source(half), x[..., 2:]]
    ones = source(np.ones((*half.shape[:-1], 1), bool))
    options = dict(feature_group_count=groups)
    for ours, theirs in [([None, mask], [ones, mask]), ([None, None], None)]:
        chex.assert_trees_all_equal(
            ops.partial_conv(inputs, ours, kernel, bias, **options),
            ops.partial_conv(inputs, theirs, kernel, bias, **options),
        )
    masks = [None, mask.astype(np.uint8)]
    assert ops.partial_conv(inputs, masks, kernel, **options)[1].dtype == np.uint8


def test_upsample_repeats_pixels():
    x = np.arange(4).reshape(1, 2, 2, 1)
    expected = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    np.testing.assert_array_equal(ops.upsample(x)[0, ..., 0], expected)
    np.testing.assert_array_equal(ops.upsample(x[:, 0])[0, :, 0], [0, 0, 1, 1])


UPSAMPLED = [
    *[((4, 5), (size, size), "SAME", {}) for size in (1, 2, 3, 4, 5)],
    ((6,), (3,), "SAME", {}),
    ((2, 3, 4), (3, 2, 3), "SAME", {}),
    ((4, 5), (3, 5), [(2, 0), (1, 3)], {}),
    ((4, 5), (3, 3), 1, {}),
    ((4, 5), (3, 3), [(4, -2), (2, 0)], {}),
    ((4, 5), (3, 3), "SAME", {"kernel_dilation": 2}),
    ((1, 2), (3, 9), "SAME", {"kernel_dilation": (1, 3)}),
    # These repeat the map: large kernels, other sizes, circular padding, groups.
    ((4, 5), (7, 7), "SAME", {}),
    ((4, 5), (3, 3), "VALID", {}),
    ((4, 5), (3, 3), [1, "CIRCULAR"], {}),
    ((4, 5), (3, 3), 1, {"strides": 2}),
    ((4, 5), (3, 3), "SAME", {"feature_group_count": 2}),
]


@pytest.mark.parametrize(
    "geometry, planes",
    [
        *mostly_slow([(geometry, ONE_PLANE) for geometry in UPSAMPLED], every=4),
        *[(UPSAMPLED[2], planes) for planes in (EACH_CHANNEL, NO_MASK)],
    ],
)
@pytest.mark.usefixtures("fast_compilation_once")
def test_upsampled_inputs_equal_repeated_ones(geometry, planes):
    spatial, size, padding, options = geometry
    case = {"size": size, "planes": planes, "seed": 1}
    skip_spatial = tuple(2 * n for n in spatial)
    x, mask, _, _ = make_case(spatial, channels=3, **case)
    skip, skip_mask, kernel, bias = make_case(skip_spatial, channels=5, **case)
    groups = options.get("feature_group_count", 1)
    kernel = np.concatenate([kernel, kernel[..., :3, :]], axis=-2)[
        ..., : 8 // groups, :
    ]
    if planes == NO_MASK:
        low, plain = None, None
    else:
        low = [ops.Upsampled(mask), skip_mask]
        plain = [ops.upsample(mask), skip_mask]
        # No output is scaled up from a single valid input, which would also scale up
        # the rounding differences between the two forms.
        low[1], plain[1] = (np.ones_like(skip_mask) for _ in range(2))

    @functools.partial(jax.jit, static_argnames="source")
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3), has_aux=True)
    def run(x, skip, kernel, bias, mask, source):
        y, new_mask = ops.partial_conv(
            [source(x), skip], mask, kernel, bias, padding=padding, **options
        )
        return jnp.sin(y).sum(), (y, new_mask)

    actual = run(x, skip, kernel, bias, low, ops.Upsampled)
    assert_close(actual, run(x, skip, kernel, bias, plain, ops.upsample), 5e-5)


def test_upsampled_input_equals_reference():
    x, mask, kernel, bias = make_case((4, 5))
    x[0] = np.where(mask[0], x[0], np.nan)
    y, new_mask = ops.partial_conv(ops.Upsampled(x), ops.Upsampled(mask), kernel, bias)
    expected, expected_mask = reference.partial_conv(
        np.nan_to_num(ops.upsample(x)), ops.upsample(mask), kernel, bias
    )
    assert_close(y, expected)
    np.testing.assert_array_equal(new_mask, expected_mask[..., :1])


def test_an_upsampled_map_is_never_materialized_on_cpus():
    x, kernel = jnp.ones((1, 32, 32, 4)), jnp.ones((3, 3, 4, 6))

    def lowered(source):
        apply = jax.jit(lambda x: ops.partial_conv(source(x), None, kernel))
        return apply.lower(x).as_text()

    assert "tensor<1x64x64x4x" in lowered(ops.upsample)
    assert "tensor<1x64x64x4x" not in lowered(ops.Upsampled)


def test_products_of_an_upsampled_map_have_its_dtype():
    x, kernel = jnp.ones((1, 4, 4, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 5))

    def loss(x, kernel):
        y, _ = ops.partial_conv(ops.Upsampled(x), None, kernel.astype(x.dtype))
        return jnp.sin(y.astype(jnp.float32)).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    types = [line.rpartition(" : ")[2] for line in products]
    dtypes = [tuple(re.findall(r"x([a-z]+\d+)>", line)) for line in types]
    # Products are summed in float32. Their gradients are of the inputs' dtype.
    bf16 = ("bf16",) * 3
    assert sorted(dtypes) == [bf16, bf16, ("bf16", "bf16", "f32")]


def test_an_upsampled_map_of_bfloat16_is_as_exact_as_a_repeated_one():
    x, _, kernel, _ = make_case((32, 32), channels=64, features=16)
    x, kernel = (a.astype(jnp.bfloat16) for a in (x, kernel))
    exact = ops.partial_conv(ops.Upsampled(x * 1.0), None, kernel.astype(np.float32))[0]

    def errors(source):
        y, _ = jax.jit(lambda x: ops.partial_conv(source(x), None, kernel))(x)
        # Outputs at the border are scaled, thus rounded twice.
        error = (np.asarray(y, np.float32) - exact)[:, 1:-1, 1:-1]
        return np.sqrt(np.mean(error**2)), np.abs(error).max()

    for ours, plain in zip(errors(ops.Upsampled), errors(ops.upsample)):
        assert ours <= 1.01 * plain


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (1, 0, 4, 3), (1, 4, 4, 0)])
def test_an_empty_upsampled_map(shape):
    x, kernel = jnp.ones(shape), jnp.ones((3, 3, shape[-1], 5))
    chex.assert_trees_all_equal(
        ops.partial_conv(ops.Upsampled(x), None, kernel),
        ops.partial_conv(ops.upsample(x), None, kernel),
    )


def test_nested_upsampling_is_refused():
    twice = ops.Upsampled(ops.Upsampled(jnp.ones((1, 2, 2, 3))))
    with pytest.raises(ValueError, match="inputs must be Upsampled once"):
        ops.partial_conv(twice, None, jnp.ones((3, 3, 3, 5)))


def test_mask_of_an_upsampled_input_is_upsampled():
    x, mask, kernel, _ = make_case()
    for masks in (mask, ops.upsample(mask)):
        with pytest.raises(ValueError, match="mask must be Upsampled if and only if"):
            ops.partial_conv(ops.Upsampled(x), masks, kernel)


@pytest.mark.parametrize("planes", [1, 32])
def test_bfloat16_counts_past_256(planes):
    # With inputs of 1 and a single kernel weight of 1, the output is the scale
    # sum(1) / sum(M). Windows have 7 * 7 * 32 = 1568 inputs.
    kernel = np.zeros((7, 7, 32, 1), jnp.bfloat16)
    kernel[3, 3, 0] = 1
    mask = np.random.default_rng(0).random((1, 16, 16, planes)) > 0.2
    x = np.ones((1, 16, 16, 32), jnp.bfloat16)
    y, _ = ops.partial_conv(x, mask, kernel)
    counts = np.pad(np.broadcast_to(mask, x.shape)[0].sum(axis=-1), 3)
    windows = np.lib.stride_tricks.sliding_window_view(counts, (7, 7))
    valid = windows.sum(axis=(-2, -1), dtype=np.float32)
    assert valid.min() > 256
    expected = np.where(mask[0, ..., 0], np.float32(1568) / valid, 0)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y[0, ..., 0], expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.float16, jnp.bfloat16])
def test_any_dtype_of_mask_gives_the_same_and_is_kept(dtype):
    x, mask, kernel, bias = make_case()
    expected, expected_mask = ops.partial_conv(x, mask.astype(np.float32), kernel, bias)
    y, new_mask = ops.partial_conv(x, mask.astype(dtype), kernel, bias)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(new_mask, expected_mask)
    updated = ops.update_mask(mask.astype(dtype), (3, 3))
    np.testing.assert_array_equal(updated, expected_mask)
    assert new_mask.dtype == updated.dtype == dtype
    assert expected_mask.dtype == np.float32


def test_new_mask_without_a_mask_is_float32_and_has_a_batch():
    _, new_mask = ops.partial_conv(np.ones((3, 4, 4, 2)), None, np.ones((3, 3, 2, 1)))
    assert new_mask.dtype == np.float32
    np.testing.assert_array_equal(new_mask, np.ones((3, 4, 4, 1)))


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((0, 1), "CIRCULAR")], ids=str)
def test_update_mask_is_the_mask_of_partial_conv(padding):
    x, mask, kernel, _ = make_case(planes=EACH_CHANNEL)
    options = dict(strides=(1, 2), padding=padding, kernel_dilation=2)
    _, expected = ops.partial_conv(x, mask, kernel, **options)
    actual = ops.update_mask(mask, (3, 3), **options)
    np.testing.assert_array_equal(actual, expected)


def test_padding_in_lower_case_and_as_a_number_equals_the_other_forms():
    x, mask, kernel, _ = make_case()
    for a, b in [
        ("same", "SAME"),
        (("causal", 1), ("CAUSAL", 1)),
        (2, ((2, 2), (2, 2))),
    ]:
        chex.assert_trees_all_equal(
            ops.partial_conv(x, mask, kernel, padding=a),
            ops.partial_conv(x, mask, kernel, padding=b),
        )


# Transformations.


class VariantsTest(chex.TestCase):
    @chex.all_variants
    def test_partial_conv(self):
        x, mask, kernel, bias = make_case()
        actual = self.variant(ops.partial_conv)(x, mask, kernel, bias)
        assert_close(actual, ops.partial_conv(x, mask, kernel, bias))

    @chex.all_variants
    def test_update_mask_and_coverage(self):
        _, mask, _, _ = make_case()
        for function in (ops.update_mask, ops.mask_coverage):
            actual = self.variant(lambda m, f=function: f(m, (3, 3)))(mask)
            chex.assert_trees_all_equal(actual, function(mask, (3, 3)))

    @chex.all_variants
    def test_composite(self):
        x, mask, _, _ = make_case()
        actual = self.variant(ops.composite)(-x, x, mask)
        chex.assert_trees_all_equal(actual, np.where(mask, x, -x))


def test_vmap_over_everything():
    xs, masks, kernels, biases = zip(*(make_case(seed=seed) for seed in range(3)))
    stacked = map(np.stack, (xs, masks, kernels, biases))
    y, new_mask = jax.vmap(ops.partial_conv)(*stacked)
    for i, case in enumerate(zip(xs, masks, kernels, biases)):
        expected, expected_mask = ops.partial_conv(*case)
        assert_close(y[i], expected)
        np.testing.assert_array_equal(new_mask[i], expected_mask)


@pytest.mark.parametrize("to_array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_a_mask_from_outside_of_a_jitted_function(to_array):
    x, mask, kernel, _ = make_case()
    mask = to_array(mask, np.float32)
    y = jax.jit(lambda x: ops.partial_conv(x, mask, kernel)[0])(x)
    assert_close(y, ops.partial_conv(x, mask, kernel)[0])
    comp = jax.jit(lambda x: ops.composite(x, -x, mask))(x)
    np.testing.assert_array_equal(comp, ops.composite(x, -x, mask))


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_equal_finite_differences(groups):
    x, mask, kernel, bias = make_case(
        (5, 4), planes=EACH_CHANNEL, groups=groups, features=2
    )
    apply = functools.partial(ops.partial_conv, strides=2, feature_group_count=groups)
    with jax.enable_x64(True):
        arguments = [jnp.asarray(a, np.float64) for a in (x, kernel, bias)]
        check_grads(
            lambda x, kernel, bias: apply(x, mask, kernel, bias)[0],
            arguments,
            order=1,
            modes=("fwd", "rev"),
        )


@pytest.mark.parametrize("ones", [True, False], ids=["mask of ones", "no mask"])
def test_constant_masks_are_not_folded_by_the_compiler(ones):
    # XLA would take minutes to fold the box filter of a large mask.
    def apply(x):
        mask = jnp.ones((*x.shape[:-1], 1)) if ones else None
        return ops.partial_conv(x, mask, jnp.ones((3, 3, 3, 1)))

    compiled = jax.jit(apply).lower(jnp.ones((1, 16, 16, 3))).compile()
    assert "reduce-window" in compiled.as_text()


def test_precision_reaches_the_convolution():
    x, mask, kernel, _ = make_case()
    for sources in (1, 2):
        apply = jax.jit(functools.partial(ops.partial_conv, precision="highest"))
        arguments = [x] * sources, [mask] * sources, np.tile(kernel, (1, 1, sources, 1))
        lowered = apply.lower(*arguments).as_text()
        assert lowered.count("stablehlo.convolution") == sources
        assert lowered.count("precision HIGHEST>, #stablehlo<precision HI") == sources


# Composite.


def test_composite_takes_the_target_where_it_is_valid_and_nothing_else():
    rng = np.random.default_rng(0)
    output, target = rng.standard_normal((2, 2, 4, 4, 3)).astype(np.float32)
    mask = (rng.random((2, 4, 4, 1)) > 0.5).astype(np.uint8)
    unknown = np.where(mask == 1, target, np.nan)
    ignored = np.where(mask == 1, np.nan, output)
    comp = ops.composite(ignored, unknown, mask)
    np.testing.assert_array_equal(comp, np.where(mask == 1, target, output))
    gradient = jax.grad(lambda o: ops.composite(o, unknown, mask).sum())(ignored)
    np.testing.assert_array_equal(gradient, np.broadcast_to(1 - mask, target.shape))
    # Without a batch, and with a mask for each channel.
    masks = rng.random((4, 4, 3)) > 0.5
    comp = ops.composite(output[0], target[0], masks)
    np.testing.assert_array_equal(comp, np.where(masks, target[0], output[0]))


# Errors.


@pytest.mark.parametrize(
    "shape",
    [(2, 8, 7), (1, 8, 7, 1), (2, 1, 1, 1), (8, 7, 1), (2, 8, 7, 2), (2, 7, 8, 1), ()],
    ids=str,
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_a_mask_of_a_wrong_shape_is_not_broadcast(shape, compiled):
    x, _, kernel, _ = make_case()
    maybe_jit = jax.jit if compiled else lambda f: f
    message = r"mask must be of shape \(2, 8, 7, 1\)"
    with pytest.raises(ValueError, match=message):
        maybe_jit(ops.partial_conv)(x, np.ones(shape), kernel)
    with pytest.raises(ValueError, match=message):
        maybe_jit(ops.composite)(x, x, np.ones(shape))


# Masks that are not binary.


def calls_with(x, mask, gray, kernel):
    """List calls of every function with a mask that is gray where it is valid."""
    return [
        lambda: ops.partial_conv(x, gray, kernel),
        lambda: ops.partial_conv([x, x], [mask, gray], np.tile(kernel, (1, 1, 2, 1))),
        lambda: ops.partial_conv(ops.Upsampled(x), ops.Upsampled(gray), kernel),
        lambda: ops.update_mask(gray, (3, 3)),
        lambda: ops.mask_coverage(gray, (3, 3)),
        lambda: ops.composite(x, -x, gray),
        lambda: ops.is_valid(gray),
    ]


@pytest.mark.parametrize("maybe_jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("value", [0.4, 0.5, 0.6, 255, -1, np.nan])
def test_what_is_above_one_half_is_valid(value, maybe_jit):
    x, mask, kernel, _ = make_case()
    gray = np.where(mask, value, 0).astype(np.float32)
    binary = (gray > 0.5).astype(np.float32)
    assert binary.any() == (value > 0.5)

    def results(gray):
        return [call() for call in calls_with(x, mask, gray, kernel)]

    chex.assert_trees_all_equal(maybe_jit(results)(gray), maybe_jit(results)(binary))


@pytest.mark.parametrize("maybe_jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_checkify_finds_a_mask_that_is_not_binary(maybe_jit):
    x, mask, kernel, _ = make_case()

    def apply(mask):
        ops.check_binary(mask)
        return ops.partial_conv(x, mask, kernel)

    def check(mask):
        checked = checkify.checkify(maybe_jit(apply), errors=checkify.user_checks)
        error, results = checked(mask)
        error.throw()
        return results

    for value in (0.4, 255, -1, np.nan):
        with pytest.raises(
            checkify.JaxRuntimeError, match="mask must be binary.*binarize it first"
        ):
            check(np.where(mask, value, 0).astype(np.float32))
    for dtype in (bool, np.uint8, np.float32):
        given = mask.astype(dtype)
        chex.assert_trees_all_equal(check(given), maybe_jit(apply)(given))


def test_a_mask_that_is_not_binary_is_refused_where_its_values_are_known():
    _, mask, *_ = make_case()
    for dtype in (bool, np.int8, np.float32):
        ops.check_binary(mask.astype(dtype))
    for value in (0.4, 255, -1, np.nan):
        with pytest.raises(ValueError, match="mask must be binary"):
            ops.check_binary(np.where(mask, value, 0))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_programs_have_no_effects(dtype):
    """An effect would make each call slow, and keep programs from being serialized."""
    x, mask, kernel, _ = make_case()

    def results(given):
        return [call() for call in calls_with(x, mask, given, kernel)]

    assert not jax.make_jaxpr(results)(mask.astype(dtype)).effects


def test_a_mask_of_bool_is_not_compared():
    x, mask, kernel, _ = make_case()
    jaxpr = str(jax.make_jaxpr(ops.partial_conv)(x, mask, kernel))
    assert "gt" not in jaxpr.split("reduce_window")[0]


X, M, K, B = make_case()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, M, K[:, :, :3]), {}, "kernel must be .* C_in = 4"),
        ((X, M, K), dict(feature_group_count=2), "kernel must be .* C_in"),
        ((X, M, K), dict(feature_group_count=0), "kernel must be .* C_in"),
        ((X, M, K[0, 0, 0]), {}, "kernel must be"),
        ((X, M, K[0, 0]), {}, "as many spatial axes as the kernel, one to three"),
        ((X, M, K[0]), {}, "as many spatial axes as the kernel, one to three"),
        ((X[0, 0], M[0, 0], K), {}, r"inputs must be \[N, \*spatial, C\]"),
        ((X, M, K, B[:5]), {}, r"bias must be of shape \(6,\), got \(5,\)"),
        ((X, M, K, B[None]), {}, r"bias must be of shape \(6,\), got \(1, 6\)"),
        ((X, M, K), dict(strides=0), "strides must be a positive number"),
        ((X, M, K), dict(strides=np.array([2, 0])), "strides must be .* 2 spatial"),
        ((X, M, K), dict(strides=np.array(2)), "strides must be .* 2 spatial"),
        ((M, X, K), {}, "are inputs and mask swapped"),
        ((X, M, K), dict(strides=(1, 2, 1)), "strides must be .* each of 2 spatial"),
        ((X, M, K), dict(strides=1.5), "strides must be a positive number"),
        ((X, M, K), dict(kernel_dilation=-1), "kernel_dilation must be a positive"),
        ((X, M, K), dict(padding="CAUSAL"), "padding must be 'SAME'.*'CAUSAL'"),
        ((X, M, K), dict(padding=("SAME", 1)), "padding.* for each .*'SAME'"),
        ((X, M, K), dict(padding=(1,)), "padding must be .* each of 2 spatial axes"),
        ((X, M, K), dict(padding=((1, 1, 1), (1, 1))), "padding must be"),
        ((X, M, K), dict(padding=1.5), "padding must be"),
        ((X, M, K), dict(input_dilation=0), "input_dilation must be a positive"),
        (((), (), K), {}, "inputs must be"),
        (((), None, K), {}, "inputs must be"),
        (((X, X[:1]), (M, M[:1]), K), {}, "differ in C only"),
        (((X, X), M, K), {}, "mask must be a sequence as long as inputs"),
        (((X, X), (M,), K), {}, "mask must be a sequence as long as inputs"),
        ((X, (M,), K), {}, "mask must be a sequence .* and an array otherwise"),
    ],
)
def test_errors_of_partial_conv(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.partial_conv(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, M, K[:, :, :3]), {}, "kernel must be .* C_in = 4"),
        ((X, M, K), dict(transpose_kernel=True), "kernel must be .* C_in = 4"),
        ((X, M, K[0, 0, 0]), dict(transpose_kernel=True), "kernel must be"),
        ((X, M, K, B[:5]), {}, r"bias must be of shape \(6,\), got \(5,\)"),
        ((X, M, K), dict(strides=0), "strides must be a positive number"),
        ((X, M, K), dict(padding="REFLECT"), "padding must be .* or 'CIRCULAR'; got"),
        ((X, M, K), dict(padding=("CAUSAL", 1)), "padding must be"),
        ((X, M[:1], K), {}, "mask must be of shape"),
    ],
)
def test_errors_of_partial_conv_transpose(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ops.partial_conv_transpose(*arguments, **options)


@pytest.mark.parametrize("function", [ops.update_mask, ops.mask_coverage])
@pytest.mark.parametrize(
    ("mask", "size", "message"),
    [
        (M, (3,), "as many spatial axes as the kernel"),
        (M[0, ..., 0], (3, 3), "as many spatial axes as the kernel"),
        (M, 3, "kernel_size must be"),
    ],
    ids=["size", "mask", "number"],
)
def test_errors_of_update_mask(function, mask, size, message):
    with pytest.raises(ValueError, match=message):
        function(mask, size)


def test_composite_refuses_different_shapes():
    with pytest.raises(ValueError, match="output and target must have the same shape"):
        ops.composite(X, X[:1], M)


def test_numbers_may_be_numpy_integers():
    options = dict(strides=2, padding=1, kernel_dilation=2)
    expected = ops.partial_conv(X, M, K, **options)
    options = {name: np.int64(value) for name, value in options.items()}
    chex.assert_trees_all_equal(ops.partial_conv(X, M, K, **options), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_empty_batch_has_gradients(dtype):
    x, mask = jnp.zeros((0, 40, 40, 32), dtype), jnp.ones((0, 40, 40, 1), dtype)
    kernel = jnp.ones((3, 3, 32, 4), dtype)

    @jax.grad
    def gradient(kernel):
        return ops.partial_conv(x, mask, kernel)[0].sum()

    chex.assert_trees_all_equal(gradient(kernel), jnp.zeros_like(kernel))


def test_groups_and_sizes_of_kernels_are_checked():
    x, mask, kernel, bias = make_case(channels=4, groups=2)
    with pytest.raises(ValueError, match="feature_group_count = 2.0 dividing"):
        ops.partial_conv(x, mask, kernel, bias, feature_group_count=2.0)
    ops.partial_conv(x, mask, kernel, bias, feature_group_count=2)  # Still works.
    with pytest.raises(ValueError, match=r"kernel_size must be positive, got \(0, 3\)"):
        ops.partial_conv(x, mask, np.ones((0, 3, 4, 6)))
