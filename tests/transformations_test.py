"""The layer under the transformations of JAX, wherever `nn.Conv` takes them."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pconv_jax import ops
from pconv_jax.layers import PartialConv, PartialConvTranspose

# They compile much; the older Python leaves them out.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_compilation")]

CHANNELS = 4


def make_inputs(batch=4, side=16, seed=0):
    """Make random inputs and a mask with all-hole windows."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, side, side, CHANNELS)).astype(np.float32)
    mask = rng.random((batch, side, side, 1)) > 0.5
    mask[:, :5, 2:9] = 0
    return x, mask


def make_params(layer):
    """Make parameters, with a bias that is not zero."""
    x, _ = make_inputs(1)
    params = layer.init(jax.random.key(1), x)["params"]
    return params | {"bias": jnp.sin(1.0 + jnp.arange(layer.features))}


# Large and small maps (fewer outputs than taps), and one that is left to XLA.
LAYERS = [
    PartialConv(CHANNELS, (3, 3)),
    PartialConv(CHANNELS, (5, 5), strides=4, padding=2),
    PartialConv(CHANNELS, (3, 3), feature_group_count=2),
    PartialConvTranspose(CHANNELS, (3, 3), strides=(2, 2)),
]


def loss(layer, params, x, mask):
    y, new_mask = layer.apply({"params": params}, x, mask)
    return jnp.sum(jnp.sin(y)) + jnp.sum(new_mask) * 0.5


def gradient(layer):
    return jax.grad(functools.partial(loss, layer), argnums=(0, 1))


def assert_close(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_remat(layer):
    x, mask = make_inputs()
    params = make_params(layer)
    remat = jax.checkpoint(functools.partial(loss, layer))
    actual = jax.jit(jax.grad(remat, argnums=(0, 1)))(params, x, mask)
    assert_close(actual, jax.jit(gradient(layer))(params, x, mask))


@pytest.mark.parametrize("layer", LAYERS[:1])
def test_scan(layer):
    x, mask = make_inputs()
    params = [make_params(layer), jax.tree.map(jnp.cos, make_params(layer))]

    def step(carry, params):
        h, m = layer.apply({"params": params}, *carry)
        return (jnp.tanh(h), m), None

    def scanned(params, x):
        (h, _), _ = jax.lax.scan(step, (x, mask), params)
        return h.sum()

    def unrolled(params, x):
        carry = x, mask
        for p in params:
            carry, _ = step(carry, p)
        return carry[0].sum()

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    dstacked, dx = jax.jit(jax.grad(scanned, argnums=(0, 1)))(stacked, x)
    dparams, expected_dx = jax.jit(jax.grad(unrolled, argnums=(0, 1)))(params, x)
    assert_close(dx, expected_dx)
    for i, expected in enumerate(dparams):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], dstacked), expected)


