import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pconv_jax import losses, metrics, vgg
from tests.helpers import TESTDATA, reference

GOLDEN = np.load(TESTDATA / "losses.npz")

TERMS = [name for name, weight in losses.PAPER_WEIGHTS._asdict().items() if weight]


def make_case(seed=0, shape=(2, 8, 9, 3)):
    """Make an output, a target and a mask."""
    rng = np.random.default_rng(seed)
    output, target = rng.uniform(-1, 1, (2, *shape)).astype(np.float32)
    return output, target, (rng.random((*shape[:-1], 1)) > 0.3).astype(np.float32)


def features_fn(images):
    """Compute two smooth maps; a stand-in for a VGG."""
    half = images[:, ::2, ::2]
    return jnp.sin(images), jnp.concatenate([jnp.cos(half), half**2], axis=-1)


# Another implementation.


def golden_vgg16(seed):
    """Load the VGG16 with the recipe weights of the golden arrays."""
    params, index, channels = {}, 0, 3
    for block, convs in enumerate((2, 2, 3), 1):
        for conv in range(1, convs + 1):
            features = 64 * 2 ** (block - 1)
            weights = reference.recipe_weights(
                seed,
                [
                    (f"features.{index}.weight", (features, channels, 3, 3)),
                    (f"features.{index}.bias", (features,)),
                ],
            )
            kernel, bias = weights.values()
            params[f"conv{block}_{conv}"] = {
                "kernel": kernel.transpose(2, 3, 1, 0),
                "bias": bias,
            }
            channels, index = features, index + 2
        index += 1
    return functools.partial(vgg.vgg16_features, params)


@pytest.mark.parametrize("seed", [1, 2])
def test_equals_golden_losses_and_features(seed):
    output, target, mask = (GOLDEN[f"{seed}/{k}"] for k in ("output", "target", "mask"))
    network = golden_vgg16(seed)
    terms = jax.jit(functools.partial(losses.inpainting_loss, features_fn=network))(
        output, target, mask
    )
    assert terms.keys() == {"total", *TERMS}
    for name, term in terms.items():
        assert term.dtype == np.float32
        expected = GOLDEN[f"{seed}/loss/{name}"]
        np.testing.assert_allclose(term, expected, rtol=1e-5, err_msg=name)
    for level, pool in enumerate(jax.jit(network)(output), 1):
        expected = GOLDEN[f"{seed}/pool{level}_mean"]
        np.testing.assert_allclose(pool.mean(axis=(1, 2)), expected, atol=1e-5)


# Arithmetic.


def test_hole_and_valid_add_up_to_the_mean_difference():
    output, target, mask = make_case()
    total = losses.hole(output, target, mask) + losses.valid(output, target, mask)
    expected = np.abs(output - target).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_hole_and_valid_are_normalized_by_the_whole_image():
    output, target = np.full((1, 4, 5, 3), 0.75), np.full((1, 4, 5, 3), -0.25)
    mask = np.ones((1, 4, 5, 1))
    mask[0, 1, 1:4] = 0  # 3 pixels of 20.
    np.testing.assert_allclose(losses.hole(output, target, mask), [3 / 20])
    np.testing.assert_allclose(losses.valid(output, target, mask), [17 / 20])


@pytest.mark.parametrize("channels", [1, 5])
def test_style_of_constant_maps(channels):
    a, b, shape = 1.5, -0.5, (2, 3, 4, channels)
    style = losses.style(
        [np.full(shape, a), np.full(shape, b)], [np.full(shape, b), np.full(shape, b)]
    )
    np.testing.assert_allclose(style, [abs(a**2 - b**2) / channels] * 2, rtol=1e-6)


def test_gram_is_the_scaled_product_of_channels():
    p = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    flat = p.reshape(2, 12, 5).astype(np.float64)
    expected = np.stack([f.T @ f for f in flat]) / (5 * 3 * 4)
    np.testing.assert_allclose(losses.gram(p), expected, atol=1e-6)


def test_gram_of_bfloat16_is_summed_in_float32():
    # A bfloat16 sum of ones stops at 256.
    gram = losses.gram(np.ones((1, 32, 32, 2), jnp.bfloat16))
    assert gram.dtype == np.float32
    np.testing.assert_array_equal(gram, np.full((1, 2, 2), 0.5))


def test_gram_has_full_precision():
    lowered = jax.jit(losses.gram).lower(np.ones((1, 2, 2, 3))).as_text()
    assert lowered.count("dot_general") == 1
    assert "precision = [HIGHEST, HIGHEST]" in lowered


