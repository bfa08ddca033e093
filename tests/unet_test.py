import functools
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from pconv_jax import _conv, ops, unet
from pconv_jax.unet import PConvUNet, Stage
from tests.helpers import TESTDATA, reference

GOLDEN = np.load(TESTDATA / "unets.npz")


# Kernel size, input channels and features of PConv1, ..., PConv16.
PAPER = (
    (7, 3, 64),
    (5, 64, 128),
    (5, 128, 256),
    (3, 256, 512),
    *[(3, 512, 512)] * 4,
    *[(3, 512 + 512, 512)] * 4,
    (3, 512 + 256, 256),
    (3, 256 + 128, 128),
    (3, 128 + 64, 64),
    (3, 64 + 3, 3),
)


def make_inputs(batch=2, size=16, seed=0, channels=3):
    """Make images and a mask with a square hole in each."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(-1, 1, (batch, size, size, channels)).astype(np.float32)
    mask = np.ones((batch, size, size, 1), np.float32)
    for m in mask:
        y, x = rng.integers(0, size - 3, 2)
        m[y : y + 4, x : x + 4] = 0
    return images, mask


def make_model(**fields):
    """Make a small network, and variables in which all numbers differ."""
    model = PConvUNet(**(dict(depth=2, width=4) | fields))
    variables = jax.eval_shape(model.init, jax.random.key(0), *make_inputs())
    rng = np.random.default_rng(0)
    return model, jax.tree.map(
        lambda s: (
            rng.uniform(0.5, 1.5, s.shape).astype(s.dtype)
            if len(s.shape) == 1
            else (rng.standard_normal(s.shape) / s.shape[0]).astype(s.dtype)
        ),
        variables,
    )


def shapes_of(size, **fields):
    """Compute the shapes of outputs and variables of a network."""
    arguments = np.zeros((1, *size, 3), np.float32), np.ones((1, *size, 1), np.float32)
    return jax.eval_shape(
        PConvUNet(**fields).init_with_output, jax.random.key(0), *arguments
    )


def count(tree, name):
    return sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if re.search(name, jax.tree_util.keystr(path, simple=True, separator="/"))
    )


# Other implementations.


def golden_variables(name):
    """Rename the weights of the other network to our names."""
    params, stats = {}, {}
    shapes = [
        (n, shape)
        for n, shape in json.loads(str(GOLDEN[f"{name}/state_dict"]))
        if "mask" not in n and "num_batches" not in n
    ]
    for full_name, array in reference.recipe_weights(1, shapes).items():
        side, level, kind, leaf = re.search(
            r"(enc|dec)_?(\d)\.(conv|bn).*\.(\w+)$", full_name
        ).groups()
        number = int(level) if side == "enc" else 15 - int(level)
        if kind == "conv":
            # The kernels of naoto0804 are larger by C_in * kh * kw, which an import
            # undoes.
            leaf = {"weight": "kernel", "bias": "bias"}[leaf]
            array = array.transpose(2, 3, 1, 0) if leaf == "kernel" else array
            params.setdefault(f"pconv{number}", {})[leaf] = array
        elif leaf.startswith("running_"):
            stats.setdefault(f"bn{number}", {})[leaf.removeprefix("running_")] = array
        else:
            leaf = {"weight": "scale", "bias": "bias"}[leaf]
            params.setdefault(f"bn{number}", {})[leaf] = array
    params["pconv1"].setdefault("bias", np.zeros(64, np.float32))
    return {"params": params, "batch_stats": stats}


apply_golden = jax.jit(PConvUNet(depth=7).apply)


@pytest.mark.parametrize("name", ["naoto0804", "mmagic"])
def test_equals_other_networks(name):
    y, mask = apply_golden(golden_variables(name), GOLDEN["x"], GOLDEN["mask"])
    expected = GOLDEN[f"{name}/y"]
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()
    np.testing.assert_array_equal(mask, np.ones_like(GOLDEN["mask"]))


# The paper's table.


def test_stages_of_the_paper():
    encoder, decoder = unet.paper_stages()
    stages = (*encoder, *decoder)
    assert [(s.kernel_size, s.features) for s in stages] == [
        (size, features) for size, _, features in PAPER
    ]
    assert [i for i, s in enumerate(stages, 1) if not s.batch_norm] == [1, 16]
    slopes = [s.negative_slope for s in stages]
    assert slopes == [0.0] * 8 + [0.2] * 7 + [None]
    assert {s.padding for s in stages} == {None}


@pytest.mark.parametrize(
    ("fields", "encoder", "decoder"),
    [
        (dict(depth=1), [64], [3]),
        (dict(depth=3, width=5, out_features=1), [5, 10, 20], [10, 5, 1]),
        (dict(depth=5, width=2), [2, 4, 8, 16, 16], [16, 8, 4, 2, 3]),
    ],
    ids=str,
)
def test_stages_of_other_sizes(fields, encoder, decoder):
    stages = unet.paper_stages(**fields)
    assert tuple([s.features for s in side] for side in stages) == (encoder, decoder)


def test_parameters_of_the_paper():
    _, variables = shapes_of((256, 256))
    params, stats = variables["params"], variables["batch_stats"]
    norms = [f"bn{i}" for i in range(2, 16)]
    assert params.keys() == {*(f"pconv{i}" for i in range(1, 17)), *norms}
    for i, (size, channels, features) in enumerate(PAPER, 1):
        layer = jax.tree.map(jnp.shape, params[f"pconv{i}"])
        assert layer.pop("kernel") == (size, size, channels, features)
        assert layer == ({"bias": (features,)} if i in (1, 16) else {})
        if i not in (1, 16):
            norm, stat = params[f"bn{i}"], stats[f"bn{i}"]
            assert jax.tree.map(jnp.shape, norm) == dict.fromkeys(
                ("scale", "bias"), (features,)
            )
            assert jax.tree.map(jnp.shape, stat) == dict.fromkeys(
                ("mean", "var"), (features,)
            )
    assert stats.keys() == set(norms)
    assert count(params, "kernel") == 32_848_849
    assert count(params, "pconv.*bias") == 67
    assert count(params, "bn") == count(stats, "bn") == 10_880


def test_parameters_of_seven_levels_are_those_of_the_other_networks():
    _, variables = shapes_of((128, 256), depth=7)
    for name in ("naoto0804", "mmagic"):
        assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
            jnp.shape, golden_variables(name)
        )


def test_parameters_of_half_the_width():
    _, variables = shapes_of((256, 256), width=32)
    # All channels are halved except those of the image.
    halved = [
        size**2
        * (channels if i == 1 else (channels + 3 * (i == 16)) // 2)
        * (features if i == 16 else features // 2)
        for i, (size, channels, features) in enumerate(PAPER, 1)
    ]
    halved[15] = 9 * (32 + 3) * 3
    assert count(variables["params"], "kernel") == sum(halved)
    assert count(variables["params"], "bn") == 10_880 // 2


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        ((512, 512), {}),
        ((256, 512), {}),
        ((256, 256), dict(depth=7)),
        ((256, 128), dict(depth=7, conv="standard")),
        ((256, 256), dict(dtype=jnp.bfloat16)),
        ((8, 4), dict(depth=1, out_features=5)),
    ],
    ids=str,
)
def test_shapes(size, fields):
    (y, mask), _ = shapes_of(size, **fields)
    chex.assert_shape(y, (1, *size, fields.get("out_features", 3)))
    chex.assert_shape(mask, (1, *size, 1))
    assert y.dtype == mask.dtype == np.float32


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(depth=7, width=32),
        dict(depth=1, out_features=1),
        dict(conv="standard"),
        dict(sigmoid_head=True, param_dtype=jnp.bfloat16),
        dict(normalization=unet.IMAGENET),
        dict(stages=([Stage(4, 3, padding="SAME")], [Stage(3, 5)])),
        dict(stages=([Stage(4, 3, False), Stage(5, 1)], [Stage(6, 1), Stage(7, 3)])),
    ],
    ids=str,
)
def test_shapes_of_variables_are_those_of_init(fields):
    model = PConvUNet(**(dict(depth=3, width=4) | fields))
    images, mask = make_inputs(1, 4 * model.size_multiple)
    expected = jax.eval_shape(model.init, jax.random.key(0), images, mask)
    assert unet.variable_shapes(model, 3) == expected


@pytest.mark.parametrize(
    "fields",
    [
        dict(stages=([Stage(4, 2)], [Stage(3, 3)])),
        dict(stages=([Stage(4, 3)] * 2, [Stage(4, 3, padding="VALID"), Stage(3, 3)])),
        dict(stages=([Stage(4, 3)], [])),
        dict(stages=([Stage(4, 3)], [Stage(0, 3)])),
        dict(normalization=unet.Normalization((0, 0), (1, 1))),
    ],
    ids=str,
)
def test_there_are_no_shapes_of_variables_of_an_impossible_network(fields):
    with pytest.raises(ValueError, match="must (halve|have)"):
        unet.variable_shapes(PConvUNet(**fields), 3)


def test_properties():
    model = PConvUNet()
    assert (model.encoder, model.decoder) == unet.paper_stages()
    assert model.size_multiple == 256
    assert model.encoder_norms == ("bn2", "bn3", "bn4", "bn5", "bn6", "bn7", "bn8")


# Masks.


def test_depths_at_which_holes_are_closed():
    # One axis is enough: a window sees only a square hole if it does so on each axis.
    length, widths = 2048, (7, 15, 31, 47, 79, 143, 271, 527)
    starts = length // 2 + np.arange(256)[:, None]
    x = np.arange(length)[None]
    for level, width in enumerate(widths, 1):
        for hole, closed in ((width - 1, True), (width, False)):
            inside = (x >= starts) & (x < starts + hole)
            mask = ~inside[..., None]
            for stage in unet.paper_stages()[0][:level]:
                k = stage.kernel_size
                mask = ops.update_mask(mask, (k,), strides=2, padding=k // 2)
            # Narrower holes are closed at all positions; this one is not at some.
            assert bool(mask.all()) == closed, (level, hole)


def test_closing_depth_of_a_square_hole():
    mask = np.ones((1, 512, 512, 1), bool)
    mask[:, 256 - 23 : 256 + 24, 256 - 23 : 256 + 24] = False  # 47 pixels.
    open_after = []
    for stage in unet.paper_stages()[0]:
        k = stage.kernel_size
        mask = ops.update_mask(mask, (k, k), strides=2, padding=k // 2)
        open_after.append(not mask.all())
    assert open_after == [True] * 4 + [False] * 4


def test_a_hole_that_is_too_wide_stays_open_and_zero():
    model, variables = make_model()
    images, _ = make_inputs(1, 64)
    mask = np.ones((1, 64, 64, 1), np.float32)
    mask[:, :48, :48] = 0
    y, new_mask = jax.jit(model.apply)(variables, images, mask)
    assert 0 < new_mask.mean() < 1
    assert np.all(new_mask >= mask)
    np.testing.assert_array_equal(y, np.where(new_mask, y, 0))
    assert np.all(np.where(new_mask, np.abs(y).max(-1, keepdims=True), 1) > 0)


@pytest.mark.parametrize("conv", ["partial", "standard"])
def test_hole_contents_change_nothing(conv):
    model, variables = make_model(conv=conv)
    images, mask = make_inputs(2, 16)

    @jax.jit
    def run(params, images):
        def loss(params, images):
            (y, new_mask), updates = model.apply(
                variables | {"params": params},
                images,
                mask,
                train=True,
                mutable="batch_stats",
            )
            return jnp.sum(y**2), (y, new_mask, updates)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, images)

    expected = run(variables["params"], np.where(mask, images, 0.5))
    chex.assert_tree_all_finite(expected)
    assert not np.any(np.where(mask, 0, expected[1][1]))
    for content in (np.nan, np.inf, 1e30):
        actual = run(variables["params"], np.where(mask, images, content))
        chex.assert_trees_all_equal(actual, expected)


def test_masks_of_any_dtype_and_for_each_channel():
    model, variables = make_model()
    images, mask = make_inputs()
    apply = jax.jit(model.apply)
    y, new_mask = apply(variables, images, mask)
    for dtype in (bool, np.uint8, np.int32):
        actual, actual_mask = apply(variables, images, mask.astype(dtype))
        np.testing.assert_array_equal(actual, y)
        np.testing.assert_array_equal(actual_mask, new_mask)
        assert actual_mask.dtype == dtype
    actual, actual_mask = apply(variables, images, np.repeat(mask, 3, axis=-1))
    np.testing.assert_allclose(actual, y, atol=1e-6)
    np.testing.assert_array_equal(actual_mask, new_mask)


def test_all_hole_gives_zeros():
    model, variables = make_model()
    images, mask = make_inputs()
    y, new_mask = jax.jit(model.apply)(variables, images, np.zeros_like(mask))
    np.testing.assert_array_equal(y, np.zeros_like(y))
    np.testing.assert_array_equal(new_mask, np.zeros_like(mask))


# Normalization and types.


@functools.partial(jax.jit, static_argnums=0, static_argnames=("train", "freeze"))
def apply_and_capture(model, variables, images, mask, *, train, freeze=False):
    """Apply a network; return the output and the outputs of all submodules."""
    return model.apply(
        variables,
        images,
        mask,
        train=train,
        freeze_encoder_norm=freeze,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )


@pytest.mark.slow
def test_batch_normalization_in_training():
    model, variables = make_model()
    images, mask = make_inputs()
    (y, _), state = apply_and_capture(model, variables, images, mask, train=True)
    old, new, seen = (
        variables["batch_stats"],
        state["batch_stats"],
        state["intermediates"],
    )
    for name in ("bn2", "bn3"):  # One of the encoder and one of the decoder.
        x = seen[name.replace("bn", "pconv")]["__call__"][0][0]
        mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        for key, value in (("mean", mean), ("var", var)):
            expected = 0.9 * old[name][key] + 0.1 * value
            np.testing.assert_allclose(new[name][key], expected, rtol=1e-4, atol=1e-6)
        affine = variables["params"][name]
        expected = (x - mean) / np.sqrt(var + 1e-5) * affine["scale"] + affine["bias"]
        actual = seen[name]["__call__"][0]
        np.testing.assert_allclose(actual, expected, atol=1e-4)
    in_evaluation, _ = model.apply(variables, images, mask)
    assert np.abs(y[0] - in_evaluation).max() > 1e-2


def test_frozen_encoder_norms_use_their_running_statistics():
    model, variables = make_model()
    images, mask = make_inputs()
    apply = functools.partial(apply_and_capture, model, variables, images, mask)
    _, frozen = apply(train=True, freeze=True)
    _, evaluated = apply(train=False)
    old, new = variables["batch_stats"], frozen["batch_stats"]
    assert model.encoder_norms == ("bn2",)
    for name in old:
        if name in model.encoder_norms:
            chex.assert_trees_all_equal(new[name], old[name])
            chex.assert_trees_all_equal(
                frozen["intermediates"][name], evaluated["intermediates"][name]
            )
        else:
            for key in ("mean", "var"):
                assert np.abs(new[name][key] - old[name][key]).min() > 0
    # Outside of training the flag has no effect.
    chex.assert_trees_all_equal(apply(train=False, freeze=True), apply(train=False))


@pytest.mark.slow
def test_statistics_are_shared_by_devices():
    model, variables = make_model()
    synced, _ = make_model(axis_name="batch")
    images, mask = make_inputs(8)

    def step(model, variables, images, mask):
        def loss(params):
            (y, _), updates = model.apply(
                variables | {"params": params},
                images,
                mask,
                train=True,
                mutable="batch_stats",
            )
            return jnp.mean(y**2), (y, updates)

        return jax.grad(loss, has_aux=True)(variables["params"])

    def device_step(variables, images, mask):
        gradients, (y, updates) = step(synced, variables, images, mask)
        return lax.pmean(gradients, "batch"), y, lax.pmean(updates, "batch")

    gradients, (y, updates) = jax.jit(functools.partial(step, model))(
        variables, images, mask
    )
    parallel_step = jax.pmap(
        device_step,
        axis_name="batch",
        in_axes=(None, 0, 0),
        out_axes=(None, 0, None),
        devices=jax.devices("cpu")[:4],
    )
    shards = (a.reshape(4, 2, *a.shape[1:]) for a in (images, mask))
    sharded_gradients, sharded_y, sharded_updates = parallel_step(variables, *shards)
    # Outputs are up to 10.
    np.testing.assert_allclose(sharded_y.reshape(y.shape), y, rtol=1e-5, atol=1e-4)
    chex.assert_trees_all_close(sharded_updates, updates, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(sharded_gradients, gradients, rtol=1e-5, atol=1e-5)


def test_bfloat16_affects_only_the_computation():
    model, variables = make_model()
    images, mask = make_inputs()
    half = PConvUNet(depth=2, width=4, dtype=jnp.bfloat16)
    for x in (images, images.astype(jnp.bfloat16)):
        initial = jax.eval_shape(half.init, jax.random.key(0), x, mask)
        assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {np.dtype("f4")}
        (y, new_mask), updates = half.apply(
            variables, x, mask, train=True, mutable="batch_stats"
        )
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {np.dtype("f4")}
        assert y.dtype == new_mask.dtype == np.float32
        (expected, _), _ = model.apply(
            variables, images, mask, train=True, mutable="batch_stats"
        )
        error = np.abs(y - expected).max() / np.abs(expected).max()
        assert 1e-4 < error < 0.05


@pytest.mark.parametrize("conv", ["partial", "standard"])
def test_dtypes_and_precision_reach_every_layer(conv):
    model = PConvUNet(
        depth=2,
        width=4,
        conv=conv,
        dtype=jnp.bfloat16,
        param_dtype=jnp.float16,
        precision="highest",
    )
    variables = jax.eval_shape(model.init, jax.random.key(0), *make_inputs())
    for leaf in jax.tree.leaves(variables["params"]):
        assert leaf.dtype == np.float16
    _, state = jax.eval_shape(
        functools.partial(apply_and_capture, model, train=True),
        variables,
        *make_inputs(),
    )
    for name, output in state["intermediates"].items():
        if name != "__call__":
            assert jax.tree.leaves(output)[0].dtype == jnp.bfloat16, name
    lowered = jax.jit(model.apply).lower(variables, *make_inputs()).as_text()
    # For maps smaller than the kernel, they are matrix products.
    kinds = ("stablehlo.convolution", "stablehlo.dot_general")
    convolutions = sum(lowered.count(kind) for kind in kinds)
    # A decoder stage of partial convolution has one for each of its two inputs.
    assert convolutions == (6 if conv == "partial" else 4)
    precisions = (
        "precision HIGHEST>, #stablehlo<precision HI",
        "precision = [HIGHEST, HIGHEST]",
    )
    assert convolutions == sum(lowered.count(text) for text in precisions)


# Other networks.


def test_standard_convolutions_see_the_mask_and_output_valid_pixels():
    model, variables = make_model(conv="standard")
    params = variables["params"]
    assert params["pconv1"]["kernel"].shape == (7, 7, 4, 4)
    assert params["pconv4"]["kernel"].shape == (3, 3, 4 + 4, 3)
    images, mask = make_inputs()
    images *= mask  # Only the mask differs.
    y, new_mask = model.apply(variables, images, mask)
    other, _ = model.apply(variables, images, np.ones_like(mask))
    np.testing.assert_array_equal(new_mask, np.ones_like(mask))
    assert np.abs(y - other).max() > 1e-3


def test_custom_stages():
    stages = (
        [Stage(4, 5, negative_slope=0.1), Stage(6, 3, padding="REFLECT")],
        [Stage(5, 1, batch_norm=False), Stage(2, 3, False, None, "CIRCULAR")],
    )
    model = PConvUNet(stages=stages)
    images, mask = make_inputs(channels=1)
    (y, _), variables = jax.eval_shape(
        model.init_with_output, jax.random.key(0), images, mask
    )
    chex.assert_shape(y, (*images.shape[:-1], 2))
    assert (model.depth, model.width, model.out_features) == (2, 4, 2)
    assert model.size_multiple == 4
    assert model.encoder_norms == ("bn1", "bn2")
    assert hash(model) == hash(PConvUNet(stages=tuple(map(tuple, stages))))
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert {n: s for n, s in shapes.items() if n.startswith("pconv")} == {
        "pconv1": {"kernel": (5, 5, 1, 4)},
        "pconv2": {"kernel": (3, 3, 4, 6)},
        "pconv3": {"kernel": (1, 1, 6 + 4, 5), "bias": (5,)},
        "pconv4": {"kernel": (3, 3, 5 + 1, 2), "bias": (2,)},
    }


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"conv": "standard"},
        {"normalization": unet.IMAGENET, "sigmoid_head": True},
        {"stages": ([Stage(4, 5), Stage(6, 3, False)], [Stage(5, 1), Stage(2, 3)])},
    ],
)
def test_folded_batch_normalization_computes_the_same(fields):
    model, variables = make_model(**fields)
    images, mask = make_inputs()
    before = jax.tree.map(np.copy, variables)
    expected = model.apply(variables, images, mask)
    folded, constants = unet.fold_batch_norm(model, variables)
    assert constants.keys() == {"params"} and not folded.encoder_norms
    y, new_mask = folded.apply(constants, images, mask)
    np.testing.assert_array_equal(new_mask, expected[1])
    np.testing.assert_allclose(y, expected[0], atol=1e-5 * np.abs(y).max())
    chex.assert_trees_all_equal(variables, before)
    assert {x.dtype for x in jax.tree.leaves(constants)} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_decoder_at_low_resolution_equals_the_plain_one(monkeypatch):
    model, variables = make_model(depth=3)
    images, mask = make_inputs(size=24)

    def run():
        @jax.jit
        def loss(variables, images):
            outputs, updates = model.apply(
                variables, images, mask, train=True, mutable=["batch_stats"]
            )
            return jnp.sin(outputs[0]).sum(), (outputs, updates)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables, images)

    low = run()
    monkeypatch.setattr(_conv, "_stays_small", lambda *_: False)
    plain = run()
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(np.abs(b).max(), 0.1))
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (low, plain))))


def test_kernels_are_he_initialized():
    model = PConvUNet(depth=1, out_features=64)
    params = jax.jit(model.init)(jax.random.key(0), *make_inputs())["params"]
    for layer in params.values():
        expected = np.sqrt(2 / layer["kernel"][..., 0].size)
        np.testing.assert_allclose(layer["kernel"].std(), expected, rtol=0.02)
        assert not np.any(layer["bias"])


# Errors.


@pytest.mark.parametrize(
    ("fields", "shape", "mask_shape", "message"),
    [
        ({}, (1, 12, 16, 3), None, "12 x 16 .* multiples of 8.* height of 8 or 16 "),
        ({}, (1, 12, 16, 3), None, "a width of 16; or"),
        ({}, (1, 5, 11, 3), None, "a height of 8 and a width of 8 or 16;"),
        ({}, (1, 0, 16, 3), None, "a height of 8 and"),
        ({}, (16, 16, 3), None, r"images must be \[N, H, W, C\]"),
        ({}, (1, 16, 16, 3), (1, 16, 16, 2), "mask must be of shape"),
        ({}, (2, 16, 16, 3), (1, 16, 16, 1), "mask must be of shape"),
        ({}, (1, 16, 16, 3), (16, 16, 1), "mask must be of shape"),
        (dict(conv="standard"), (1, 16, 16, 3), (1, 16, 16, 3), "N, H, W, 1. for sta"),
        (dict(conv="gated"), (1, 16, 16, 3), None, "conv must be 'partial' or 'stand"),
        (dict(depth=0), (1, 16, 16, 3), None, "depth and width must be positive"),
        (dict(width=0), (1, 16, 16, 3), None, "depth and width must be positive"),
        (
            dict(stages=(unet.paper_stages(depth=2)[0], unet.paper_stages(depth=3)[1])),
            (1, 16, 16, 3),
            None,
            "as many decoder as encoder stages, got 2 and 3",
        ),
        (dict(stages=((), ())), (1, 16, 16, 3), None, "stages must"),
        (
            dict(stages=((Stage(4, 0),), (Stage(3, 3),))),
            *((1, 16, 16, 3), None),
            "stages must have positive features and kernel_size",
        ),
        *(
            (
                dict(stages=((Stage(4, 3, padding=0),), (Stage(3, 3),)), conv=conv),
                *((1, 16, 16, 3), None),
                r"\(7, 7\) comes before \(16, 16\) at pconv2: correct their padding",
            )
            for conv in ("partial", "standard")
        ),
        (
            dict(normalization=unet.Normalization((0.5, 0.5), (0.5,))),
            *((1, 16, 16, 3), None),
            "normalization must have one number, or one for each channel",
        ),
    ],
)
def test_errors(fields, shape, mask_shape, message):
    model = PConvUNet(**(dict(depth=3, width=4) | fields))
    images, mask = np.zeros(shape), np.ones(mask_shape or (*shape[:-1], 1))
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), images, mask)


@pytest.mark.usefixtures("fast_compilation_once")
@pytest.mark.parametrize("conv", ["partial", "standard"])
def test_any_number_of_images(conv):
    model = PConvUNet(depth=2, width=4, conv=conv)
    images, mask = make_inputs(3)
    variables = jax.jit(model.init)(jax.random.key(0), images, mask)
    shapes = export.symbolic_args_specs((images, mask), "b, 16, 16, _")
    apply = jax.jit(functools.partial(model.apply, variables))
    exported = export.export(apply)(*shapes)
    for n in (1, 3):
        args = images[:n], mask[:n]
        chex.assert_trees_all_close(exported.call(*args), apply(*args), atol=1e-5)
    output, _ = model.apply(variables, images[:0], mask[:0])
    assert output.shape == (0, 16, 16, 3)


def test_normalization_does_not_promote_float32_to_float64():
    model, variables = make_model(normalization=((0.5,), (0.5,)))
    with jax.enable_x64(True):
        output, _ = jax.eval_shape(model.apply, variables, *make_inputs())
    assert output.dtype == jnp.float32


@pytest.mark.parametrize("conv", ["partial", "standard"])
def test_a_gray_mask_is_that_of_its_values_above_one_half(conv):
    model, variables = make_model(conv=conv)
    images, mask = make_inputs()
    for value in (0.4, 0.6):
        gray = mask * np.float32(value)
        binary = (gray > 0.5).astype(gray.dtype)
        chex.assert_trees_all_equal(
            jax.jit(model.apply)(variables, images, gray),
            jax.jit(model.apply)(variables, images, binary),
        )


def test_training_needs_more_than_one_value_per_channel():
    model, variables = make_model()
    train = functools.partial(model.apply, train=True, mutable="batch_stats")
    with pytest.raises(ValueError, match="1 x 1 pixels of a batch of 1 .*larger batch"):
        train(variables, *make_inputs(1, 4))
    # These are well defined.
    jax.eval_shape(model.apply, variables, *make_inputs(1, 4))
    jax.eval_shape(train, variables, *make_inputs(2, 4))
    frozen = functools.partial(train, freeze_encoder_norm=True)
    jax.eval_shape(frozen, variables, *make_inputs(1, 4))


@pytest.mark.slow  # Without XLA's optimizations, nothing is moved or kept.
def test_parts_of_kernels_are_not_all_in_memory_at_the_same_time(monkeypatch):
    images, mask = (jax.ShapeDtypeStruct((1, 256, 256, c), jnp.float32) for c in (3, 1))
    model = PConvUNet(depth=7)
    variables = jax.eval_shape(model.init, jax.random.key(0), images, mask)

    def temporary():
        # A function of its own, since JAX caches traces.
        apply = jax.jit(lambda *args: model.apply(*args))
        compiled = apply.lower(variables, images, mask).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    least = temporary()
    monkeypatch.setattr(lax, "optimization_barrier", lambda x: x)
    assert least < 0.8 * temporary()


def test_mistakes_of_the_first_day():
    images, mask = jnp.zeros((1, 8, 8, 3)), jnp.ones((1, 8, 8, 1))
    key, model = jax.random.key(0), PConvUNet(depth=2, width=4)
    with pytest.raises(ValueError, match="mask must be .N, H, W, 1., .*, got None"):
        model.init(key, images, None)
    for stages in [((Stage(4, 3),),), [[[4, 3]], [[3, 3]]]]:
        with pytest.raises(ValueError, match="stages must be two sequences of Stage"):
            PConvUNet(stages=stages).init(key, images, mask)
    with pytest.raises(ValueError, match="must be positive integers, got 2.0 and 64"):
        PConvUNet(depth=2.0).init(key, images, mask)
    with pytest.raises(ValueError, match="images of 9 x 9 cannot be halved 2 times"):
        unet.fill_depth(model, jnp.ones((1, 9, 9, 1)))
    with pytest.raises(ValueError, match=r"\[N, H, W, 1\], got \(1, 8, 8, 3\)"):
        unet.fill_depth(model, jnp.ones((1, 8, 8, 3)))