def test_lifted_scan_and_remat_of_linen():
    x, mask = make_inputs()

    class Block(nn.Module):
        @nn.compact
        def __call__(self, carry, _):
            h, m = PartialConv(CHANNELS, (3, 3))(*carry)
            return (nn.tanh(h), m), None

    scanned = nn.scan(
        nn.remat(Block),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=2,
    )()
    variables = scanned.init(jax.random.key(0), (x, mask), None)

    def total(variables):
        return scanned.apply(variables, (x, mask), None)[0][0].sum()

    def unrolled(variables):
        carry = x, mask
        for i in range(2):
            block = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
            carry, _ = Block().apply(block, carry, None)
        return carry[0].sum()

    actual, expected = (jax.jit(jax.grad(f))(variables) for f in (total, unrolled))
    assert_close(actual, expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_vmap_of_gradients(layer):
    xs, masks = zip(*(make_inputs(2, seed=seed) for seed in range(3)))
    params = make_params(layer)
    mapped = jax.jit(jax.vmap(gradient(layer), (None, 0, 0)))
    actual = mapped(params, np.stack(xs), np.stack(masks))
    for i, (x, mask) in enumerate(zip(xs, masks)):
        expected = jax.jit(gradient(layer))(params, x, mask)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], actual), expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_hessian_vector_products(layer):
    x, mask = make_inputs(2, 12)
    params = make_params(layer)
    tangents = jax.tree.map(jnp.cos, (params, jnp.asarray(x)))

    @jax.jit
    def products(params, x):
        def of(params, x):
            return gradient(layer)(params, x, mask)

        forward_over_reverse = jax.jvp(of, (params, x), tangents)[1]

        def directional(params, x):
            leaves = jax.tree.map(jnp.vdot, of(params, x), tangents)
            return sum(jax.tree.leaves(leaves))

        return forward_over_reverse, jax.grad(directional, (0, 1))(params, x)

    with jax.enable_x64(True):
        params, x, tangents = jax.tree.map(
            lambda a: jnp.asarray(a, jnp.float64), (params, x, tangents)
        )
        forward, reverse = products(params, x)
        chex.assert_trees_all_close(forward, reverse, rtol=1e-9, atol=1e-9)

        def moved(by):
            at = jax.tree.map(lambda a, t: a + by * t, (params, x), tangents)
            return jax.jit(gradient(layer))(*at, mask)

        step = 1e-5
        ends = moved(step), moved(-step)
        differences = jax.tree.map(lambda a, b: (a - b) / (2 * step), *ends)
        chex.assert_trees_all_close(forward, differences, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_shard_map_over_examples(layer, check_vma):
    x, mask = make_inputs(4)
    params = make_params(layer)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def total(params, x, mask):
        return jax.lax.psum(loss(layer, params, x, mask), "data")

    specs = dict(mesh=mesh, in_specs=(P(), P("data"), P("data")), check_vma=check_vma)
    outputs = jax.shard_map(
        lambda p, x, m: layer.apply({"params": p}, x, m), **specs, out_specs=P("data")
    )
    assert_close(
        jax.jit(outputs)(params, x, mask), layer.apply({"params": params}, x, mask)
    )
    sharded = jax.shard_map(total, **specs, out_specs=P())
    actual = jax.jit(jax.grad(sharded, argnums=(0, 1)))(params, x, mask)
    assert_close(actual, jax.jit(gradient(layer))(params, x, mask))


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_taken_inside_of_shard_map(check_vma):
    layer = LAYERS[0]
    x, mask = make_inputs(4)
    params = make_params(layer)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def of_inputs(params, x, mask):
        return gradient(layer)(params, x, mask)[1]

    specs = dict(mesh=mesh, in_specs=(P(), P("data"), P("data")), check_vma=check_vma)
    sharded = jax.jit(jax.shard_map(of_inputs, **specs, out_specs=P("data")))
    expected = jax.jit(gradient(layer))(params, x, mask)[1]
    assert_close(sharded(params, x, mask), expected)


@pytest.mark.parametrize("spec", [P("data"), P(None, "data")], ids=["batch", "rows"])
@pytest.mark.parametrize(
    "layer",
    [
        *LAYERS,
        PartialConv(CHANNELS, (3, 3), strides=2),
        PartialConv(CHANNELS, (3, 3), padding="VALID"),
    ],
)
def test_explicit_mesh(layer, spec):
    x, mask = make_inputs(2)
    params = make_params(layer)
    expected = jax.jit(gradient(layer))(params, x, mask)
    y, new_mask = layer.apply({"params": params}, x, mask)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, mask = (jax.device_put(a, NamedSharding(mesh, spec)) for a in (x, mask))
        params = jax.device_put(params, NamedSharding(mesh, P()))
        outputs = jax.jit(lambda p, x, m: layer.apply({"params": p}, x, m))
        actual = outputs(params, x, mask)
        gradients = jax.jit(gradient(layer))(params, x, mask)
        for array in (*actual, gradients[1]):
            placed = jax.typeof(array).sharding.spec
            assert tuple(placed)[: len(spec)] == tuple(spec)
    assert_close(jax.device_get(actual), (y, new_mask))
    assert_close(jax.device_get(gradients), expected)


SYMBOLIC = [
    *[
        (PartialConv, nn.Conv, dict(padding=padding, strides=strides))
        for padding in ("SAME", "VALID", 1)
        for strides in (1, 2)
    ],
    (PartialConv, nn.Conv, dict(padding=2, input_dilation=2, kernel_dilation=2)),
    (PartialConvTranspose, nn.ConvTranspose, dict(strides=(2, 2))),
]


@pytest.mark.parametrize(("layer", "conv", "fields"), SYMBOLIC)
@pytest.mark.parametrize("constraints", [(), ("h >= 16", "w >= 16")], ids=str)
def test_export_of_symbolic_sizes_works_where_that_of_conv_does(
    layer, conv, fields, constraints
):
    layer, conv = (c(3, (3, 3), **fields) for c in (layer, conv))
    params = make_params(layer)
    scope = export.SymbolicScope(constraints)
    x, mask = (
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), np.float32)
        for shape in (f"b, h, w, {CHANNELS}", "b, h, w, 1")
    )

    def ours(x, mask):
        return layer.apply({"params": params}, x, mask)

    def theirs(x, mask):
        return conv.apply({"params": params}, x)

    def attempt(apply):
        """Export a function, or return how JAX refuses to."""
        try:
            return export.export(jax.jit(apply))(x, mask)
        except ValueError as error:
            return type(error)

    exported = attempt(ours)
    assert attempt(theirs).out_avals[0].shape == exported.out_avals[0].shape
    exported = export.deserialize(exported.serialize())
    for batch, side in ((1, 16), (2, 19)):
        actual = exported.call(*(a.astype("f") for a in make_inputs(batch, side)))
        assert_close(actual, jax.jit(ours)(*make_inputs(batch, side)))
    # Not even the gradient of nn.Conv can be exported for some strides.
    gradients = [
        attempt(jax.grad(lambda x, m, f=f: jnp.sum(jax.tree.leaves(f(x, m))[0])))
        for f in (ours, theirs)
    ]
    if isinstance(gradients[1], type):
        assert gradients[0] is gradients[1]
    else:
        assert isinstance(gradients[0], export.Exported)
        actual = gradients[0].call(*(a.astype("f") for a in make_inputs(2, 19)))
        total = jax.jit(jax.grad(lambda x, m: ours(x, m)[0].sum()))
        expected = total(*make_inputs(2, 19))
        assert_close(actual, expected)