def test_perceptual_is_the_mean_difference_of_each_map():
    a = [np.full((2, 4, 4, 3), 1.0), np.full((2, 2, 2, 8), 2.0)]
    b = [np.full((2, 4, 4, 3), 0.5), np.full((2, 2, 2, 8), -1.0)]
    np.testing.assert_allclose(losses.perceptual(a, b), [3.5, 3.5])


def test_total_variation_by_hand():
    mask = np.ones((1, 5, 5, 1))
    mask[0, 0, 0] = 0
    # R is the upper left 2 x 2 square with 4 pairs, two in each direction.
    comp = np.zeros((1, 5, 5, 1))
    comp[0, :2, :2, 0] = [[1, 3], [6, 13]]
    comp[0, 2:, :] = comp[0, :, 2:] = 100
    expected = (2 + 7 + 5 + 10) / 25
    np.testing.assert_allclose(losses.total_variation(comp, mask), [expected])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), holes=st.integers(0, 6))
def test_total_variation_equals_reference(seed, holes):
    rng = np.random.default_rng(seed)
    comp = rng.uniform(-1, 1, (2, 6, 7, 2)).astype(np.float32)
    mask = np.ones((2, 6, 7, 1), np.uint8)
    for _ in range(holes):
        mask[rng.integers(2), rng.integers(6), rng.integers(7)] = 0
    expected = [
        reference.total_variation(c.astype(np.float64), m[..., 0])
        for c, m in zip(comp, mask)
    ]
    actual = losses.total_variation(comp, mask)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("content", [100.0, np.nan, np.inf])
def test_total_variation_ignores_what_lies_outside_of_the_region(content):
    comp, _, _ = make_case(shape=(1, 9, 9, 2))
    mask = np.ones((1, 9, 9, 1))
    mask[0, 3:5, 4] = 0
    outside = np.ones(mask.shape, bool)
    outside[0, 2:6, 3:6] = False
    value_and_grad = jax.value_and_grad(lambda c: losses.total_variation(c, mask)[0])
    expected = value_and_grad(comp)
    actual = value_and_grad(np.where(outside, content, comp))
    chex.assert_trees_all_equal(actual, expected)
    assert not np.any(np.where(outside, actual[1], 0))


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 1, 6, 3), (1, 6, 1, 3)], ids=str)
def test_total_variation_of_single_rows_and_columns(shape):
    comp, _, _ = make_case(shape=shape)
    actual = losses.total_variation(comp, np.zeros((*shape[:-1], 1)))
    expected = np.abs(np.diff(comp.reshape(-1, 3), axis=0)).sum() / comp.size
    np.testing.assert_allclose(actual, [expected], rtol=1e-6)


# Terms that are not in the paper.


@pytest.mark.parametrize("size, error", [(4, 0.5), (16, 0.1), (16, 0.0)])
def test_log_mse_is_the_scaled_psnr(size, error):
    target = np.zeros((1, 16, 16, 3), np.float32)
    comp = target.copy()
    comp[:, :size, :size] += error
    value = losses.log_mse(comp, target)
    mse = (size / 16 * error) ** 2
    np.testing.assert_allclose(value, [np.log(mse + 1e-5)], rtol=1e-5)
    if error:
        psnr = metrics.psnr((comp + 1) / 2, (target + 1) / 2)
        expected = -np.log(10) / 10 * psnr + np.log(4)
        np.testing.assert_allclose(
            losses.log_mse(comp, target, epsilon=0), expected, rtol=1e-5
        )


def test_log_mse_counts_small_holes_as_much_as_large_ones():
    rng = np.random.default_rng(0)
    target = rng.uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    comp = target + np.float32(0.2)
    comp[0, 2:] = target[0, 2:]  # A quarter of it is in the hole.
    gradient = jax.grad(lambda x: losses.log_mse(x, target, epsilon=0).sum())(comp)
    # d ln(sum e^2) along e itself is 2, whatever the size of the hole.
    np.testing.assert_allclose(
        (gradient * (comp - target)).sum(axis=(1, 2, 3)), [2, 2], rtol=1e-5
    )
    chex.assert_tree_all_finite(jax.grad(lambda x: losses.log_mse(x, x).sum())(comp))


def test_errors_of_log_mse():
    with pytest.raises(ValueError, match="comp and target must be"):
        losses.log_mse(OUTPUT, TARGET[:1])
    with pytest.raises(ValueError, match="comp and target must be"):
        losses.log_mse(OUTPUT[0], TARGET[0])


# The weighted sum.


def test_terms_equal_their_functions():
    output, target, mask = make_case()
    weights = losses.LossWeights(*np.arange(1.0, 8))
    terms = losses.inpainting_loss(
        output, target, mask, features_fn=features_fn, weights=weights
    )
    comp = np.where(mask > 0, target, output)
    out, gt, both = (features_fn(x) for x in (output, target, comp))
    expected = dict(
        valid=losses.valid(output, target, mask),
        hole=losses.hole(output, target, mask),
        perceptual=losses.perceptual(out, gt) + losses.perceptual(both, gt),
        style_out=losses.style(out, gt),
        style_comp=losses.style(both, gt),
        total_variation=losses.total_variation(comp, mask),
        log_mse=losses.log_mse(comp, target),
    )
    expected["total"] = sum(w * expected[k] for k, w in weights._asdict().items())
    assert expected.keys() == terms.keys()
    for name in terms:
        np.testing.assert_allclose(terms[name], expected[name], rtol=1e-6)


def test_weights_of_the_paper():
    assert losses.PAPER_WEIGHTS._asdict() == {
        "valid": 1,
        "hole": 6,
        "perceptual": 0.05,
        "style_out": 120,
        "style_comp": 120,
        "total_variation": 0.1,
        "log_mse": 0,
    }
    assert losses.PAPER_WEIGHTS == losses.LossWeights()


def test_without_features_the_other_terms_remain():
    output, target, mask = make_case()
    terms = losses.inpainting_loss(output, target, mask, features_fn=None)
    assert terms.keys() == {"total", "valid", "hole", "total_variation"}
    expected = terms["valid"] + 6 * terms["hole"] + 0.1 * terms["total_variation"]
    np.testing.assert_allclose(terms["total"], expected, rtol=1e-6)


def test_a_perfect_output_has_only_total_variation():
    _, target, mask = make_case()
    terms = losses.inpainting_loss(target, target, mask, features_fn=features_fn)
    for name in set(TERMS) - {"total_variation"}:
        np.testing.assert_array_equal(terms[name], [0, 0])


def test_examples_do_not_mix():
    output, target, mask = make_case(shape=(3, 8, 8, 3))
    loss = jax.jit(functools.partial(losses.inpainting_loss, features_fn=features_fn))
    together = loss(output, target, mask)
    for i in range(3):
        alone = loss(output[i : i + 1], target[i : i + 1], mask[i : i + 1])
        for name, value in alone.items():
            np.testing.assert_allclose(value, together[name][i : i + 1], rtol=1e-6)


def test_valid_pixels_of_the_output_affect_only_the_terms_of_the_output():
    output, target, mask = make_case()
    other = np.where(mask > 0, output + 0.5, output)
    loss = functools.partial(losses.inpainting_loss, features_fn=features_fn)
    a, b = loss(output, target, mask), loss(other, target, mask)
    same = {name for name in a if np.array_equal(a[name], b[name])}
    assert same == {"hole", "style_comp", "total_variation"}


@pytest.mark.parametrize("content", [np.nan, np.inf, 1e30])
def test_valid_does_not_need_a_target_in_the_hole(content):
    output, target, mask = make_case()
    unknown = np.where(mask > 0, target, content)
    value_and_grad = jax.value_and_grad(lambda o, t: losses.valid(o, t, mask).sum())
    chex.assert_trees_all_equal(
        value_and_grad(output, unknown), value_and_grad(output, target)
    )


def test_no_gradient_reaches_the_target_through_its_features():
    output, target, mask = make_case()

    def loss(target):
        weights = losses.LossWeights(0, 0, 1, 1, 0, 0, 0)
        return losses.inpainting_loss(
            output,
            target,
            np.zeros_like(mask),  # I_comp is I_out.
            features_fn=features_fn,
            weights=weights,
        )["total"].sum()

    assert not np.any(jax.jit(jax.grad(loss))(target))


@pytest.mark.parametrize("holes", [0, 1], ids=["no hole", "all hole"])
def test_gradients_are_finite_without_holes_and_without_valid_pixels(holes):
    output, target, mask = make_case()
    mask = np.full_like(mask, 1 - holes)

    @jax.jit
    @jax.grad
    def gradient(output):
        terms = losses.inpainting_loss(output, target, mask, features_fn=features_fn)
        return terms["total"].sum()

    chex.assert_tree_all_finite(gradient(output))
    chex.assert_tree_all_finite(gradient(target))  # The output is perfect.