def test_export_of_symbolic_sizes_of_several_inputs():
    x, mask = make_inputs(2, 9)
    kernel = np.cos(np.arange(3 * 3 * 2 * CHANNELS * 2, dtype=np.float32))
    kernel = kernel.reshape(3, 3, 2 * CHANNELS, 2)
    scope = export.SymbolicScope()
    shapes = [
        jax.ShapeDtypeStruct(export.symbolic_shape(f"b, h, w, {c}", scope=scope), t)
        for c, t in ((CHANNELS, np.float32), (1, bool))
    ]

    def of_two(x, mask):
        return ops.partial_conv([x, x], [mask, None], kernel)

    def of_upsampled(x, mask):
        return ops.partial_conv(
            [ops.Upsampled(x), ops.upsample(x)], [ops.Upsampled(mask), None], kernel
        )

    for apply in (of_two, of_upsampled):
        exported = export.export(jax.jit(apply))(*shapes)
        assert_close(exported.call(x, mask), apply(x, mask))


def test_one_compilation_for_many_calls():
    layer = LAYERS[0]
    x, mask = make_inputs()
    params = make_params(layer)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def compiled(params, x, mask):
        return gradient(layer)(params, x, mask)

    for scale in (1.0, 2.0):
        compiled(params, x * scale, mask)