def test_losses_are_float32_for_every_image():
    case = make_case()
    for dtype in (jnp.bfloat16, np.float16, np.float32):
        output, target, mask = (a.astype(dtype) for a in case)
        terms = losses.inpainting_loss(output, target, mask, features_fn=features_fn)
        assert {name: t.dtype for name, t in terms.items()} == dict.fromkeys(
            terms, np.float32
        )
        # Only the features are rounded again; sums and differences are wide.
        rounded = (a.astype(dtype).astype(np.float32) for a in case)
        expected = losses.inpainting_loss(*rounded, features_fn=features_fn)
        rtol = float(jnp.finfo(dtype).eps) / 2
        chex.assert_trees_all_close(terms, expected, rtol=rtol)


class VariantsTest(chex.TestCase):
    @chex.all_variants
    def test_inpainting_loss(self):
        case = make_case()
        loss = functools.partial(losses.inpainting_loss, features_fn=features_fn)
        chex.assert_trees_all_close(
            self.variant(loss)(*case), loss(*case), rtol=1e-5, atol=1e-6
        )


# Errors.

OUTPUT, TARGET, MASK = make_case()

PAIR_LOSSES = (
    losses.hole,
    losses.valid,
    functools.partial(losses.inpainting_loss, features_fn=None),
)


@pytest.mark.parametrize("loss", PAIR_LOSSES, ids=["hole", "valid", "all"])
def test_errors_of_shapes(loss):
    for output, target in [
        (OUTPUT[:1], TARGET),
        (OUTPUT[0], TARGET[0]),
        (OUTPUT, TARGET[..., :1]),
    ]:
        with pytest.raises(ValueError, match="output and target must be"):
            loss(output, target, MASK)
    for mask in (
        MASK[:1],
        MASK[..., 0],
        np.repeat(MASK, 3, -1),
        MASK[:, :1, :1],
        MASK[0],
    ):
        with pytest.raises(ValueError, match=r"mask must be of shape \(2, 8, 9, 1\)"):
            loss(OUTPUT, TARGET, mask)


def test_errors_of_total_variation_name_its_arguments():
    with pytest.raises(ValueError, match="comp must be"):
        losses.total_variation(OUTPUT[0], MASK[0])
    with pytest.raises(ValueError, match="mask must be of shape"):
        losses.total_variation(OUTPUT, MASK[:1])


@pytest.mark.parametrize("loss", [losses.perceptual, losses.style])
def test_errors_of_features(loss):
    with pytest.raises(ValueError, match="features must be .* shapes"):
        loss([OUTPUT], [TARGET[:1]])
    with pytest.raises(ValueError, match="features must be"):
        loss([OUTPUT, OUTPUT], [TARGET])


def test_errors_of_gram():
    with pytest.raises(ValueError, match="features must be"):
        losses.gram(OUTPUT[0])


@pytest.mark.parametrize("value", [0.4, 0.7, np.nan])
def test_a_gray_mask_is_that_of_its_values_above_one_half(value):
    def loss(mask):
        return losses.inpainting_loss(OUTPUT, TARGET, mask, features_fn=None)

    gray = np.where(MASK, value, 0)
    chex.assert_trees_all_equal(loss(gray), loss(gray > 0.5))


def test_integers_do_not_wrap_around():
    target, output = (np.full((1, 8, 8, 1), n, np.uint8) for n in (20, 10))
    mask, ramp = np.ones((1, 8, 8, 1), np.uint8), np.indices((1, 8, 8, 1), np.uint8)[2]
    np.testing.assert_allclose(losses.valid(output, target, mask), 10)
    np.testing.assert_allclose(losses.hole(output, target, 1 - mask), 10)
    down = losses.total_variation(ramp[..., ::-1, :], 1 - mask)
    np.testing.assert_allclose(down, losses.total_variation(ramp, 1 - mask))


def test_an_empty_batch_has_no_losses():
    images, mask = np.zeros((0, 8, 8, 3), np.float32), np.ones((0, 8, 8, 1))
    terms = losses.inpainting_loss(images, images, mask, features_fn=None)
    assert {term.shape for term in terms.values()} == {(0,)}


def test_weights_may_be_traced():
    images, mask = np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 8, 1))
    loss = functools.partial(
        losses.inpainting_loss, images + 0.5, images, mask, features_fn=None
    )

    @jax.jit
    def total(weights):
        return loss(weights=weights)["total"]

    for weights in (losses.LossWeights(), losses.LossWeights(hole=2, log_mse=0.5)):
        expected = loss(weights=weights)["total"]
        np.testing.assert_allclose(total(weights), expected, 1e-6)
    with pytest.raises(ValueError, match="weights must be LossWeights.valid, h"):
        loss(weights={"hole": 1})
